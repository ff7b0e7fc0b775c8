"""What a user can choose about parallelism, activation checkpointing and compilation.

These dataclasses are the `[parallelism]`, `[activation_checkpoint]` and `[compile]` sections of a job's TOML file and
the arguments of `HFTransformerModel.parallelize`. Names and meanings follow torchtitan v0.2.2 wherever a field means
the same. They are read at the top (`parallelize/model.py`); leaf functions take flat values.

`problems()` returns every violated rule as a sentence that names key, value, rule and remedy, so that a job can
report all of them at once; `check(...)` raises them as one `ValueError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist


@dataclass
class ParallelismConfig:
    data_parallel_replicate_degree: int = 1
    """Number of replicas of the sharded model (HSDP when > 1 beside sharding). 1 means no replication."""

    data_parallel_shard_degree: int = -1
    """Number of ranks that parameters, gradients and optimizer state are sharded over (FSDP2). -1 means the rest of
    the world."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """When a layer's gathered parameters are freed: "default" and "always" after its forward (gathered again in the
    backward, least memory), "never" keeps them until the backward (less communication)."""

    tensor_parallel_degree: int = 1
    """Number of ranks that each weight matrix is split over. 1 means disabled; more is not available yet."""

    pipeline_parallel_degree: int = 1
    """Number of ranks that the layers are split over. 1 means disabled; more is not available yet."""

    context_parallel_degree: int = 1
    """Number of ranks that each sequence is split over. 1 means disabled; more is not available yet."""

    @classmethod
    def from_accelerate(cls, config: Any) -> ParallelismConfig:
        """The same mesh as an `accelerate.ParallelismConfig`, e.g. that of `Accelerator(...).parallelism_config`.

        Sizes are taken as they are: accelerate's dp_shard_size = 1 means no sharding, where our own default of -1
        shards over the rest of the world. All sizes 1 means there that every process holds a replica, so inside a
        process group the replicas become its number of ranks. Raises one ValueError that lists what has no counterpart.
        """
        given = _accelerate_fields(config)
        check(_without_counterpart(given))
        degrees = {ours: given[theirs] for theirs, ours in _ACCELERATE_SIZES.items()}
        if set(degrees.values()) == {1} and dist.is_initialized():
            degrees["data_parallel_replicate_degree"] = dist.get_world_size()
        return cls(**degrees)

    def problems(self) -> list[str]:
        found = []
        for name in ("data_parallel_replicate_degree", "tensor_parallel_degree", "pipeline_parallel_degree",
                     "context_parallel_degree"):  # fmt: skip
            if getattr(self, name) < 1:
                found.append(f"parallelism.{name} = {getattr(self, name)}: must be at least 1 (1 means disabled).")
        if self.data_parallel_shard_degree < 1 and self.data_parallel_shard_degree != -1:
            found.append(
                f"parallelism.data_parallel_shard_degree = {self.data_parallel_shard_degree}: must be at least 1, or "
                "-1 for the rest of the world."
            )
        for name in ("tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree"):
            if getattr(self, name) > 1:
                found.append(
                    f"parallelism.{name} = {getattr(self, name)}: this version shards over data ranks only; set it "
                    "to 1 and use data_parallel_shard_degree (and data_parallel_replicate_degree)."
                )
        found += choice_problems("parallelism", self, "fsdp_reshard_after_forward", ("default", "always", "never"))
        return found


# accelerate 1.15's names, and ours.
_ACCELERATE_SIZES = {
    "dp_replicate_size": "data_parallel_replicate_degree",
    "dp_shard_size": "data_parallel_shard_degree",
    "tp_size": "tensor_parallel_degree",
    "cp_size": "context_parallel_degree",
}
# What says nothing by itself: the only backends that there are, and settings of sequence parallelism, which is refused.
_ACCELERATE_SILENT = ("cp_backend", "sp_backend", "sp_handler")


def _accelerate_fields(config: Any) -> dict[str, Any]:
    """The fields of an accelerate.ParallelismConfig. Its class is not asked for: this library does not import it."""
    given = {entry.name: getattr(config, entry.name) for entry in fields(config)} if _is_instance(config) else {}
    if not _ACCELERATE_SIZES.keys() <= given.keys():
        hint = ""
        if config is None:
            hint = " An Accelerator's parallelism_config is None where none was given to it."
        raise ValueError(
            f"from_accelerate: got {type(config).__name__}, which is not an accelerate.ParallelismConfig; pass one, or "
            f"write ParallelismConfig() to shard over all ranks.{hint}"
        )
    return given


def _is_instance(config: Any) -> bool:
    return is_dataclass(config) and not isinstance(config, type)


def _without_counterpart(given: dict[str, Any]) -> list[str]:
    """The sentences for what an accelerate.ParallelismConfig says that cannot be said here."""
    found = []
    if given.get("sp_size", 1) > 1:
        found.append(
            f"sp_size = {given['sp_size']}: the sequence parallelism of DeepSpeed is not available here; set it to 1, "
            "and raise dp_shard_size by that factor."
        )
    if given["tp_size"] > 1 and given["tp_handler"].enable_async_tp:
        found.append("tp_handler.enable_async_tp = True: not available here (accelerate ignores it); leave it out.")
    if given["cp_size"] > 1 and given["cp_handler"].cp_comm_strategy != "allgather":
        found.append(
            f'cp_handler.cp_comm_strategy = "{given["cp_handler"].cp_comm_strategy}": how ranks exchange a sequence '
            "cannot be chosen here; leave it out."
        )
    known = {*_ACCELERATE_SIZES, *_ACCELERATE_SILENT, "sp_size", "tp_handler", "cp_handler"}
    found += [
        f"{name} = {value!r}: accelerate's ParallelismConfig has it, but this version here does not know it; leave it "
        "out."
        for name, value in given.items()
        if name not in known and value not in (None, 1, False)
    ]
    return [f"accelerate.ParallelismConfig: {problem}" for problem in found]


@dataclass
class ActivationCheckpointConfig:
    mode: Literal["none", "full", "selective"] = "none"
    """What the backward recomputes: "none" keeps all activations, "full" keeps each layer's input only, "selective"
    see selective_ac_option."""

    selective_ac_option: str = "2"
    """With mode "selective": an integer n recomputes every n-th layer, "op" recomputes inside every layer all but
    attention, every second matrix product and communication."""

    preserve_rng_state: bool = True
    """Replay the random state in the recomputation, so that dropout draws the same mask. False is faster where a
    model has no dropout."""

    def problems(self) -> list[str]:
        found = choice_problems("activation_checkpoint", self, "mode", ("none", "full", "selective"))
        option = str(self.selective_ac_option)
        if option != "op" and not (option.isdigit() and int(option) > 0):
            found.append(
                f'activation_checkpoint.selective_ac_option = "{option}": must be "op" or a positive integer n, '
                'as a string, for every n-th layer, e.g. "2".'
            )
        return found


@dataclass
class CompileConfig:
    enable: bool = False
    """Compile with torch.compile, layer by layer."""

    components: list[str] = field(default_factory=lambda: ["model", "loss"])
    """What is compiled: any of "model" (each decoder layer) and "loss" (the chunked head and cross-entropy)."""

    backend: str = "inductor"
    """The torch.compile backend, e.g. "inductor" or "aot_eager"."""

    def problems(self) -> list[str]:
        unknown = [name for name in self.components if name not in ("model", "loss")]
        found = [f'compile.components has "{name}": must be among "model" and "loss"; remove it.' for name in unknown]
        if self.enable and self.backend not in torch.compiler.list_backends(exclude_tags=()):
            names = ", ".join(torch.compiler.list_backends())
            found.append(f'compile.backend = "{self.backend}": torch has no such backend; choose among {names}.')
        return found


@dataclass
class KernelConfig:
    """Reserved for the Triton kernels: no kernel exists yet, and nothing is replaced."""


def choice_problems(section: str, config: object, name: str, choices: tuple[str, ...]) -> list[str]:
    """The sentence for a field whose value is not among `choices`, or nothing."""
    value = getattr(config, name)
    if value in choices:
        return []
    allowed = ", ".join(f'"{choice}"' for choice in choices)
    return [f'{section}.{name} = "{value}": must be one of {allowed}.']


def check(problems: Iterable[str]) -> None:
    """Raise one ValueError that lists all `problems`, or return if there are none."""
    problems = list(problems)
    if problems:
        raise ValueError("\n".join(["Invalid configuration:", *(f"  - {problem}" for problem in problems)]))
