"""The reconstructor: runs beside the streams, layer by layer, and lets each query read both outside its hidden span.

Queries never see each other or the image, so any subset of them costs pro rata and gives the same result.
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from flm_scale.batch import State
from flm_scale.config import TextConfig
from flm_scale.model.layers import Mlp, SpanAttention, add_residual
from flm_scale.model.parts import Parts


class ReconstructorLayer(nn.Module):
    """Attention from queries to both streams, then an MLP."""

    def __init__(self, config: TextConfig, parts: Parts) -> None:
        super().__init__()
        self.order = config.norm
        self.span_norm, self.span_attention = nn.LayerNorm(config.width), SpanAttention(config.width, config.heads, parts)
        # The streams' residual rows are not normalised under 'pre'; under 'post' they are.
        self.memory_norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.mlp_norm, self.mlp = nn.LayerNorm(config.width), Mlp(config.width, parts)

    def forward(self, queries: Float[Tensor, "Q D"], text: Float[Tensor, "S T D"], state: State,
                visible: Bool[Tensor, "C Lq positions"]) -> Float[Tensor, "Q D"]:
        """text: what the streams' layer of the same depth gave out."""
        memory = self.memory_norm(text)
        queries = add_residual(queries, self.span_norm, lambda q: self.span_attention(
            q, memory, query_slots=state.query_slots, query_places=state.query_places, slots=state.slots, visible=visible), order=self.order)
        return add_residual(queries, self.mlp_norm, self.mlp, order=self.order)
