"""Forward FLOPs of one packed micro-batch, counted from sizes alone (docs/flm.md, Cost): the numerator of the model FLOPs utilisation.

A multiply-add is two FLOPs; linears, the patch convolution and attention's two products count, norms, softmax and elementwise work do not.
Model FLOPs count attention over the real lengths of each caption, without credit for causal sparsity. What is executed is a little
more, because attention runs on padded views; `executed=True` counts that, and a test holds it against torch's own counter.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flm_scale.batch import State
from flm_scale.config import Run
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.config_vision import ConvNetConfig, OpenClipVisionConfig, SmallVisionConfig, Vision
from flm_scale.model.bridge import tokens_along
from flm_scale.model.convnet import convnet_shape
from flm_scale.model.frozen_lm import language_shape
from flm_scale.model.reducers import build_reducer, merge_schedule
from flm_scale.model.vision import named_sizes


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision tower, whatever built it."""

    width: int
    layers_run: int
    """Blocks that are executed; 'penultimate' leaves the last one out."""
    patch_size: int
    image_size: int
    block_weights: int
    """Elements of a block's matrices; 12 * width**2 where the MLP has two of four times the width."""
    prefix_tokens: int = 1
    """Tokens before the patches: the class token, or none as in SigLIP."""
    convolutions: float = 0
    """FLOPs of a network that has no blocks, for one picture."""
    merged: tuple[int, ...] = ()
    """vision.merged of the config."""
    frames: int = 1
    """F: pictures that the tower sees of one image, which is a clip."""
    temporal_width: int = 0
    """Of queries and keys over frames."""

    @property
    def image_tokens(self) -> int:
        """I of the first block: the class token, where there is one, and the patches."""
        return self.prefix_tokens + (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> tuple[int, ...]:
        """I of each block, and behind all of them that of the text."""
        return merge_schedule(self.merged or (0,), self.image_tokens, self.layers_run, protected=self.prefix_tokens, option="vision.merged")


def vision_shape(config: OpenClipVisionConfig | SmallVisionConfig, named_sizes: Mapping[str, Any] | None = None) -> VisionShape:
    """Return the tower's sizes. named_sizes: what model.vision says of a tower that the config only names."""
    sizes = config.model_dump() if isinstance(config, SmallVisionConfig) else named_sizes
    assert sizes is not None, "a named tower's sizes come from model.vision, the door to open_clip"
    return VisionShape(sizes["width"], sizes["layers"] - (config.output == "penultimate"), sizes["patch_size"], config.image_size,
                       sizes.get("block_weights", 12 * sizes["width"] ** 2), sizes.get("prefix_tokens", 1), merged=config.merged,
                       frames=config.frames, temporal_width=config.temporal.width if config.frames > 1 else 0)


def shape_of(config: Vision) -> VisionShape:
    """Return the sizes of any tower; open_clip or timm is asked for those of one that the config only names."""
    if isinstance(config, ConvNetConfig):
        shape = convnet_shape(config)
        side = math.isqrt(shape.image_tokens)
        return VisionShape(shape.width, 0, config.image_size // side, config.image_size, 0, prefix_tokens=0, convolutions=shape.flops)
    return vision_shape(config, None if isinstance(config, SmallVisionConfig) else named_sizes(config.name))


@dataclass(frozen=True)
class BatchShapes:
    """Sizes of one packed micro-batch; letters as in batch.py. Pairs are (row that looks, row it may look at), of one stream."""

    num_images: int
    num_captions: int
    """C: several views of one count each."""
    num_streams: int
    text_tokens: int
    num_queries: int
    num_targets: int
    self_pairs: int
    """Sum over captions of length squared."""
    query_pairs: int
    """Sum over captions of queries times length."""
    view_self_pairs: int
    """C * L * L, what the padded view computes."""
    view_query_pairs: int
    """C * Lq * L."""
    view_image_rows: int
    """N * M, against `text_tokens` real rows."""

    @classmethod
    def of(cls, state: State) -> "BatchShapes":
        """Read the sizes off a packed state. On the CPU it costs microseconds; on a GPU it would wait for the device."""
        (captions, longest), longest_queries = state.slots.shape, state.query_slots.shape[1]
        caption_of_query = state.query_places // max(longest_queries, 1)
        return cls(
            num_images=len(state.image_slots), num_captions=captions, num_streams=len(state.first), text_tokens=len(state.ids),
            num_queries=len(state.queries), num_targets=len(state.target_rows), self_pairs=int((state.lengths ** 2).sum()),
            query_pairs=int(state.lengths[caption_of_query].sum()), view_self_pairs=captions * longest ** 2,
            view_query_pairs=captions * longest_queries * longest, view_image_rows=state.image_slots.numel())


def forward_flops(run: Run, shapes: BatchShapes, vision: VisionShape, *, executed: bool = False) -> dict[str, float]:
    """Return the forward FLOPs of one micro-batch by part: vision, bottom, fusion, reconstructor, head, projections.

    executed: count attention as the padded views compute it, not over real lengths.
    'projections' are the linear from the tower and the one at the entry of the fusion layers; image keys and values are in 'fusion'.
    Of a run around a frozen language model the parts are vision, bridge, language_model and head; of clips there is a part temporal.
    """
    tower = {"vision": vision_flops(vision) * shapes.num_images}
    if vision.frames > 1:
        tower["temporal"] = temporal_flops(vision) * shapes.num_images
    if isinstance(run.text, LanguageModelConfig):
        flops = bridge_flops(run.text, vision)
        return {**tower, "bridge": sum(flops.values()) * shapes.num_images,
                **language_flops(run.text, shapes, vision, executed=executed)}
    d, text, streams, queries = run.transformer.width, run.transformer, shapes.num_streams, shapes.num_queries
    image_tokens = vision.tokens[-1]
    stream_rows, image_rows = streams * shapes.text_tokens, shapes.num_images * image_tokens
    self_pairs, query_pairs, looking_rows = (
        (shapes.view_self_pairs, shapes.view_query_pairs, shapes.view_image_rows) if executed
        else (shapes.self_pairs, shapes.query_pairs, shapes.text_tokens))
    stream_layer = 24 * d * d * stream_rows + 4 * d * streams * self_pairs
    image_attention = 4 * d * d * (stream_rows + image_rows) + 4 * d * streams * looking_rows * image_tokens
    # A query reads the rows of all streams; without queries the layer is skipped, keys and values too.
    reconstructor_layer = 20 * d * d * queries + 4 * d * d * stream_rows * (queries > 0) + 4 * d * streams * query_pairs
    return {
        **tower,
        "bottom": text.bottom_layers * stream_layer,
        "fusion": text.fusion_layers * (stream_layer + image_attention),
        "reconstructor": (text.reconstructor_bottom_layers + text.reconstructor_fusion_layers) * reconstructor_layer,
        "head": 2 * d * (d + text.vocab_size) * shapes.num_targets,
        "projections": 2 * vision.width * d * image_rows + 2 * d * d * (stream_rows + queries),
    }


def vision_flops(vision: VisionShape) -> float:
    """Return the forward FLOPs of the tower for one image, or all frames of a clip: patches, then blocks."""
    return vision.convolutions or patch_flops(vision) + sum(block_flops(vision))


def patch_flops(vision: VisionShape) -> float:
    """Return the forward FLOPs of the tower's entry for one image, or all frames of a clip."""
    return vision.frames * 6 * vision.patch_size ** 2 * vision.width * (vision.image_tokens - vision.prefix_tokens)


def block_flops(vision: VisionShape) -> list[float]:
    """Return the forward FLOPs of each block for one image, or all frames of a clip. Matching and merging do not count."""
    return [vision.frames * (2 * vision.block_weights * tokens + 4 * vision.width * tokens ** 2) for tokens in vision.tokens[:-1]]


def temporal_flops(vision: VisionShape) -> float:
    """Return the forward FLOPs of the attention over the frames of one clip, in all blocks: queries and keys, then both products, at each place."""
    d, width, frames = vision.width, vision.temporal_width, vision.frames
    return vision.layers_run * vision.image_tokens * (4 * d * width * frames + 2 * (width + d) * frames ** 2)


def bridge_flops(config: LanguageModelConfig, vision: VisionShape) -> dict[str, float]:
    """Return the forward FLOPs of each layer of the bridge for one image. Matching and merging, 2 % of it, do not count."""
    d, tokens = config.bridge.width, tokens_along(config.bridge, image_tokens=vision.image_tokens, prefix_tokens=vision.prefix_tokens)
    features = vision.width * build_reducer(config.bridge.reducer, prefix_tokens=vision.prefix_tokens, seed=0).width_factor
    flops: dict[str, float] = {"bridge_entry": 2 * features * d * tokens[0]}
    for i, (before, after) in enumerate(pairwise(tokens)):
        flops |= {f"bridge_{i}_attention": 8 * d * d * before + 4 * d * before ** 2, f"bridge_{i}_mlp": 16 * d * d * after}
    return flops | {"bridge_exit": 2 * d * language_shape(config).width * tokens[-1]}


def language_flops(config: LanguageModelConfig, shapes: BatchShapes, vision: VisionShape, *, executed: bool = False) -> dict[str, float]:
    """Return the forward FLOPs of the frozen language model: its layers over each caption behind its picture's rows, and its head."""
    model = language_shape(config)
    prefix = tokens_along(config.bridge, image_tokens=vision.image_tokens, prefix_tokens=vision.prefix_tokens)[-1]
    rows = shapes.num_captions * prefix + shapes.text_tokens
    pairs = shapes.num_captions * prefix ** 2 + 2 * prefix * shapes.text_tokens + shapes.self_pairs
    if executed:  # right padding runs along
        longest = math.isqrt(shapes.view_self_pairs // shapes.num_captions)
        rows, pairs = shapes.num_captions * (prefix + longest), shapes.num_captions * (prefix + longest) ** 2
    return {"language_model": 2 * model.layer_weights * rows + 4 * model.attention_width * model.layers * pairs,
            "head": 2 * model.head_weights * shapes.num_targets}


def training_flops(run: Run, forward: Mapping[str, float]) -> float:
    """Return the model FLOPs of forward and backward: three times the forward, a frozen tower once, a frozen language model twice.

    Gradients go through the language model, and none to its weights; so they do through a frozen tower that sees clips, whose temporal attention
    trains. What is computed twice to save memory (recompute, the logits) is not counted: utilisation is about useful work.
    """
    passes = {"vision": 3 if run.vision.trainable else 2 if run.vision.frames > 1 else 1}
    if isinstance(run.text, LanguageModelConfig):
        passes |= {"language_model": 2, "head": 2}
    return sum(flops * passes.get(part, 3) for part, flops in forward.items())
