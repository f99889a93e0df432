"""Named Runs. Each docstring says: the command, what it needs, what to expect. No torch here."""

from collections.abc import Callable
from pathlib import Path

from flm_scale.config import (
    ArConfig,
    AugmentConfig,
    BatchConfig,
    CaptioningConfig,
    DataConfig,
    FlmConfig,
    LogConfig,
    MlmConfig,
    OptimConfig,
    ParallelConfig,
    PrefixLmConfig,
    Run,
    TextConfig,
)
from flm_scale.config_lm import BridgeConfig, LanguageModelConfig, MergeConfig
from flm_scale.config_vision import OpenClipVisionConfig, SmallVisionConfig, TemporalConfig


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
    """A model of 112,000 weights that trains in seconds, for tests and for stepping through.

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


def simvlg_demo() -> Run:
    """SimVLG on the demo's pictures: a small tower and a bridge learn to speak through a frozen language model of 135 M weights.

    Command: python -m tools.demo_models models, then flm tokenizer encode data/demo --tokenizer models/smollm2, then flm train simvlg_demo; any other
    causal language model is named with --text.name.   Needs: 2 CPU cores.   Expect: CIDEr 150 on captions of concepts that it has not
    seen, 25 with another picture, 0 without one; with --precision bf16 in 6 minutes on a CPU with AMX (docs/benchmarks.md).
    """
    return Run(
        name="simvlg_demo", steps=200, objective=CaptioningConfig(),
        vision=SmallVisionConfig(image_size=64, patch_size=8, width=128, layers=4, heads=4, output="penultimate"),
        # On a CPU and at so few tokens plain attention is quicker than fused kernels, backward above all.
        text=LanguageModelConfig(name="models/smollm2", max_length=24, attention="eager", bridge=BridgeConfig(
            width=128, heads=4, layers=4, reducer=MergeConfig(merged=(12,)))),
        batch=BatchConfig(micro_batches=2, text_tokens=512, captions=32, images=32),
        optim=OptimConfig(lr=1e-3, warmup_steps=30, schedule="cosine"),
        parallel=ParallelConfig(engine="deepspeed", zero=1),
        log=LogConfig(validate_every_steps=50),
    )


def simvlg_video_demo() -> Run:
    """simvlg_demo on clips of eight frames whose captions say what moves where.

    Command: flm data demo data/clips --clips, then as of simvlg_demo, with data/clips.   Needs: 2 CPU cores, better a GPU.
    Expect: no score is claimed yet. The control, which sees the frame in the middle alone, is --vision.frames 1: guessing is right on 1 of 7 motions.
    """
    run = simvlg_demo()
    return run.replace(name="simvlg_video_demo", vision=run.vision.replace(frames=8, temporal=TemporalConfig(position=True)),
                       data=DataConfig(path=Path("data/clips")))


def simvlg_opt_2_7b() -> Run:
    """The published SimVLG: EVA's ViT-g/14 without its last block, a bridge from 257 rows to 29, OPT-2.7B; 88 M weights to train, 3.6 B frozen.

    Command: srun python -m flm_scale train simvlg_opt_2_7b, with --steps 250000 for the longer published run.
    Needs: LAION-115M and CCS-14M with synthetic captions and COCO under data/laion, data/ccs and data/coco, their captions encoded (flm tokenizer
    encode DATA --tokenizer models/opt-2.7b); facebook/opt-2.7b as safetensors with a tokenizer.json in models/opt-2.7b (docs/simvlg.md); a download
    of the tower's weights.   Expect: not trained here, so no score is claimed.
    As published, but for: bf16 instead of fp16; no dropout, in the bridge or in OPT; BOS is no target, and EOS, not a line break, ends a caption;
    captions are read as they are; the rate falls at every step, not at every 5,000th; the encoder starts from random unless
    --text.bridge.pretrained google-bert/bert-base-uncased is added. --text.bridge.reducer.weighted takes the mean of patches, our default elsewhere.
    Captions of 14 tokens with BOS and EOS are assumed. 64 micro-batches keep at most 64 GPUs busy.
    Estimated by `flm plan` at 35 % of 989 TFLOP/s (H100, H200), the quickest layout that fits; memory a GPU, time a step:
        8 x  80 GB: tensor 1, pipe 1, data 8, ZeRO 1: 12 GB, 0.60 s
        8 x 141 GB: tensor 1, pipe 1, data 8, ZeRO 1: 12 GB, 0.60 s
       64 x  80 GB: tensor 1, pipe 1, data 64, ZeRO 1: 12 GB, 0.08 s
    """
    return Run(
        name="simvlg_opt_2_7b", steps=150_000, precision="bf16", objective=CaptioningConfig(),
        vision=OpenClipVisionConfig(name="EVA01-g-14", pretrained="laion400m_s11b_b41k", image_size=224, trainable=False),
        text=LanguageModelConfig(name="models/opt-2.7b", max_length=32, bridge=BridgeConfig(reducer=MergeConfig(merged=(19,), weighted=False))),
        data=DataConfig(path=Path("data/laion"), also=(Path("data/ccs"), Path("data/coco")), weights=(15, 4, 1), captions_per_image=1, workers=8,
                        augment=AugmentConfig(crop_scale=(0.5, 1.0), flip=True)),
        batch=BatchConfig(micro_batches=64, text_tokens=350, captions=25, images=25),
        optim=OptimConfig(lr=1e-4, pretrained_lr_scale=1.0, beta2=0.999, weight_decay=0.05, clip_norm=0.0, schedule="cosine", final_lr_share=0.1,
                          warmup_steps=5000),
        parallel=ParallelConfig(engine="deepspeed", zero=1), log=LogConfig(validate_every_steps=1000, save_every_steps=1000))


def simvlg_7b() -> Run:
    """SimVLG into Vicuna-7B: 89 M weights to train, 7.7 B frozen.

    Command: srun python -m flm_scale train simvlg_7b.   Needs and deviations as of simvlg_opt_2_7b, but Vicuna-7B in models/vicuna-7b, and no LAION.
    Expect: not trained here, so no score is claimed. Steps, batch and mix (45 : 5) are those of the published code's short run: 160 pairs a step.
    8 micro-batches keep at most 8 GPUs busy; on more, raise --batch.micro-batches and --optim.lr.
    Estimated by `flm plan` at 35 % of 989 TFLOP/s (H100, H200), the quickest layout that fits; memory a GPU, time a step:
        8 x  80 GB: tensor 1, pipe 1, data 8, ZeRO 1: 23 GB, 0.10 s
        8 x 141 GB: tensor 1, pipe 1, data 8, ZeRO 1: 23 GB, 0.10 s
    """
    run = simvlg_opt_2_7b()
    return run.replace(
        name="simvlg_7b", steps=60_000, text=run.text.replace(name="models/vicuna-7b"),
        data=run.data.replace(path=Path("data/ccs"), also=(Path("data/coco"),), weights=(45, 5)),
        batch=BatchConfig(micro_batches=8, text_tokens=280, captions=20, images=20))


def flm_base() -> Run:
    """The published FLM: ViT-B/32 at 288 px, 6 + 6 layers, 344 M weights, the 4M mix.

    Command: srun python -m flm_scale train flm_base.   Needs: COCO, Visual Genome, Conceptual Captions and SBU under data/4m with a vocabulary of
    at most 50,265 (published: RoBERTa's BPE), and a download of OpenAI's CLIP weights.   Expect: not trained here, so no score is claimed.
    As published, but for what docs/decisions.md says: no dropout, bf16, no forced full stop; and the text side starts from random unless
    --text.pretrained FacebookAI/roberta-base is added, of which six layers are taken as published (docs/pretrained.md).
    The mix has 10.3 tokens a caption with BOS and EOS, so 704 tokens hold 64. 256 GPUs are more than 64 micro-batches keep busy.
    Estimated by `flm plan` at 35 % of 989 TFLOP/s (H100, H200), the quickest layout that fits; memory a GPU, time a step:
        8 x  80 GB: tensor 1, pipe 1, data 8, ZeRO 1: 7 GB, 0.11 s
        8 x 141 GB: tensor 1, pipe 1, data 8, ZeRO 1: 7 GB, 0.11 s
       64 x  80 GB: tensor 1, pipe 1, data 64, ZeRO 3: 8 GB, 0.02 s
       64 x 141 GB: tensor 1, pipe 1, data 64, ZeRO 3: 8 GB, 0.02 s
      256 x  80 GB: tensor 2, pipe 2, data 64, ZeRO 1: 3 GB, 0.02 s
      256 x 141 GB: tensor 2, pipe 2, data 64, ZeRO 1: 3 GB, 0.02 s
    """
    return Run(
        name="flm_base", steps=30_000, seed=2022, precision="bf16", objective=FlmConfig(corruption_rate=0.0),
        vision=OpenClipVisionConfig(name="ViT-B-32-quickgelu", pretrained="openai", image_size=288),
        text=TextConfig(norm="post"), data=DataConfig(path=Path("data/4m"), captions_per_image=1, workers=8),
        batch=BatchConfig(micro_batches=64, text_tokens=704, captions=64, images=64),
        optim=OptimConfig(lr=4e-4, pretrained_lr_scale=0.2, clip_norm=0.0, warmup_steps=1500),
        parallel=ParallelConfig(engine="deepspeed", zero=1), log=LogConfig(validate_every_steps=1000, save_every_steps=1000))


def mlm_base() -> Run:
    """The baseline of flm_base: masked language modelling at 40 %, 259 M weights.

    Command, data and rate as of flm_base, the same samples in the same order.
    Estimated by `flm plan` at 35 % of 989 TFLOP/s (H100, H200), the quickest layout that fits; memory a GPU, time a step:
        8 x  80 GB: tensor 1, pipe 1, data 8, ZeRO 1: 5 GB, 0.08 s
    """
    return flm_base().replace(name="mlm_base", objective=MlmConfig(mask_rate=0.4))


def ar_base() -> Run:
    """The baseline of flm_base: the forward stream alone, 259 M weights.

    Command, data and rate as of flm_base, the same samples in the same order.
    Estimated by `flm plan` at 35 % of 989 TFLOP/s (H100, H200), the quickest layout that fits; memory a GPU, time a step:
        8 x  80 GB: tensor 1, pipe 1, data 8, ZeRO 1: 6 GB, 0.09 s
    """
    return flm_base().replace(name="ar_base", objective=ArConfig())


def prefix_lm_base() -> Run:
    """The baseline of flm_base: PrefixLM, 259 M weights.

    Command, data and rate as of flm_base, the same samples in the same order.
    Estimated by `flm plan` at 35 % of 989 TFLOP/s (H100, H200), the quickest layout that fits; memory a GPU, time a step:
        8 x  80 GB: tensor 1, pipe 1, data 8, ZeRO 1: 5 GB, 0.08 s
    """
    return flm_base().replace(name="prefix_lm_base", objective=PrefixLmConfig())


def flm_1b() -> Run:
    """FLM with ViT-L/14, 1.05 B weights.

    Command: srun python -m flm_scale train flm_1b.   Needs: LAION-like shards under data/laion, and a download of the tower's weights.
    Expect: not trained here; rate and steps are starting points, not tuned. 24 tokens a caption are assumed.
    Estimated by `flm plan` at 35 % of 989 TFLOP/s (H100, H200), the quickest layout that fits; memory a GPU, time a step:
        8 x  80 GB: tensor 1, pipe 1, data 8, ZeRO 1: 33 GB, 4.01 s
        8 x 141 GB: tensor 1, pipe 1, data 8, ZeRO 1: 33 GB, 4.01 s
       64 x  80 GB: tensor 1, pipe 1, data 64, ZeRO 1: 31 GB, 0.53 s
       64 x 141 GB: tensor 1, pipe 1, data 64, ZeRO 1: 31 GB, 0.53 s
      256 x  80 GB: tensor 1, pipe 1, data 256, ZeRO 3: 28 GB, 0.15 s
      256 x 141 GB: tensor 1, pipe 1, data 256, ZeRO 3: 28 GB, 0.15 s
    """
    return Run(
        name="flm_1b", steps=100_000, precision="bf16", objective=FlmConfig(corruption_rate=0.3),
        vision=OpenClipVisionConfig(name="ViT-L-14", pretrained="datacomp_xl_s13b_b90k", image_size=224),
        text=TextConfig(width=1024, heads=16, bottom_layers=12, fusion_layers=12, reconstructor_bottom_layers=12, reconstructor_fusion_layers=12,
                        max_length=64),
        data=DataConfig(path=Path("data/laion"), workers=8), batch=BatchConfig(micro_batches=256, text_tokens=1536, captions=64, images=64),
        optim=OptimConfig(lr=2e-4, warmup_steps=5000, schedule="cosine"), parallel=ParallelConfig(engine="deepspeed", zero=1),
        log=LogConfig(validate_every_steps=1000, save_every_steps=1000))


def flm_3b() -> Run:
    """FLM with ViT-H/14 and a text side of 2.2 B weights, 2.84 B in all.

    Command, data and what to expect as of flm_1b.
    Estimated by `flm plan` at 35 % of 989 TFLOP/s (H100, H200), the quickest layout that fits; memory a GPU, time a step:
        8 x  80 GB: tensor 1, pipe 1, data 8, ZeRO 1: 47 GB, 9.87 s
        8 x 141 GB: tensor 1, pipe 1, data 8, ZeRO 1: 47 GB, 9.87 s
       64 x  80 GB: tensor 1, pipe 1, data 64, ZeRO 1: 43 GB, 1.32 s
       64 x 141 GB: tensor 1, pipe 1, data 64, ZeRO 1: 43 GB, 1.32 s
      256 x  80 GB: tensor 1, pipe 1, data 256, ZeRO 1: 43 GB, 0.40 s
      256 x 141 GB: tensor 1, pipe 1, data 256, ZeRO 1: 43 GB, 0.40 s
    """
    run = flm_1b()
    return run.replace(
        name="flm_3b", vision=OpenClipVisionConfig(name="ViT-H-14", pretrained="laion2b_s32b_b79k", image_size=224),
        text=run.text.replace(width=2048, heads=16, reconstructor_bottom_layers=6, reconstructor_fusion_layers=6),
        batch=BatchConfig(micro_batches=512, text_tokens=768, captions=32, images=32), optim=run.optim.replace(lr=1.5e-4))


def flm_10b() -> Run:
    """FLM with ViT-bigG/14 and a text side of 8.2 B weights, 9.99 B in all.

    Data and what to expect as of flm_1b. Command: srun python -m flm_scale train flm_10b, which fits on 64 GPUs or more; on 8 of 80 GB with
    --parallel.pipe 8 --parallel.zero 1.
    Estimated by `flm plan` at 35 % of 989 TFLOP/s (H100, H200), the quickest layout that fits; memory a GPU, time a step:
        8 x  80 GB: tensor 1, pipe 8, data 1, ZeRO 1: 67 GB, 32.09 s
        8 x 141 GB: tensor 1, pipe 2, data 4, ZeRO 1: 113 GB, 30.72 s
       64 x  80 GB: tensor 1, pipe 4, data 16, ZeRO 1: 61 GB, 4.44 s
       64 x 141 GB: tensor 1, pipe 1, data 64, ZeRO 1: 125 GB, 4.10 s
      256 x  80 GB: tensor 2, pipe 1, data 128, ZeRO 1: 71 GB, 1.40 s
      256 x 141 GB: tensor 1, pipe 1, data 256, ZeRO 1: 123 GB, 1.27 s
    """
    run = flm_1b()
    return run.replace(
        name="flm_10b", vision=OpenClipVisionConfig(name="ViT-bigG-14", pretrained="laion2b_s39b_b160k", image_size=224),
        text=run.text.replace(width=3072, heads=24, bottom_layers=16, fusion_layers=16, reconstructor_bottom_layers=16,
                              reconstructor_fusion_layers=16),
        batch=BatchConfig(micro_batches=512, text_tokens=768, captions=32, images=32), optim=run.optim.replace(lr=1e-4),
        parallel=run.parallel.replace(zero=2))


RECIPES: dict[str, Callable[[], Run]] = {recipe.__name__: recipe for recipe in (
    demo, demo_mlm, demo_ar, demo_prefix_lm, debug, simvlg_demo, simvlg_video_demo, simvlg_opt_2_7b, simvlg_7b, flm_base, mlm_base, ar_base,
    prefix_lm_base, flm_1b, flm_3b, flm_10b)}
