"""Is a checkpoint whole, does it fit this run, what has changed since: asked before anything is read into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from transformers_backend.checkpoint.storage import DamagedFileError, Storage, StorageError
from transformers_backend.job_config.values import to_toml, toml_reader

_LISTED = 5  # names that an error lists
_SECTIONS_THAT_MATTER = ("model", "hf_transformers", "training", "optimizer")
_MAY_CHANGE = {  # how a run goes, not what it computes
    "hf_transformers": {"init", "trust_remote_code", "attn_implementation"},
    "training": {"steps", "local_batch_size", "enable_cpu_offload", "gc_freq", "num_workers", "prefetch_factor"},
    "optimizer": {"implementation"},
}


class DamagedCheckpoint(ValueError):
    """Files are missing, too short or unreadable; the message names one."""


def read_metadata(storage: Storage, name: str) -> Metadata:
    """The index of a checkpoint whose files are all there in full, or DamagedCheckpoint. Call it on one rank."""
    try:
        metadata = storage.read_index(name)
    except DamagedFileError as error:
        raise DamagedCheckpoint(f"{storage.locate(name)} is damaged: {error}.") from error
    if not storage.is_whole(name):
        raise DamagedCheckpoint(f"{storage.locate(name)} is incomplete: its save or its deletion was cut off.")
    return metadata


def read_state(state: dict[str, Any], storage: Storage, name: str, metadata: Metadata, group) -> None:
    """Fill `state` from a checkpoint, on all ranks. ValueError if it does not fit, DamagedCheckpoint if it is damaged
    after all."""
    location = storage.locate(name)
    if misfits := find_misfits(state, metadata):
        raise ValueError(
            f"{location} cannot be resumed from ({misfits}): it was saved by another model or optimizer. Give the "
            "settings that it was saved with, another checkpoint.load_step or job.dump_folder, or name what to leave "
            "out in checkpoint.exclude_from_loading."
        )
    try:
        dcp.load(state, storage_reader=storage.reader(name), process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, StorageError):
            raise cause from None
        raise DamagedCheckpoint(f"{location} is damaged: rank {rank} cannot read {cause}.") from None


def find_misfits(state: dict[str, Any], metadata: Metadata) -> str:
    """What of `state` is not in a checkpoint as it is here, and which of its weights are not in `state`; "" if it fits.

    Tensors of `state` may be on the meta device.
    """
    saved = metadata.state_dict_metadata
    flat, _ = flatten_state_dict(state)
    missing = sorted(key for key in flat if key not in saved)
    unexpected = (
        sorted(key for key in saved if key.startswith("model.") and key not in flat) if "model" in state else []
    )
    reshaped = [
        f"{key} (here {tuple(value.shape)}, saved {tuple(saved[key].size)})"
        for key, value in sorted(flat.items())
        if isinstance(value, torch.Tensor)
        and isinstance(saved.get(key), TensorStorageMetadata)
        and value.shape != saved[key].size
    ]
    texts = [
        f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{' ...' if len(names) > _LISTED else ''}"
        for kind, names in (
            ("values that it does not have", missing),
            ("weights that the model does not have", unexpected),
            ("of another shape", reshaped),
        )
        if names
    ]
    return "; ".join(texts)


def count_ranks(metadata: Metadata, prefix: str) -> int:
    """Number of ranks that saved a state under `prefix`N."""
    return len({key[len(prefix) :].split(".")[0] for key in metadata.state_dict_metadata if key.startswith(prefix)})


def find_changes(saved_toml: str, now_toml: str) -> list[str]:
    """What of a job is not as it was when the checkpoint was saved, and makes a difference to the curve."""
    toml = toml_reader()
    saved, now = toml.loads(saved_toml), toml.loads(now_toml)
    return [
        f"{section}.{key} = {_shown(before)} there, {_shown(after)} here"
        for section in _SECTIONS_THAT_MATTER
        for key, before, after in _differences(saved.get(section, {}), now.get(section, {}))
        if key not in _MAY_CHANGE.get(section, ())
    ]


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = sorted(saved.keys() | now.keys())
    return [(key, saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)]


def _shown(value: Any) -> str:
    return "none" if value is None else to_toml(value)


def agree(value: Any, problem: str | None, group) -> Any:
    """Rank 0's value on every rank, or its problem as DamagedCheckpoint."""
    objects = [(value, problem)]
    dist.broadcast_object_list(objects, src=0, group=group)
    value, problem = objects[0]
    if problem is not None:
        raise DamagedCheckpoint(problem)
    return value
