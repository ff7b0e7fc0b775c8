"""Rules that span sections: what does not go together, whatever each of them says by itself."""

from __future__ import annotations

import re
from pathlib import Path

from parallelize.config.activation_checkpoint import ActivationCheckpointConfig
from parallelize.config.compile import CompileConfig
from parallelize.config.float8 import Float8Config
from parallelize.config.parallelism import PIPELINE_SCHEDULES, ZERO_BUBBLE_SCHEDULES, ParallelismConfig


def zero_bubble_problems(
    parallelism: ParallelismConfig, compile: CompileConfig, activation_checkpoint: ActivationCheckpointConfig
) -> list[str]:
    """The sentences for what does not go together with a backward in two halves, first for inputs, then for weights.

    In compiled layers torch 2.13 gets gradients wrong without a word; it refuses only modules that `torch.compile` has
    wrapped, not those compiled in place. Parameters that FSDP2 frees between the halves would get no gradient.
    """
    setting = backward_in_halves(parallelism)
    if setting is None:
        return []
    others = [schedule for schedule in PIPELINE_SCHEDULES if schedule not in ZERO_BUBBLE_SCHEDULES]
    found = []
    if compile.enable and "model" in compile.components:
        found.append(
            "which torch does wrongly, without an error, in compiled layers. Choose one of "
            f'{", ".join(others)}, or set compile.components = ["loss"].'
        )
    if activation_checkpoint.mode == "selective" and str(activation_checkpoint.selective_ac_option) == "op":
        found.append(
            "and what is recomputed operator by operator can run backward only once. Choose one of "
            f'{", ".join(others)}, or set activation_checkpoint.mode = "none" '
            '("full" is right, and recomputes a layer for each of its weights).'
        )
    if parallelism.fsdp_reshard_after_forward == "always":
        found.append(
            'and parallelism.fsdp_reshard_after_forward = "always" frees parameters between the two. Choose one of '
            f'{", ".join(others)}, or set that to "default".'
        )
    return [
        f"parallelism.{setting}: computes the gradients of inputs and weights at different times, {problem}"
        for problem in found
    ]


def backward_in_halves(parallelism: ParallelismConfig) -> str | None:
    """The key and value by which a pipeline's schedule has its backward in two halves; None where it has not."""
    name, csv = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_schedule_csv
    if parallelism.pipeline_parallel_degree == 1:
        return None
    if csv:
        path = Path(csv).expanduser()
        if not path.is_file() or not re.search(r"\d[IW]\d", path.read_text(encoding="utf-8", errors="replace")):
            return None
        return f'pipeline_parallel_schedule_csv = "{csv}" (which has actions I and W)'
    if name.lower() in [schedule.lower() for schedule in ZERO_BUBBLE_SCHEDULES]:
        return f'pipeline_parallel_schedule = "{name}"'
    return None


def async_tensor_parallel_problems(
    parallelism: ParallelismConfig, compile: CompileConfig, device_type: str | None = None
) -> list[str]:
    """The sentence for asynchronous tensor parallelism where it cannot be; device_type None: not known yet."""
    if not parallelism.enable_async_tensor_parallel or parallelism.tensor_parallel_degree == 1:
        return []
    missing = []
    if not (compile.enable and "model" in compile.components):
        missing.append('compiled layers (the compiler makes it): set compile.enable = true with "model" in components')
    if device_type not in (None, "cuda"):
        missing.append(f"CUDA devices that reach each other's memory, and this run is on {device_type}")
    if not missing:
        return []
    return [
        f"parallelism.enable_async_tensor_parallel = true: needs {'; and '.join(missing)}. Do that, or set it to false."
    ]


def float8_problems(float8: Float8Config, parallelism: ParallelismConfig) -> list[str]:
    """The sentence for what nobody has tried beside matrix products in float8."""
    if not float8.enable or parallelism.tensor_parallel_degree == 1 or not parallelism.enable_async_tensor_parallel:
        return []
    return [
        "float8.enable = true with parallelism.enable_async_tensor_parallel = true: the compiler joins exchanges with "
        "products of bf16; set one of them to false."
    ]
