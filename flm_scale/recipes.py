"""Named Runs. Each docstring says: the command, what it needs, what to expect. No torch here."""

from collections.abc import Callable

from flm_scale.config import (
    ArConfig,
    BatchConfig,
    DataConfig,
    FlmConfig,
    LogConfig,
    MlmConfig,
    OptimConfig,
    ParallelConfig,
    PrefixLmConfig,
    Run,
    SmallVisionConfig,
    TextConfig,
)


def demo() -> Run:
    """FLM on easy-vqa's pictures and captions, small enough for a laptop.

    Command: make pretrain.   Needs: 2 CPU cores, minutes.
    """
    return Run(
        name="demo", steps=300, objective=FlmConfig(corruption_rate=0.3),
        vision=SmallVisionConfig(image_size=64, patch_size=8, width=128, layers=4, heads=4, output="final"),
        text=TextConfig(width=128, heads=4, bottom_layers=1, fusion_layers=2, reconstructor_bottom_layers=1, reconstructor_fusion_layers=2,
                        vocab_size=256, max_length=24),
        batch=BatchConfig(micro_batches=2, text_tokens=512, captions=64, images=64),
        optim=OptimConfig(lr=1e-3, warmup_steps=30, schedule="cosine"),
        parallel=ParallelConfig(engine="deepspeed", zero=1),
        log=LogConfig(validate_every_steps=50),
    )


def demo_mlm() -> Run:
    """The demo with masked language modelling at 40 %."""
    return demo().replace(name="demo_mlm", objective=MlmConfig(mask_rate=0.4))


def demo_ar() -> Run:
    """The demo with the forward stream alone."""
    return demo().replace(name="demo_ar", objective=ArConfig())


def demo_prefix_lm() -> Run:
    """The demo with PrefixLM."""
    return demo().replace(name="demo_prefix_lm", objective=PrefixLmConfig())


def debug() -> Run:
    """A model of a few thousand weights that trains in seconds, for tests and for stepping through.

    Command: flm train debug --data.path data/demo
    """
    return Run(
        name="debug", steps=10, objective=FlmConfig(corruption_rate=0.3),
        vision=SmallVisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, output="penultimate"),
        text=TextConfig(width=32, heads=4, bottom_layers=1, fusion_layers=2, reconstructor_bottom_layers=1, reconstructor_fusion_layers=1,
                        vocab_size=256, max_length=16),
        batch=BatchConfig(micro_batches=4, text_tokens=64, captions=8, images=8),
        optim=OptimConfig(lr=1e-2, warmup_steps=2), data=DataConfig(workers=0),
    )


RECIPES: dict[str, Callable[[], Run]] = {recipe.__name__: recipe for recipe in (demo, demo_mlm, demo_ar, demo_prefix_lm, debug)}
