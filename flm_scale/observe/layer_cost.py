"""The FLOPs of observe/cost.py layer by layer, for a typical micro-batch: what pipeline stages are cut by, and what `flm plan` adds up.

Names are those of the model's flat list (model/assemble.py). Sizes alone, no model and no data.
"""

from dataclasses import replace

import numpy as np

from flm_scale.batch import Example
from flm_scale.config import Run, TextConfig
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.objectives.objective import build_objective
from flm_scale.observe.cost import BatchShapes, VisionShape, block_flops, bridge_flops, forward_flops, language_flops, patch_flops
from flm_scale.parallel.stages import cut


def typical_views(run: Run) -> list[Example]:
    """Return the views of a caption of the length that lets a micro-batch fill its token and caption budgets at once."""
    length = max(3, min(run.text.max_length, run.batch.text_tokens // run.batch.captions))
    return build_objective(run.objective, mask_id=0).corrupt(np.arange(length, dtype=np.int32), np.random.default_rng(0))


def typical_pairs(run: Run) -> int:
    """Return the captions of a micro-batch, an objective's several views of one counted once."""
    views = typical_views(run)
    return min(run.batch.text_tokens // sum(view.length for view in views), run.batch.captions // len(views))


def expected_shapes(run: Run) -> BatchShapes:
    """Return the sizes of a micro-batch that its budgets allow: captions of equal length, spread evenly over the images.

    The padded views have room for captions of text.max_length among them, so that memory is not underestimated.
    """
    views, pairs, longest = typical_views(run), typical_pairs(run), run.text.max_length
    tokens, queries = pairs * sum(view.length for view in views), pairs * sum(len(view.queries) for view in views)
    captions, images = pairs * len(views), min(pairs, run.batch.images)
    captions_per_image = -(-captions // images)
    return BatchShapes(
        num_images=images, num_captions=captions, num_streams=len(views[0].first), text_tokens=tokens, num_queries=queries,
        num_targets=pairs * sum(len(view.target_rows) for view in views),
        self_pairs=pairs * sum(view.length ** 2 for view in views), query_pairs=pairs * sum(len(view.queries) * view.length for view in views),
        view_self_pairs=captions * longest ** 2, view_query_pairs=captions * (longest - 2) * longest if queries else 0,
        view_image_rows=images * min(tokens, captions_per_image * longest))


def layer_flops(run: Run, shapes: BatchShapes, vision: VisionShape) -> dict[str, float]:
    """Return the forward FLOPs of each layer of the list, in its order; they add up to those of forward_flops, to the last digit."""
    parts = forward_flops(run, shapes, vision)
    temporal = parts.get("temporal", 0.0) / max(vision.layers_run, 1)
    tower = {"vision_entry": patch_flops(vision) * shapes.num_images,
             **{f"vision_{i}": flops * shapes.num_images + temporal for i, flops in enumerate(block_flops(vision))}}
    if isinstance(run.text, LanguageModelConfig):
        bridge = {name: flops * shapes.num_images for name, flops in bridge_flops(run.text, vision).items()}
        return tower | bridge | {"head": parts["language_model"] + parts["head"]}
    text = run.transformer
    fusion_entry = forward_flops(run, replace(shapes, num_images=0), vision)["projections"]
    num_reconstructors = text.reconstructor_bottom_layers + text.reconstructor_fusion_layers
    flops = tower | {"vision_exit": parts["projections"] - fusion_entry, "text_entry": 0.0}
    stages = (("bottom", text.bottom_layers, text.reconstructor_bottom_layers), ("fusion", text.fusion_layers, text.reconstructor_fusion_layers))
    for stage, depth, reconstructor_depth in stages:
        if stage == "fusion":
            flops["fusion_entry"] = fusion_entry
        for i in range(depth):
            reconstructs = i >= depth - reconstructor_depth
            flops[f"{stage}_{i}"] = parts[stage] / depth + (parts["reconstructor"] / num_reconstructors if reconstructs else 0.0)
    return flops | {"head": parts["head"]}


def rank_flops(run: Run, shapes: BatchShapes, vision: VisionShape) -> dict[str, float]:
    """Return the forward FLOPs of each layer that one process computes: its share of what tensor parallelism splits, and all of the rest."""
    def share(name: str, flops: float) -> float:
        if run.parallel.tensor == 1 or name == "fusion_entry" or (name.startswith("vision_") and run.parallel.vision == "replicated"):
            return flops
        whole = 2 * run.transformer.width ** 2 * shapes.num_targets if name == "head" else 0
        return whole + (flops - whole) / run.parallel.tensor

    return {name: share(name, flops) for name, flops in layer_flops(run, shapes, vision).items()}


def stage_costs(run: Run, vision: VisionShape) -> dict[str, float]:
    """Return what each layer of the list costs one process in a typical micro-batch: FLOPs forward, backward and, if so, again.

    A frozen language model's backward pass costs as much as its forward pass, because its weights take no gradient; what it computes again
    is its layers, and not its head. Blocks that hand gradients on to others alone, a frozen tower's on clips, count as if they trained.
    """
    shapes = expected_shapes(run)
    costs = {name: flops * ((3 if trains(run, name) else 1) + is_recomputed(run, name)) for name, flops in rank_flops(run, shapes, vision).items()}
    if isinstance(run.text, LanguageModelConfig):
        flops = language_flops(run.text, shapes, vision)
        costs["head"] = 2 * sum(flops.values()) + run.recompute * flops["language_model"]
    return costs


def stage_bounds(run: Run, vision: VisionShape) -> list[int]:
    """Return the pipeline stages of a run: the place in the list of each stage's first layer, and the list's length behind them.

    Cut by cost. A frozen tower stays whole and with the projection behind it: every stage needs a weight to train and rows with a gradient
    to hand on, or DeepSpeed waits for ever. Raises ConfigError when there are more stages than layers.
    """
    costs = stage_costs(run, vision)
    inseparable = sum(not trains(run, name) for name in costs)
    first, rest = list(costs.values())[: inseparable + 1], list(costs.values())[inseparable + 1:]
    return [0, *(place + inseparable for place in cut([sum(first), *rest], run.parallel.pipe)[1:])]


def trains(run: Run, name: str) -> bool:
    """Return whether a layer has a backward pass: all have but those of a frozen tower. Its projection trains, and so do its blocks on clips."""
    return run.vision.trainable or not name.startswith("vision_") or name == "vision_exit" or (run.vision.frames > 1 and name != "vision_entry")


def is_recomputed(run: Run, name: str) -> bool:
    """Return whether a layer runs again in the backward pass: not where rows come in without a gradient, nor the head (assemble.run_layers)."""
    behind_tower = "vision_exit" if isinstance(run.text, TextConfig) else "bridge_entry"
    first_to_train = "vision_entry" if run.vision.trainable else "vision_0" if run.vision.frames > 1 else behind_tower
    return run.recompute and trains(run, name) and name not in {first_to_train, "head"}
