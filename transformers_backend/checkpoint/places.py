"""From what the config calls a folder to the storage behind it, and whether that is one place for all machines."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import torch.distributed as dist

from transformers_backend.checkpoint.local import LocalStorage
from transformers_backend.checkpoint.storage import Storage

_PATIENCE_SECONDS = 60.0  # NFS clients keep what they know of a folder for up to that long (man 5 nfs, acdirmax)


def open_storage(folder: str, inside: Path, *, key: str = "checkpoint.folder") -> Storage:
    """The storage of a path (relative ones lie `inside`, `~` is the home folder) or URL (`s3://bucket/run`).

    key: what the user calls it, for messages. Raises ValueError or ImportError for a protocol that cannot be used.
    """
    if is_remote(folder):
        from transformers_backend.checkpoint.remote import RemoteStorage  # fsspec only where it is asked for

        return RemoteStorage(folder, key=key)
    return LocalStorage(_resolve(folder, inside))


def locate_folder(folder: str, inside: Path) -> str:
    """Where `open_storage` would look, as a person reads it."""
    return folder.rstrip("/") if is_remote(folder) else str(_resolve(folder, inside))


def is_remote(folder: str) -> bool:
    return "://" in folder


def require_shared(storage: Storage, *, group: dist.ProcessGroup | None = None, patience: float = _PATIENCE_SECONDS):
    """Every rank calls it, before a run that saves: ValueError where rank 0 cannot write, or not all ranks see it.

    patience: seconds that a file may take to be seen on other machines.
    """
    where = f'checkpoint.folder = "{storage.locate("").rstrip("/")}"'
    message = [f".seen-{uuid.uuid4().hex}", None]
    if dist.get_rank() == 0:
        try:
            storage.leave_mark(message[0])
        except OSError as error:
            message[1] = f"{where} cannot be written: {error}. Correct the access, or name another place."
    dist.broadcast_object_list(message, src=0, group=group)
    mark, problem = message
    if problem is not None:
        raise ValueError(problem)
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _look_for(storage, mark, patience), group=group)
    if dist.get_rank() == 0:
        storage.remove_mark(mark)
    if blind := {rank: reason for rank, reason in enumerate(outcomes) if reason is not None}:
        raise ValueError(
            f"{where} is not the same place for all ranks: what rank 0 writes there, rank "
            f"{', '.join(map(str, blind))} cannot see ({next(iter(blind.values()))}), and each machine would hold a "
            "part of a checkpoint. Name a folder that all machines share (job.dump_folder or checkpoint.folder), or a "
            "URL such as s3://bucket/run."
        )


def _look_for(storage: Storage, mark: str, patience: float) -> str | None:
    """None if the mark is seen in time, else what is seen instead."""
    give_up_at = time.monotonic() + patience
    while True:
        try:
            if storage.sees_mark(mark):
                return None
            reason = f"it is missing after {patience:g} s"
        except OSError as error:
            reason = str(error)
        if time.monotonic() >= give_up_at:
            return reason
        time.sleep(0.5)


def _resolve(folder: str, inside: Path) -> Path:
    return inside / Path(folder).expanduser()
