"""What a report is made with: the model by its name, the mesh, whether layers are compiled, and which kernels modules
may compute by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING

from parallelize.config import ParallelismConfig
from parallelize.pipeline_parallel.schedules import canonical_name
from transformers_backend.model_args import HFTransformerModelArgs

ROWS = 2
"""Of a micro-batch."""


def is_model_type(name: str) -> bool:
    """Whether a name of a model is a model type of Transformers, or could be none but that."""
    return name in CONFIG_MAPPING or not ("/" in name or Path(name).exists())


def model_args_of(name: str) -> HFTransformerModelArgs:
    """What to build for a model type, hub id or folder."""
    return HFTransformerModelArgs(**{"model_type" if is_model_type(name) else "model": name})


@dataclass(frozen=True)
class Setting:
    parallelism: ParallelismConfig
    compile: bool = False
    kernels: tuple[str, ...] = ("none",)
    """As in `KernelConfig.enable`."""

    @property
    def processes(self) -> int:
        parallelism = self.parallelism
        return (
            parallelism.data_parallel_shard_degree * parallelism.tensor_parallel_degree
            * parallelism.context_parallel_degree * parallelism.pipeline_parallel_degree
        )  # fmt: skip

    @property
    def has_kernels(self) -> bool:
        return self.kernels != ("none",)

    @property
    def title(self) -> str:
        """For example "fsdp 2 x pp 2, GPipe"; the schedule, and the way of attention, where it is not the usual one."""
        parallelism = self.parallelism
        degrees = {
            "fsdp": parallelism.data_parallel_shard_degree,
            "tp": parallelism.tensor_parallel_degree,
            "pp": parallelism.pipeline_parallel_degree,
            "cp": parallelism.context_parallel_degree,
        }
        words = [" x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one process"]
        schedule = canonical_name(parallelism.pipeline_parallel_schedule)
        if parallelism.pipeline_parallel_degree > 1 and schedule != ParallelismConfig.pipeline_parallel_schedule:
            words.append(schedule)
        if parallelism.context_parallel_degree > 1:
            method, ulysses = parallelism.context_parallel_method, parallelism.context_parallel_ulysses_degree
            words += [method] * (method != ParallelismConfig.context_parallel_method)
            words += [f"ulysses {ulysses}"] * (ulysses > 1)
        words += ["compiled"] * self.compile + ["kernels"] * self.has_kernels
        return ", ".join(words)


def setting_of(
    *,
    fsdp: int = 1,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    schedule: str = "1F1B",
    cp_method: str = "ring",
    cp_ulysses: int = 1,
    compile: bool = False,
    kernels: tuple[str, ...] = ("none",),
) -> Setting:
    """The arguments of `verify`."""
    parallelism = ParallelismConfig(
        data_parallel_shard_degree=fsdp,
        tensor_parallel_degree=tp,
        context_parallel_degree=cp,
        context_parallel_method=cp_method,
        context_parallel_ulysses_degree=cp_ulysses,
        pipeline_parallel_degree=pp,
        pipeline_parallel_schedule=schedule,
        pipeline_parallel_microbatch_size=ROWS,
    )
    return Setting(parallelism, compile, kernels)
