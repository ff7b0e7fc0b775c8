"""Is a checkpoint whole, does it fit this run, what has changed since: asked before anything is read into a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from parallelize.tensor_parallel.packing import Packing
from transformers_backend.checkpoint.planners import PackedLoadPlanner
from transformers_backend.checkpoint.storage import DamagedFileError, Storage
from transformers_backend.job_config.values import to_toml, toml_reader

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONFIG_FILE = "config.toml"  # the job's, in every checkpoint

_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError)  # the same tomorrow, if nobody mends them
_LISTED = 5  # names that an error lists
_SECTIONS_THAT_MATTER = ("model", "hf_transformers", "training", "optimizer")
_MAY_CHANGE = {  # how a run goes, not what it computes
    "hf_transformers": {"init", "trust_remote_code", "attn_implementation"},
    "training": {
        "steps", "local_batch_size", "global_batch_size", "enable_cpu_offload", "gc_freq", "num_workers",
        "prefetch_factor",
    },
    "optimizer": {"implementation"},
}  # fmt: skip


class DamagedCheckpoint(ValueError):
    """Files are missing, too short or not what was written; the message names one."""


class LoadError(OSError):
    """Storage failed while a checkpoint was read, which says nothing of the checkpoint: it may be whole."""

    def __str__(self) -> str:
        return f"{self.args[0]} Nothing was set aside: when the storage answers again, the same command goes on."


def read_metadata(storage: Storage, name: str) -> Metadata:
    """The index of a checkpoint whose files are all there in full, or DamagedCheckpoint. Call it on one rank."""
    try:
        metadata = storage.read_index(name)
    except DamagedFileError as error:
        raise DamagedCheckpoint(f"{storage.locate(name)} is damaged: {error}.") from error
    if not storage.is_whole(name):
        raise DamagedCheckpoint(f"{storage.locate(name)} is incomplete: its save or its deletion was cut off.")
    return metadata


def check_fits(state: dict[str, Any], location: str, metadata: Metadata) -> None:
    """Raise a ValueError that says what of `state` is not in the checkpoint at `location`; see `find_misfits`."""
    if misfits := find_misfits(state, metadata):
        raise ValueError(
            f"{location} cannot be resumed from ({misfits}): it was saved by another model or optimizer. Give the "
            "settings that it was saved with, another checkpoint.load_step or job.dump_folder, or name what to leave "
            "out in checkpoint.exclude_from_loading."
        )


def read_state(state: dict[str, Any], packings: Mapping[str, Packing], storage: Storage, name: str, group) -> None:
    """Fill `state` from a checkpoint that it fits, on all ranks. DamagedCheckpoint if it is damaged after all,
    LoadError if storage fails.

    packings: of the fused tensors in `state`, by key of the flattened state.
    """
    location = storage.locate(name)
    try:
        dcp.load(state, storage_reader=storage.reader(name), planner=PackedLoadPlanner(packings), process_group=group)
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        for cause in causes.values():
            if not isinstance(cause, OSError):
                raise cause from None
        for rank, cause in causes.items():  # before any damage: what cannot be read now may do so tomorrow
            if not isinstance(cause, DamagedFileError):
                raise LoadError(f"{location} cannot be read: rank {rank}: {cause}.") from None
        rank, cause = min(causes.items())
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


def find_ranks(metadata: Metadata, prefix: str) -> set[str]:
    """The keys of a checkpoint's state that begin with `prefix`; one a rank."""
    return {key.split(".")[0] for key in metadata.state_dict_metadata if key.startswith(prefix)}


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


def find_new_batch_size(saved_toml: str, saved_ranks: int, now_toml: str, now_ranks: int) -> list[str]:
    """At most one sentence: the sequences of an optimizer step, where they are not as many as there.

    saved_ranks, now_ranks: data ranks, which make the batch where training.global_batch_size is -1.
    """
    toml = toml_reader()
    before = _sequences_per_step(toml.loads(saved_toml)["training"], saved_ranks)
    after = _sequences_per_step(toml.loads(now_toml)["training"], now_ranks)
    if before == after:
        return []
    return [
        f"{before} sequences in an optimizer step there, {after} here (training.global_batch_size = {before} keeps "
        "them on any number of ranks)"
    ]


def _sequences_per_step(training: Mapping[str, Any], ranks: int) -> int:
    fixed = training["global_batch_size"]
    return fixed if fixed != -1 else training["local_batch_size"] * ranks


def read_config(storage: Storage, name: str) -> str | None:
    """The job's TOML in a checkpoint; None, and a warning, where somebody has made something else of it."""
    text = storage.read_text(name, CONFIG_FILE)
    if text is None:
        return None
    try:
        toml_reader().loads(text)
    except ValueError as error:
        location = f"{storage.locate(name)}/{CONFIG_FILE}"
        logger.warning("%s is not valid TOML (%s): nothing is compared with it.", location, error)
        return None
    return text


def is_same_job(saved_toml: str, now_toml: str, *, load_step: int, exclude: Collection[str]) -> bool:
    """Whether a checkpoint comes from this job: it computed the same, and had started from the same place."""
    checkpoint = toml_reader().loads(saved_toml).get("checkpoint", {})
    return (
        checkpoint.get("load_step") == load_step
        and set(checkpoint.get("exclude_from_loading", ())) == set(exclude)
        and not find_changes(saved_toml, now_toml)
    )


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = sorted(saved.keys() | now.keys())
    return [(key, saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)]


def _shown(value: Any) -> str:
    return "none" if value is None else to_toml(value)


def read_on_first_rank(read: Callable[[], T], location: str, group, *, done: str = "read") -> T:
    """What rank 0 reads, on every rank; or its error: ValueError for what the user can mend, else LoadError."""
    value: T | None = None
    error: ValueError | LoadError | None = None
    if dist.get_rank() == 0:
        try:
            value = read()
        except ValueError as problem:
            error = problem
        except OSError as problem:
            is_lasting = isinstance(problem, _LASTING) or isinstance(problem.__cause__, _LASTING)
            sentence = f"{location} cannot be {done}: {problem}."
            error = ValueError(f"{sentence} Correct the name or the access.") if is_lasting else LoadError(sentence)
    objects = [(value, error)]
    dist.broadcast_object_list(objects, src=0, group=group)
    value, error = objects[0]
    if error is not None:
        raise error
    return value
