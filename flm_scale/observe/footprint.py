"""What a micro-batch leaves behind in each layer, in bytes: kept for the backward pass, handed on, summed over the tensor group.

Counted from sizes, tensor by tensor, for attention kernels that keep queries, keys, values and output but no weights; a test compares
with what autograd keeps on the CPU. Not counted: statistics of norms, integers, and what a kernel allocates while it runs.
"""

from typing import NamedTuple

from flm_scale.config import Run
from flm_scale.model.parts import TARGETS_PER_CHUNK
from flm_scale.observe.cost import BatchShapes, VisionShape


class Footprint(NamedTuple):
    """One layer's, in bytes."""

    saved: float
    """Kept for the backward pass. Rows that come in count here, not where they were made."""
    leaving: float
    """Rows handed to the next layer."""
    reduced: float
    """Summed over the tensor group, forward and backward."""


def footprints(run: Run, shapes: BatchShapes, vision: VisionShape, *, longest: int) -> dict[str, Footprint]:
    """Return the footprint of each layer of the list in one process, by name. longest: L, of the captions that `shapes` tells of."""
    text, pieces, element = run.transformer, run.parallel.tensor, 2 if run.precision == "bf16" else 4
    d, streams, targets = text.width, shapes.num_streams, shapes.num_targets
    stream_rows, image_rows = streams * shapes.text_tokens, shapes.num_images * vision.image_tokens
    all_rows = stream_rows + shapes.num_queries + image_rows
    # Rows of padded views: C * L of each stream, and C * Lq.
    view_rows, view_queries = streams * shapes.view_self_pairs // longest, shapes.view_query_pairs // longest
    has_queries = shapes.num_queries > 0
    pre = text.norm == "pre"

    def layer(whole: float, split: float = 0.0, *, leaving: float = all_rows * d, reduced: float = 0.0) -> Footprint:
        """Numbers kept by every process, and those split over the tensor group."""
        return Footprint(element * (whole + split / pieces), element * leaving, element * reduced)

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

    share = pieces if run.parallel.vision == "shard_batch" else 1
    frames, one_each = vision.frames, image_rows / share
    tower_rows, pixels = frames * one_each, frames * 3 * vision.image_size ** 2 * shapes.num_images / share
    width, trains = vision.width, run.vision.trainable
    # Two matrices of an MLP of m units hold 2 * width * m numbers, and m is kept before and behind the activation.
    hidden = (vision.block_weights - 4 * width ** 2) / (2 * width)
    block = trains * (width * 9 + 2 * hidden)
    if frames > 1:  # a frozen tower's matrices keep no input; over frames: rows in, rows by place, their mixture, queries and keys
        block = width * 9 + 2 * hidden - (not trains) * (2 * width + hidden) + 3 * width + 2 * vision.temporal_width
    shares = share > 1  # then images are gathered, and gradients of the tower's matrices summed
    found = {"vision_entry": layer(trains * (pixels + tower_rows * width), leaving=tower_rows * width,
                                   reduced=shares * trains * width * (3 * vision.patch_size ** 2 + vision.image_tokens))}
    found |= {f"vision_{i}": layer(tower_rows * block, leaving=(one_each if i + 1 == vision.layers_run else tower_rows) * width,
                               reduced=shares * (trains * vision.block_weights + 2 * width * vision.temporal_width))
              for i in range(vision.layers_run)}
    found["vision_exit"] = layer((1 + (trains or frames > 1)) * one_each * width, leaving=image_rows * d, reduced=shares * d * (image_rows + width))
    found["text_entry"] = layer(0 if pre else d * (shapes.text_tokens + shapes.num_queries), reduced=d * shapes.text_tokens)
    stages = (("bottom", text.bottom_layers, text.reconstructor_bottom_layers), ("fusion", text.fusion_layers, text.reconstructor_fusion_layers))
    for stage, depth, reconstructor_depth in stages:
        if stage == "fusion":
            found["fusion_entry"] = layer(d * (stream_rows + shapes.num_queries))
        for i in range(depth):
            found[f"{stage}_{i}"] = text_layer(fuses=stage == "fusion", reconstructs=i >= depth - reconstructor_depth)
    # The decoder keeps the last chunk's logits, in float32.
    head = layer((4 + pre) * d * targets, leaving=0.0, reduced=d * targets)
    return found | {"head": head._replace(saved=head.saved + 4 * min(targets, TARGETS_PER_CHUNK) * text.vocab_size / pieces)}
