"""Captions of pictures, token by token from the left: greedy and beam search over the forward stream alone.

The picture is encoded once and its keys and values are made once a fusion layer; each step adds one row of keys and values a text
layer. What a step computes equals the forward stream's row over the whole prefix (tested).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from flm_scale.batch import State
from flm_scale.errors import ConfigError
from flm_scale.model.assemble import VisionLanguageModel, run_layers
from flm_scale.model.frozen_lm import FrozenLm
from flm_scale.model.layers import add_residual, attend
from flm_scale.model.text import FusionEntry, Head, StreamLayer, TextEntry, TextLayer
from flm_scale.objectives.captioning import Captioning
from flm_scale.objectives.objective import Objective


class Generated(NamedTuple):
    """What the model says of one picture."""

    ids: list[int]
    """Content tokens, without BOS and EOS."""
    score: float
    """Mean log-probability of a token, EOS counted, in nats."""


@torch.no_grad()
def generate(model: VisionLanguageModel, objective: Objective, pixels: UInt8[Tensor, "N *F 3 height width"], *, bos_id: int, eos_id: int,
             vocab_size: int, max_length: int, beams: int = 1) -> list[Generated]:
    """Return one caption a picture: the finished hypothesis with the best mean log-probability; one beam is greedy search.

    vocab_size: the tokenizer's; rows of the decoder behind it are never said.   max_length: tokens with BOS and EOS; EOS is forced at the end.
    A hypothesis that ends leaves its beam for good, so the search narrows until the last one has ended. A frozen language model searches in
    transformers' own way.
    Raises ConfigError for an objective without a stream that continues from the left.
    """
    if not objective.generates:
        raise ConfigError("objective.kind ('mlm') has no stream that reads from the left, so it cannot say a caption; use flm, ar or prefix_lm")
    if "head" in model.layers and isinstance(head := model.layers["head"], FrozenLm):
        assert isinstance(objective, Captioning), "the objective of a frozen language model"
        said = head.generate(encode_images(model, pixels).rows, [[bos_id, *objective.prompt.tolist()]] * len(pixels), end_ids=[eos_id],
                             max_new=max_length - 1, beams=beams)
        return [Generated(ids, score) for ids, score in said]
    num_images, device = len(pixels), pixels.device
    decoder = CachedDecoder(model, encode_images(model, pixels), beams=beams)
    # Until the first step all beams of a picture are alike: one of them lives.
    totals = torch.full((num_images, beams), -torch.inf, device=device)
    totals[:, 0] = 0.0
    ids = torch.full((num_images, beams, 1), bos_id, device=device)
    free = torch.full((num_images, 1), beams, device=device)
    best = [Generated([], -torch.inf)] * num_images
    for length in range(1, max_length):
        logits = decoder.step(ids[:, :, -1].flatten())[:, :vocab_size].clone()
        logits[:, bos_id] = -torch.inf
        scores = logits.log_softmax(-1).unflatten(0, (num_images, beams))
        if length == max_length - 1:
            scores[..., torch.arange(vocab_size, device=device) != eos_id] = -torch.inf
        totals, chosen = (totals[..., None] + scores).flatten(1).topk(beams)
        totals[torch.arange(beams, device=device) >= free] = -torch.inf
        parents, tokens = chosen // vocab_size, chosen % vocab_size
        ids = torch.cat([ids.gather(1, parents[..., None].expand(-1, -1, length)), tokens[..., None]], dim=2)
        decoder.keep(parents)
        ended = (tokens == eos_id) & totals.isfinite()
        for image, beam in ended.nonzero().tolist():
            found = Generated(ids[image, beam, 1:-1].tolist(), float(totals[image, beam]) / length)
            best[image] = max(best[image], found, key=lambda one: one.score)
        free -= ended.sum(1, keepdim=True)
        totals[ended] = -torch.inf
        # A total only falls and its mean is over max_length - 1 tokens at most: what cannot win any more need not be followed.
        bound = torch.tensor([one.score for one in best], device=device)[:, None]
        totals[totals / (max_length - 1) <= bound] = -torch.inf
        if not totals.isfinite().any():
            break
    return best


class EncodedImages(NamedTuple):
    """What the text looks at, or what stands in front of it."""

    rows: Float[Tensor, "N I D"]
    sizes: Int[Tensor, "N I_or_0"]
    """As of State."""


@torch.no_grad()
def encode_images(model: VisionLanguageModel, pixels: UInt8[Tensor, "N *F 3 height width"]) -> EncodedImages:
    """Run the tower, and the bridge where there is one."""
    nothing = torch.empty(0, dtype=torch.long, device=pixels.device)
    none = nothing.new_empty(len(pixels), 0)
    state = State(pixels, *[nothing] * (len(State._fields) - 1))._replace(image_slots=none, sizes=none, merge_slots=none)
    tower = [layer for name, layer in model.layers.items() if name.startswith(("vision_", "bridge_"))]
    sizes = none

    def turn(rows: Tensor) -> Tensor:
        nonlocal sizes  # where stages are cut nothing merges, so each of them has the right ones
        end = run_layers(tower, state._replace(rows=rows), recompute=False)
        sizes = end.sizes
        return end.rows

    rows = model.relay(pixels, turn)
    return EncodedImages(rows.unflatten(0, (len(pixels), -1)), sizes)


class CachedDecoder:
    """The forward stream of N pictures times B beams, one position a step."""

    def __init__(self, model: VisionLanguageModel, images: EncodedImages, *, beams: int) -> None:
        self.model, self.beams, self.position, self.sizes = model, beams, 0, images.sizes
        self.no_rows = images.rows.new_empty(0, images.rows.shape[-1])
        self.images = {name: layer.streams.image_attention.keys_values(images.rows) for name, layer in model.layers.items()
                       if isinstance(layer, TextLayer) and layer.streams.image_attention is not None}
        self.past: dict[str, tuple[Tensor, Tensor]] = {}
        """Keys and values [N*B, positions, H, d] of each layer of this process's stage."""

    def step(self, ids: Int[Tensor, " NB"]) -> Float[Tensor, "NB V"]:
        """Read the next token of every beam and return the logits of the one behind it."""
        logits = self.model.relay(self.no_rows, lambda rows: self._turn(rows, ids))
        self.position += 1
        return logits

    def keep(self, parents: Int[Tensor, "N B"]) -> None:
        """Let each beam go on from the past of the beam that it came from."""
        rows = (parents + self.beams * torch.arange(len(parents), device=parents.device)[:, None]).flatten()
        self.past = {name: (keys[rows], values[rows]) for name, (keys, values) in self.past.items()}

    def _turn(self, rows: Tensor, ids: Int[Tensor, " NB"]) -> Tensor:
        """Run this stage's layers on the newest position."""
        for name, layer in self.model.layers.items():
            match layer:
                case TextEntry():
                    rows = layer.norm(layer.tokens(ids) + layer.positions.weight[self.position])
                case FusionEntry():
                    rows = layer.linear(rows) + layer.kinds.weight[0]
                case TextLayer():
                    rows = self._layer(name, layer.streams, rows)
                case Head():
                    rows = layer.logits(rows)
        return rows

    def _layer(self, name: str, layer: StreamLayer, rows: Tensor) -> Tensor:
        """StreamLayer.forward for the newest position."""
        def look_back(x: Tensor) -> Tensor:
            q, *new = (part[:, None] for part in layer.self_attention.split_heads(x).unbind(-2))
            self.past[name] = _append(self.past.get(name), new)
            out: Tensor = layer.self_attention.out(attend(q, *self.past[name])[:, 0])
            return out

        rows = add_residual(rows, layer.self_norm, look_back, order=layer.order)
        look = layer.image_attention
        if look is not None and layer.image_norm is not None:
            def look_at_image(x: Tensor) -> Tensor:
                # The beams of a picture are one block of queries.
                q = look.query(x).unflatten(0, (-1, self.beams)).unflatten(-1, (look.local_heads, look.head_size))
                out: Tensor = look.out(look.attend(q, *self.images[name], self.sizes).flatten(0, 1))
                return out

            rows = add_residual(rows, layer.image_norm, look_at_image, order=layer.order)
        return add_residual(rows, layer.mlp_norm, layer.mlp, order=layer.order)


def _append(past: tuple[Tensor, Tensor] | None, new: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    keys, values = new if past is None else (torch.cat(pair, dim=1) for pair in zip(past, new, strict=True))
    return keys, values
