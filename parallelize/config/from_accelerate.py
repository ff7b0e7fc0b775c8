"""What an `accelerate.ParallelismConfig` says, in the words of ours; `ParallelismConfig.from_accelerate` takes it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch.distributed as dist

from parallelize.config.checks import check

# accelerate 1.15's names, and ours.
_ACCELERATE_SIZES = {
    "dp_replicate_size": "data_parallel_replicate_degree",
    "dp_shard_size": "data_parallel_shard_degree",
    "tp_size": "tensor_parallel_degree",
    "cp_size": "context_parallel_degree",
}
# How ranks exchange a sequence; "alltoall" passes keys and values on from rank to rank.
_ACCELERATE_STRATEGIES = {"allgather": "allgather", "alltoall": "ring"}
# What says nothing by itself: the only backends that there are, and settings of sequence parallelism, which is refused.
_ACCELERATE_SILENT = ("cp_backend", "sp_backend", "sp_handler")


def fields_from_accelerate(config: Any) -> dict[str, Any]:
    """The fields of our ParallelismConfig that describe the same mesh; what has no counterpart is a ValueError."""
    given = _accelerate_fields(config)
    check(_without_counterpart(given))
    found = {ours: given[theirs] for theirs, ours in _ACCELERATE_SIZES.items()}
    if set(found.values()) == {1} and dist.is_initialized():
        found["data_parallel_replicate_degree"] = dist.get_world_size()
    if given["cp_size"] > 1:
        found["context_parallel_method"] = _ACCELERATE_STRATEGIES[given["cp_handler"].cp_comm_strategy]
    is_async = given["tp_size"] > 1 and given["tp_handler"].enable_async_tp  # accelerate itself ignores it
    return {**found, "enable_async_tensor_parallel": is_async}


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
    if given["cp_size"] > 1 and (strategy := given["cp_handler"].cp_comm_strategy) not in _ACCELERATE_STRATEGIES:
        found.append(
            f'cp_handler.cp_comm_strategy = "{strategy}": this version here does not know that way to exchange a '
            f"sequence; take one of {', '.join(_ACCELERATE_STRATEGIES)}."
        )
    known = {*_ACCELERATE_SIZES, *_ACCELERATE_SILENT, "sp_size", "tp_handler", "cp_handler"}
    found += [
        f"{name} = {value!r}: accelerate's ParallelismConfig has it, but this version here does not know it; leave it "
        "out."
        for name, value in given.items()
        if name not in known and value not in (None, 1, False)
    ]
    return [f"accelerate.ParallelismConfig: {problem}" for problem in found]
