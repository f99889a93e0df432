"""DeepSpeed's configuration: a template from ds_configs/, which holds what DeepSpeed alone understands, filled with what the Run owns.

Pure: reads no file but the template, imports no DeepSpeed.
"""

import json
from pathlib import Path
from typing import Any

from flm_scale.config import ParallelConfig, Run, micro_steps
from flm_scale.errors import ConfigError, did_you_mean

TEMPLATES = Path(__file__).parents[2] / "ds_configs"

KNOWN_KEYS = {"zero_optimization", "pipeline", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "aio",
              "communication_data_type", "zero_force_ds_cpu_optimizer", "disable_allgather", "sparse_gradients", "data_types"}
RUN_OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer",
             "scheduler", "fp16", "bf16", "torch_autocast", "steps_per_print", "prescale_gradients", "gradient_predivide_factor",
             "gradient_allreduce_op")


def read_template(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the template that the config names, or else that of its ZeRO stage. Raises ConfigError when it is missing or not JSON."""
    name = parallel.template or ("zero1-pipeline" if parallel.pipe > 1 and parallel.zero == 1 else f"zero{parallel.zero}")
    path = TEMPLATES / f"{name}.json"
    if not path.is_file():
        known = sorted(template.stem for template in TEMPLATES.glob("*.json"))
        raise ConfigError(f"parallel.template: no '{name}' in ds_configs/{did_you_mean(name, known)} (there is: {', '.join(known)})")
    try:
        template: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed template {path}: {error}; restore it from the repository") from error
    return template


def merge_deepspeed(template: dict[str, Any], run: Run, *, data_parallel_size: int) -> dict[str, Any]:
    """Return the template with the Run's batch, precision and clipping. Raises one ConfigError that lists every conflict."""
    problems = [f"'{key}' belongs to the Run; delete it from the template" for key in RUN_OWNED if key in template]
    problems += [f"unknown key '{key}'{did_you_mean(key, KNOWN_KEYS)}" for key in sorted(template.keys() - KNOWN_KEYS - set(RUN_OWNED))]
    stage = template.get("zero_optimization", {}).get("stage")
    if stage != run.parallel.zero:
        problems.append(f"zero_optimization.stage ({stage}) must be parallel.zero ({run.parallel.zero})")
    if stage == 0 and run.precision == "bf16":
        problems.append("precision bf16 needs float32 gradient sums, which DeepSpeed has from ZeRO 1 on; set parallel.zero to 1, 2 or 3")
    offload = template.get("zero_optimization", {}).get("offload_optimizer", {"device": "cpu"})
    if offload.get("device") != "cpu" or offload.get("ratio", 1) != 1:
        problems.append("zero_optimization.offload_optimizer is saved and resumed for device cpu and ratio 1 alone; set these")
    if "offload_optimizer" in template.get("zero_optimization", {}) and run.optim.kind != "adamw":
        problems.append(f"optim.kind {run.optim.kind} has no form for state in the host's memory; use adamw, or another parallel.template")
    if problems:
        raise ConfigError("DeepSpeed: " + "; ".join(problems))
    steps = micro_steps(run.batch, data_parallel_size=data_parallel_size)
    owned: dict[str, Any] = {
        # One packed micro-batch counts as one sample: how many pairs are in it is the loader's business.
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": steps, "train_batch_size": steps * data_parallel_size,
        # At ZeRO 0 the engine clips, because DeepSpeed's norm leaves the other stages out.
        "gradient_clipping": run.optim.clip_norm if stage else 0.0, "zero_allow_untested_optimizer": True, "steps_per_print": None,
        "bf16": {"enabled": run.precision == "bf16"}}
    if run.precision == "bf16":
        # Gradients are float32 sums, over micro-batches and over replicas, unless the template says otherwise.
        owned["data_types"] = {"grad_accum_dtype": "fp32"} | template.get("data_types", {})
        owned["communication_data_type"] = template.get("communication_data_type", "fp32")
    return template | owned
