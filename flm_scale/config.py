"""Run and its sections: everything that decides what a training run computes, as frozen pydantic models.

A recipe (recipes.py) builds a Run, the command line overrides single values, `run.json` keeps the result. Unknown keys
and impossible values raise ConfigError with the value and the remedy. Nothing here imports torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from flm_scale.config_lm import LanguageModelConfig
from flm_scale.config_vision import ConvNetConfig, OpenClipVisionConfig, SmallVisionConfig, Vision
from flm_scale.errors import ConfigError
from flm_scale.section import Section


class FlmConfig(Section):
    """Free Language Modeling: every content token is predicted, each with its own hidden span (docs/flm.md, Spans)."""

    kind: Literal["flm"] = "flm"
    corruption_rate: float = Field(0.3, ge=0, le=1)
    """Share of a caption's tokens hidden from each target, the target included; 0 hides the target alone."""
    draw_rate: bool = False
    """Draw the rate once per caption from U(0, corruption_rate) instead of using it as it is."""
    forward_weight: float = Field(1.0, ge=0)
    """Weight of the forward stream's own loss, against 1 for the reconstruction."""
    reverse_weight: float = Field(1.0, ge=0)
    """Weight of the reverse stream's own loss, against 1 for the reconstruction."""


class MlmConfig(Section):
    """Masked language modelling, the baseline that ties the prediction rate to the mask rate."""

    kind: Literal["mlm"] = "mlm"
    mask_rate: float = Field(0.4, gt=0, le=1)
    """Share of content tokens that are replaced by the mask token: exactly max(1, round(rate * n)) of n."""
    predicted_share: float = Field(1.0, gt=0, le=1)
    """Share of the hidden tokens that carry loss; below 1 it lowers the prediction rate at the same corruption."""
    passes: int = Field(1, ge=1)
    """Split the hidden tokens over this many passes: same predictions, a lower corruption in each, more compute."""


class ArConfig(Section):
    """Autoregressive language modelling: the forward stream alone."""

    kind: Literal["ar"] = "ar"


class PrefixLmConfig(Section):
    """A prefix that sees itself whole, then autoregressive targets."""

    kind: Literal["prefix_lm"] = "prefix_lm"
    target_rate: float = Field(0.5, gt=0, le=1)
    """Share of content tokens, at the end of the caption, that are predicted."""
    draw_rate: bool = False
    """Draw the rate once per caption from U(0, target_rate)."""


class CaptioningConfig(Section):
    """What a frozen language model says of a picture: the caption's tokens, from the left (SimVLG's one loss)."""

    kind: Literal["captioning"] = "captioning"
    prompt: str = ""
    """Text between the picture and every caption, which is read and not predicted. The two are cut into tokens apart: end it with a blank."""


class TextConfig(Section):
    """The text transformer and the reconstructor beside it."""

    kind: Literal["transformer"] = "transformer"
    width: int = Field(768, ge=1)
    heads: int = Field(12, ge=1)
    bottom_layers: int = Field(6, ge=0)
    """Layers that read text alone."""
    fusion_layers: int = Field(6, ge=1)
    """Layers that also look at the image."""
    reconstructor_bottom_layers: int = Field(6, ge=0)
    """Reconstructor layers beside the last of the bottom layers (FLM only)."""
    reconstructor_fusion_layers: int = Field(6, ge=0)
    """Reconstructor layers beside the last of the fusion layers (FLM only)."""
    vocab_size: int = Field(50265, ge=6)
    """Rows of the embedding table: at least the tokenizer's size."""
    max_length: int = Field(50, ge=3)
    """Longest caption in tokens, with BOS and EOS; longer ones are cut and keep their EOS."""
    tied: bool = False
    """The decoder's weights are the embedding table's; the published FLM has them apart."""
    norm: Literal["pre", "post"] = "pre"
    """Where layer normalisation sits; 'post' is BERT's and the published FLM's order."""
    pretrained: str = ""
    """Folder, or name on the Hugging Face hub (downloaded once), of a RoBERTa or BERT that embeddings, bottom layers and head start from."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.width % self.heads:
            raise ConfigError(f"text.width ({self.width}) must be a multiple of text.heads ({self.heads}); change one of them")
        for stage in ("bottom", "fusion"):
            layers, beside = getattr(self, f"{stage}_layers"), getattr(self, f"reconstructor_{stage}_layers")
            if beside > layers:
                raise ConfigError(f"text.reconstructor_{stage}_layers ({beside}) must not exceed text.{stage}_layers ({layers})")
        return self


class AugmentConfig(Section):
    """Random changes of training pictures, drawn anew each epoch and the same on any layout; all off by default. Evaluation has none."""

    crop_scale: tuple[float, float] = Field((1.0, 1.0), strict=False)  # JSON has lists alone
    """Share of the picture's area that is cut out at random, from and to; 1 to 1 takes the square in the middle, as evaluation does."""
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), strict=False)
    """Width to height of what is cut out, from and to, before it is made square."""
    flip: bool = False
    """Mirror half of the pictures, drawn anew each epoch; captions that say left or right become wrong."""
    randaugment_layers: int = Field(0, ge=0)
    """Changes of colour or geometry in a row, each drawn from fourteen (RandAugment)."""
    randaugment_magnitude: int = Field(9, ge=0, le=30)
    """How strong they are, from 0 to 30."""

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"data.augment.crop_scale ({self.crop_scale}) must be two shares of the area, the smaller first; try 0.5 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ConfigError(f"data.augment.crop_ratio ({self.crop_ratio}) must be two ratios above 0, the smaller first; try 0.75 1.33")
        return self


def _path_or_url(place: str | Path) -> str | Path:
    return Path(place) if isinstance(place, str) and "://" not in place else place


Location = Annotated[str | Path, AfterValidator(_path_or_url)]
"""A folder, or the URL of one: text, because a Path would swallow one of its slashes."""


class DataConfig(Section):
    """Which prepared datasets are read, and by how many processes."""

    path: Location = Path("data/demo")
    """Folder written by `flm data demo` (dataset.json, tokenizer.model, shards), or the URL of one, such as s3://bucket/demo."""
    also: tuple[Location, ...] = Field((), strict=False)  # JSON has lists alone
    """More datasets to train on, with the same tokenizer; validation and evaluation read the first one."""
    weights: tuple[float, ...] = Field((), strict=False)
    """Share of the micro-batches that come from `path` and from each of `also`, in any unit; none given shows every image equally often."""
    manifest_hash: str = ""
    """When set, the folder must have this root hash; run.json always records it."""
    also_hashes: tuple[str, ...] = Field((), strict=False)
    """When set, the same for each of `also`."""
    tokenizer_hash: str = ""
    """When set, the folder's tokenizer must have this fingerprint; run.json always records it."""
    workers: int = Field(1, ge=0)
    """Decoding processes a model replica; 0 decodes in its first training process. The batches are the same for any number."""
    feeder: Literal["local", "ray"] = "local"
    """Who makes the micro-batches of training: `workers`, or a pool of Ray actors, and `workers` once that is gone. The batches are the same."""
    feeders: int = Field(4, ge=1)
    """Actors a model replica, a CPU each."""
    feeder_labels: tuple[Annotated[str, Field(pattern=r"^[^=]+=.+$")], ...] = Field((), strict=False)
    """NAME=VALUE that a feeder's node must have, as in Ray's label selectors: role=data, or role=!gpu to stay off the GPU hosts."""
    ray_address: str = ""
    """Of a running Ray cluster; empty takes RAY_ADDRESS or the cluster that the run is a job of, or else starts Ray on this machine."""
    captions_per_image: int = Field(8, ge=1)
    """At most this many captions of one image go together; which ones changes with the epoch."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Stop when more than this share of the images read cannot be decoded."""
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _lists_match(self) -> Self:
        if self.weights and (len(self.weights) != 1 + len(self.also) or min(self.weights) <= 0):
            raise ConfigError(f"data.weights ({self.weights}) must be one positive number for data.path and one for each of the {len(self.also)} in "
                              "data.also; leave it out to show every image equally often")
        if self.also_hashes and len(self.also_hashes) != len(self.also):
            raise ConfigError(f"data.also_hashes ({len(self.also_hashes)}) must be one for each of the {len(self.also)} in data.also; "
                              "leave it out to expect nothing")
        return self


class BatchConfig(Section):
    """One optimizer step: `micro_batches` packed micro-batches, whatever the number of processes."""

    micro_batches: int = Field(8, ge=1)
    """Micro-batches in a step, over all processes together."""
    text_tokens: int = Field(768, ge=3)
    """Text tokens that fit into a micro-batch, BOS and EOS counted."""
    captions: int = Field(64, ge=1)
    """Captions that fit into a micro-batch."""
    images: int = Field(64, ge=1)
    """Images that fit into a micro-batch."""


class OptimConfig(Section):
    """AdamW (SGD for tests), warm-up and decay; clipping by the global norm."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(4e-4, gt=0)
    """Peak learning rate of everything that starts from random."""
    pretrained_lr_scale: float = Field(0.2, ge=0)
    """Factor on `lr` for pretrained weights: one fifth, so that what starts from random learns five times as fast."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    """Applied to matrices only: never to norms, biases or embeddings."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final_lr_share: float = Field(0.0, ge=0, le=1)
    """Share of the peak rate that is left at the last step of a schedule that decays."""
    warmup_steps: int = Field(100, ge=0)


class ParallelConfig(Section):
    """Which engine trains, and how its state is sharded."""

    engine: Literal["local", "deepspeed"] = "local"
    """'local' is one process of plain PyTorch, the reference; 'deepspeed' runs over all processes of the launcher."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage under DeepSpeed."""
    tensor: int = Field(1, ge=1)
    """Processes that share the text layers' matrices, heads and vocabulary; keep it within a node."""
    pipe: int = Field(1, ge=1)
    """Pipeline stages that the layer list is cut into; needs ZeRO 0 or 1. Data-parallel size is world / (tensor * pipe)."""
    vision: Literal["replicated", "shard_batch"] = "replicated"
    """Under tensor parallelism: every process encodes all images, or each its share, and the image tokens are gathered."""
    template: str = ""
    """Name of a DeepSpeed template in ds_configs/; empty takes zeroN, or zero1-pipeline under a pipeline."""

    @property
    def in_stages(self) -> bool:
        """Whether DeepSpeed's pipeline engine runs it: every pipeline, and ZeRO 1 at one stage too."""
        return self.pipe > 1 or self.zero == 1

    @model_validator(mode="after")
    def _kinds_combine(self) -> Self:
        if self.engine == "local" and self.tensor * self.pipe > 1:
            raise ConfigError(f"parallel.tensor ({self.tensor}) and parallel.pipe ({self.pipe}) need parallel.engine deepspeed; "
                              "add --parallel.engine deepspeed")
        if self.pipe > 1 and self.zero > 1:
            raise ConfigError(f"parallel.zero ({self.zero}) does not go with parallel.pipe ({self.pipe}); use --parallel.zero 1")
        return self


class BadStepConfig(Section):
    """What happens to a step whose loss or gradient norm is not a number, or whose loss is a spike. Its update is never taken."""

    policy: Literal["stop", "skip", "roll_back"] = "stop"
    """End the run; go on with the next step; or take weights and moments of the last good checkpoint and go on with the next step, so that the
    samples between are passed over. Sample keys go to RUN/bad_steps.jsonl."""
    spike_factor: float = Field(0.0, ge=0)
    """A loss that is so many times the median of the last 100 good steps is a spike; 0 looks for none."""

    @model_validator(mode="after")
    def _a_usual_loss_is_no_spike(self) -> Self:
        if 0 < self.spike_factor <= 1:
            raise ConfigError(f"bad_step.spike_factor ({self.spike_factor}) must be above 1, or 0 to look for no spikes")
        return self


class LogConfig(Section):
    """How often a run speaks, validates and saves, in steps; 0 turns one off. Saving also happens at the end."""

    validate_every_steps: int = Field(0, ge=0)
    validation_split: str = "val"
    save_every_steps: int = Field(0, ge=0)
    keep_last: int = Field(2, ge=1)
    """Checkpoints that are kept; older ones go when a newer one is whole."""
    keep_every_steps: int = Field(0, ge=0)
    """Those of every so many steps stay for good."""
    stall_timeout: float = Field(600.0, ge=0)
    """Seconds after which a job that gets nowhere ends and names the rank at fault: well above the longest step, save (also one
    in the background) or validation batch."""
    peak_tflops: float = Field(0.0, ge=0)
    """Peak of one device for the model FLOPs utilisation; 0 looks it up, or measures it on a CPU."""

    @model_validator(mode="after")
    def _kept_steps_are_saved(self) -> Self:
        if self.keep_every_steps and (not self.save_every_steps or self.keep_every_steps % self.save_every_steps):
            raise ConfigError(f"log.keep_every_steps ({self.keep_every_steps}) must be a multiple of log.save_every_steps ({self.save_every_steps}), "
                              "or steps that are to stay would not be saved")
        return self


Objective = Annotated[FlmConfig | MlmConfig | ArConfig | PrefixLmConfig | CaptioningConfig, Field(discriminator="kind")]


def _kind_of_text(section: Any) -> str:  # noqa: ANN401 - what a file or a caller gives
    """Return the kind; runs from before there was a choice name none."""
    kind: str = section.get("kind", "transformer") if isinstance(section, dict) else getattr(section, "kind", "")
    return kind


Text = Annotated[Annotated[TextConfig, Tag("transformer")] | Annotated[LanguageModelConfig, Tag("language_model")], Discriminator(_kind_of_text)]


class Run(Section):
    """A whole training run; `run.json` holds one."""

    name: str
    steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    seed: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps float32 master weights in the optimizer."""
    recompute: bool = False
    """Recompute activations in the backward pass, layer by layer: less memory, about a third more compute."""
    init_from: str = ""
    """Run directory, or exported folder, whose weights of the same names and shapes this run starts from; pretrained.json says which they were."""
    objective: Objective = FlmConfig()
    vision: Vision = OpenClipVisionConfig()
    text: Text = TextConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    bad_step: BadStepConfig = BadStepConfig()
    log: LogConfig = LogConfig()

    @property
    def transformer(self) -> TextConfig:
        """The text transformer. Raises ConfigError for a run around a frozen language model, which has none."""
        if isinstance(self.text, TextConfig):
            return self.text
        raise ConfigError(f"text.kind ('{self.text.kind}'): this is made for runs with a text transformer of their own (text.kind transformer)")

    @property
    def vit(self) -> OpenClipVisionConfig | SmallVisionConfig:
        """The vision tower, a ViT. Raises ConfigError for another one."""
        if not isinstance(self.vision, ConvNetConfig):
            return self.vision
        raise ConfigError(f"vision.kind ('{self.vision.kind}'): this is made for ViTs; convolutional networks train behind a frozen language model, "
                          "and are neither planned nor exported; choose open_clip or vit")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if isinstance(self.text, TextConfig):
            _ = self.vit
        if self.text.max_length > self.batch.text_tokens:
            raise ConfigError(f"batch.text_tokens ({self.batch.text_tokens}) must hold one caption of text.max_length "
                              f"({self.text.max_length}); raise the first or lower the second")
        if self.optim.warmup_steps >= self.steps and self.optim.schedule != "constant":
            raise ConfigError(f"optim.warmup_steps ({self.optim.warmup_steps}) must be below steps ({self.steps})")
        if isinstance(self.text, TextConfig) and self.text.heads % self.parallel.tensor:
            raise ConfigError(f"text.heads ({self.text.heads}) must be a multiple of parallel.tensor ({self.parallel.tensor}); change one of them")
        if isinstance(self.text, LanguageModelConfig) and self.parallel.tensor * self.parallel.pipe > 1:
            raise ConfigError(f"parallel.tensor ({self.parallel.tensor}) and parallel.pipe ({self.parallel.pipe}) do not go with a frozen language "
                              "model, which each process runs whole; leave them at 1; --parallel.zero 3 shares its weights")
        if isinstance(self.text, LanguageModelConfig) != isinstance(self.objective, CaptioningConfig):
            raise ConfigError(f"objective.kind ('{self.objective.kind}') does not go with text.kind ('{self.text.kind}'): 'captioning' is the "
                              "objective of a frozen language model ('language_model') alone; begin with a recipe that has both")
        if any(self.vision.merged) and isinstance(self.text, LanguageModelConfig):
            raise ConfigError(f"vision.merged ({self.vision.merged}) does not go with a frozen language model, whose bridge knows rows by place; "
                              "leave it out and merge in the bridge (text.bridge.reducer)")
        if any(self.vision.merged) and (self.parallel.pipe > 1 or (self.parallel.tensor > 1 and self.parallel.vision == "shard_batch")):
            raise ConfigError(f"vision.merged ({self.vision.merged}) needs parallel.pipe 1 and, with parallel.tensor, parallel.vision 'replicated'")
        views = self.objective.passes if isinstance(self.objective, MlmConfig) else 1
        if views * self.text.max_length > self.batch.text_tokens or views > self.batch.captions:
            raise ConfigError(f"objective.passes ({views}) times text.max_length ({self.text.max_length}) must fit into batch.text_tokens "
                              f"({self.batch.text_tokens}), and the passes into batch.captions ({self.batch.captions})")
        return self


def micro_steps(batch: BatchConfig, *, data_parallel_size: int) -> int:
    """Return how many micro-batches each data-parallel rank runs a step.

    Raises ConfigError when the step cannot be cut evenly.
    """
    steps, left_over = divmod(batch.micro_batches, data_parallel_size)
    if left_over:
        raise ConfigError(f"batch.micro_batches ({batch.micro_batches}) must be a multiple of the number of data-parallel processes "
                          f"({data_parallel_size}); use {batch.micro_batches + data_parallel_size - left_over}")
    return steps
