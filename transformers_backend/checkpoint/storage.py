"""Where checkpoints lie: folders `step-N` under one root, local (`local.py`) or remote (`remote.py`).

A leaf of the package: no collectives.

What has a final name is whole, on both kinds of storage:

- A local checkpoint is written to `step-N.tmp` and renamed.
- Object stores cannot rename. A remote one is written in place beside a marker, `.incomplete`, that is the first
  object to appear and the last to go.

Under both, torch.distributed.checkpoint writes its index, `.metadata`, after all ranks' data. Leftovers of a run that
was killed are removed by the next one that saves; the lock on the dump folder sees to it that there is only one.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pickle import UnpicklingError

import torch
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

METADATA = ".metadata"
_STEP = re.compile(r"step-(\d+)")


class StorageError(Exception):
    """A file of a checkpoint could not be written or read; the message names it."""


class DamagedFileError(StorageError):
    """A file of a checkpoint is missing, short, or not what torch wrote: reading it again helps nobody."""


@dataclass
class Found:
    """What a root holds, steps in ascending order."""

    whole: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    """Under their final name, but without an index: somebody or something deleted it."""
    abandoned: list[int] = field(default_factory=list)
    """Set aside when a run went back to an earlier step."""


class Storage(ABC):
    """Checkpoints by name ("step-100"). One process (rank 0) changes them; `writer` and `reader` are for every rank."""

    @abstractmethod
    def locate(self, name: str) -> str:
        """Path or URL of a checkpoint, for messages."""

    @abstractmethod
    def find(self) -> Found:
        """List the root."""

    @abstractmethod
    def begin(self, name: str) -> None:
        """Make way for a new checkpoint, and remove what killed runs left."""

    @abstractmethod
    def writer(self, name: str) -> StorageWriter:
        """What torch.distributed.checkpoint writes a checkpoint through, between `begin` and `commit`."""

    @abstractmethod
    def commit(self, name: str, files: dict[str, str]) -> None:
        """Add text files, then make the checkpoint appear."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Remove what was written since `begin`."""

    @abstractmethod
    def reader(self, name: str) -> StorageReader:
        """What torch.distributed.checkpoint reads a checkpoint through."""

    @abstractmethod
    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each of a checkpoint's files."""

    @abstractmethod
    def read_text(self, name: str, file: str) -> str | None:
        """A text file that `commit` wrote; None where there is none."""

    @abstractmethod
    def abandon(self, step: int) -> None:
        """Set a checkpoint aside: it is not resumed from any more."""

    @abstractmethod
    def delete(self, step: int, *, abandoned: bool = False) -> None:
        """Delete a whole checkpoint, or one that was set aside."""


def step_of(name: str) -> int | None:
    """N of "step-N"; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


class NamesTheFile:
    """Mixed into a file system of torch.distributed.checkpoint: an error that occurs in a file says in which."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # met while tensors are copied: not the file's
        except _ERRORS_IN_FILES as error:
            kind = DamagedFileError if mode == "rb" and _is_of_content(error) else StorageError
            raise kind(f"{path}: {_reason(error)}") from error


# Of the file system, of torch's archives and of pickles that are none.
_ERRORS_IN_FILES = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    ImportError,
    EOFError,
    UnpicklingError,
)


# What torch says of an archive that is none; its other RuntimeErrors, such as "can't allocate memory", are not of it.
_BROKEN_ARCHIVE = ("PytorchStreamReader", "corrupt", "wrong byte size")


def _is_of_content(error: BaseException) -> bool:
    """Whether an error in reading is the file's own, and no passing one of the file system or of memory."""
    if (cause := _of_file_system(error)) is not None:
        return isinstance(cause, FileNotFoundError)
    return not isinstance(error, RuntimeError) or any(words in str(error) for words in _BROKEN_ARCHIVE)


def _reason(error: BaseException) -> str:
    if (cause := _of_file_system(error)) is not None:
        return cause.strerror or str(cause)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _of_file_system(error: BaseException) -> OSError | None:
    """The error of the file system that torch's archives hide behind one of their own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause
