"""What a micro-batch leaves behind in each layer, in bytes: kept for the backward pass, handed on, summed over the tensor group.

Counted from sizes, tensor by tensor, for attention kernels that keep queries, keys, values and output but no weights; a test compares
with what autograd keeps on the CPU. Not counted: statistics of norms, integers, and what a kernel allocates while it runs.
"""

import math
from itertools import pairwise
from typing import NamedTuple

from flm_scale.config import Run
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.model.bridge import tokens_along
from flm_scale.model.frozen_lm import dtype_of, language_shape
from flm_scale.model.parts import TARGETS_PER_CHUNK
from flm_scale.model.reducers import build_reducer
from flm_scale.observe.cost import BatchShapes, VisionShape
from flm_scale.observe.memory import element_bytes


class Footprint(NamedTuple):
    """One layer's, in bytes."""

    saved: float
    """Kept for the backward pass. Rows that come in count here, not where they were made."""
    leaving: float
    """Rows handed to the next layer."""
    reduced: float
    """Summed over the tensor group, forward and backward."""
    working: float
    """Beside all that, while it runs: gradients about as large as what it kept, or, in a frozen tower, what it would have kept."""


def footprints(run: Run, shapes: BatchShapes, vision: VisionShape, *, longest: int) -> dict[str, Footprint]:
    """Return the footprint of each layer of the list in one process, by name. longest: L, of the captions that `shapes` tells of."""
    tower = tower_footprints(run, shapes, vision)
    if isinstance(run.text, LanguageModelConfig):
        return tower | bridge_footprints(run, run.text, shapes, vision) | {"head": language_footprint(run, run.text, shapes, vision)}
    return tower | text_footprints(run, shapes, vision, longest=longest)


def tower_footprints(run: Run, shapes: BatchShapes, vision: VisionShape) -> dict[str, Footprint]:
    """Return those of the vision tower, without its exit. One that is frozen keeps nothing, but for clips."""
    element, share = element_bytes(run.precision), run.parallel.tensor if run.parallel.vision == "shard_batch" else 1
    images, width, trains, frames = shapes.num_images / share, vision.width, run.vision.trainable, vision.frames
    # Two matrices of an MLP of m units hold 2 * width * m numbers, and m is kept before and behind the activation.
    hidden = (vision.block_weights - 4 * width ** 2) / (2 * width)
    block = width * 9 + 2 * hidden
    if frames > 1:  # rows in, rows by place, their mixture, queries and keys; a frozen tower's matrices keep no input
        block += 3 * width + 2 * vision.temporal_width - (not trains) * (2 * width + hidden)
    shares = share > 1  # then images are gathered, and gradients of the tower's matrices summed

    def layer(leaving: int, saved: float, reduced: float, *, keeps: bool) -> Footprint:
        """leaving: rows of an image.   saved: numbers of an image."""
        kept = element * images * saved
        return Footprint(keeps * kept, element * images * leaving * width, element * shares * reduced, kept)

    pixels, rows, patch = 3 * vision.image_size ** 2, frames * vision.image_tokens, 3 * vision.patch_size ** 2
    found = {"vision_entry": layer(rows, frames * pixels + rows * width, trains * width * (patch + vision.image_tokens), keeps=trains)}
    reduced = trains * vision.block_weights + 2 * width * vision.temporal_width
    for i, (tokens, weights) in enumerate(zip(vision.tokens[:-1], merge_weights(vision)[:-1], strict=True)):
        leaving = tokens if i + 1 == vision.layers_run else frames * tokens  # behind the last block a clip is an image
        found[f"vision_{i}"] = layer(leaving, frames * tokens * block + weights, reduced, keeps=trains or frames > 1)
    return found


def merge_weights(vision: VisionShape) -> list[int]:
    """Return the weights of the product that merges an image's rows, in front of each block and of the exit; 0 where none merge."""
    return [after * before * (after < before) for before, after in pairwise((vision.tokens[0], *vision.tokens))]


def text_footprints(run: Run, shapes: BatchShapes, vision: VisionShape, *, longest: int) -> dict[str, Footprint]:
    """Return those of the tower's exit and of the text side."""
    text, pieces, element = run.transformer, run.parallel.tensor, element_bytes(run.precision)
    d, streams, targets = text.width, shapes.num_streams, shapes.num_targets
    tokens = vision.tokens
    stream_rows, image_rows = streams * shapes.text_tokens, shapes.num_images * tokens[-1]
    all_rows = stream_rows + shapes.num_queries + image_rows
    # Rows of padded views: C * L of each stream, and C * Lq.
    view_rows, view_queries = streams * shapes.view_self_pairs // longest, shapes.view_query_pairs // longest
    has_queries = shapes.num_queries > 0
    pre = text.norm == "pre"

    def layer(whole: float, split: float = 0.0, *, leaving: float = all_rows * d, reduced: float = 0.0) -> Footprint:
        """Numbers kept by every process, and those split over the tensor group."""
        saved = element * (whole + split / pieces)
        return Footprint(saved, element * leaving, element * reduced, saved)

    def text_layer(*, fuses: bool, reconstructs: bool) -> Footprint:
        # Rows in, three more of that length between norms and sublayers; the view's q, k, v and output, the output packed again, the MLP twice.
        whole, split = d * (all_rows + 3 * stream_rows), d * (4 * view_rows + 9 * stream_rows)
        whole += streams * shapes.view_self_pairs  # who sees whom
        reduced = 4 * stream_rows
        if fuses:
            looking_rows = streams * shapes.view_image_rows
            whole, split = whole + 2 * d * stream_rows, split + d * (2 * looking_rows + 2 * image_rows + stream_rows)
            reduced += 2 * stream_rows + image_rows
        if reconstructs and has_queries:
            whole += d * ((1 + pre) * stream_rows + 3 * shapes.num_queries) + streams * shapes.view_query_pairs
            split += d * (2 * view_queries + 2 * view_rows + 9 * shapes.num_queries)
            reduced += 4 * shapes.num_queries + stream_rows
        return layer(whole, split, reduced=d * reduced)

    shares = run.parallel.vision == "shard_batch" and pieces > 1
    images = shapes.num_images / (pieces if shares else 1)
    trains, leaves = run.vision.trainable or vision.frames > 1, tokens[-1] * vision.width
    found = {"vision_exit": layer(images * (leaves + trains * (leaves + merge_weights(vision)[-1])), leaving=image_rows * d,
                                  reduced=shares * d * (image_rows + vision.width))}
    found["text_entry"] = layer(0 if pre else d * (shapes.text_tokens + shapes.num_queries), reduced=d * shapes.text_tokens)
    stages = (("bottom", text.bottom_layers, text.reconstructor_bottom_layers), ("fusion", text.fusion_layers, text.reconstructor_fusion_layers))
    for stage, depth, reconstructor_depth in stages:
        if stage == "fusion":
            found["fusion_entry"] = layer(d * (stream_rows + shapes.num_queries))
        for i in range(depth):
            found[f"{stage}_{i}"] = text_layer(fuses=stage == "fusion", reconstructs=i >= depth - reconstructor_depth)
    vocabulary = text.vocab_size / pieces
    head = layer((4 + pre) * d * targets, leaving=0.0, reduced=d * targets)
    # The decoder keeps the last chunk's logits, in float32.
    saved = head.saved + 4 * min(targets, TARGETS_PER_CHUNK) * vocabulary
    # While it runs: a chunk's logits and, in float32, the sum of the table's gradients and the chunk's.
    return found | {"head": head._replace(saved=saved, working=max(saved, 8 * TARGETS_PER_CHUNK * vocabulary + 8 * vocabulary * d))}


def bridge_footprints(run: Run, config: LanguageModelConfig, shapes: BatchShapes, vision: VisionShape) -> dict[str, Footprint]:
    """Return those of the bridge's entries. Every process of a tensor group holds all of it."""
    d, images, element = config.bridge.width, shapes.num_images, element_bytes(run.precision)
    tokens = tokens_along(config.bridge, image_tokens=vision.image_tokens, prefix_tokens=vision.prefix_tokens)
    factor = build_reducer(config.bridge.reducer, prefix_tokens=vision.prefix_tokens, seed=0).width_factor

    def layer(saved: float, *, leaving: float) -> Footprint:
        """Numbers of an image."""
        return Footprint(element * images * saved, element * images * leaving, 0.0, element * images * saved)

    found = {"bridge_entry": layer(vision.width * (vision.image_tokens + factor * tokens[0]) + d * tokens[0], leaving=d * tokens[0])}
    for i, (before, after) in enumerate(pairwise(tokens)):
        # Rows in, q, k, v and output, the sum in front of the norm; then the MLP twice, its rows, and, where rows merge, who goes where.
        found[f"bridge_{i}_attention"] = layer(6 * d * before, leaving=d * before)
        found[f"bridge_{i}_mlp"] = layer(10 * d * after + (before * after if after < before else 0), leaving=d * after)
    return found | {"bridge_exit": layer(d * tokens[-1], leaving=language_shape(config).width * tokens[-1])}


def language_footprint(run: Run, config: LanguageModelConfig, shapes: BatchShapes, vision: VisionShape) -> Footprint:
    """Return that of the frozen language model, which is one entry of the list and recomputes its own layers.

    Its linears do not learn, so they keep nothing: what is kept is what attention, activations and norms need for their own gradients.
    """
    model, element = language_shape(config), dtype_of(config, run.precision).itemsize
    prefix = tokens_along(config.bridge, image_tokens=vision.image_tokens, prefix_tokens=vision.prefix_tokens)[-1]
    rows = shapes.num_captions * (prefix + math.isqrt(shapes.view_self_pairs // shapes.num_captions))
    norms = rows * model.norm_width * (4 if model.norms_in_float32 else element)
    layer = norms + rows * model.kept_width * element
    # Only what comes in, and one layer at a time beside it.
    layers = model.layers * (rows * model.width * element if run.recompute else layer)
    # A chunk's logits and their gradients in float32, and every target's gradient, made with its loss.
    logits = 8 * min(shapes.num_targets, TARGETS_PER_CHUNK) * model.vocab_size
    return Footprint(layers + rows * model.width * element + shapes.num_targets * model.width * element, 0.0, 0.0,
                     max(layer * (1 + run.recompute), logits))
