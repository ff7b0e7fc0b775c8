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
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

METADATA, INCOMPLETE = ".metadata", ".incomplete"
_STEP = re.compile(r"step-(\d+)")
_OF_WEIGHTS = "-model"


class StorageError(OSError):
    """A file of a checkpoint could not be written or read; the message names it. Tried again it may go well."""


class DamagedFileError(StorageError):
    """A file is missing, too short or not what it should be: trying again is of no use."""


@dataclass
class Found:
    """What a root holds, steps in ascending order."""

    whole: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    """Under their final name, but without an index: somebody or something deleted it."""
    abandoned: list[int] = field(default_factory=list)
    """Set aside when a run went back to an earlier step."""
    models: list[int] = field(default_factory=list)
    """Of the weights alone (`step-N-model`), whole: none that a run resumes from."""

    def sort(self) -> None:
        for steps in (self.whole, self.damaged, self.abandoned, self.models):
            steps.sort()


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
        """Bytes of each of a checkpoint's files; empty where there is no such checkpoint."""

    @abstractmethod
    def read_text(self, name: str, file: str) -> str | None:
        """A text file that `commit` wrote; None where there is none."""

    @abstractmethod
    def abandon(self, step: int) -> None:
        """Set a checkpoint aside: it is not resumed from any more."""

    @abstractmethod
    def delete(self, step: int, *, abandoned: bool = False) -> None:
        """Delete a whole checkpoint, or one that was set aside."""

    @abstractmethod
    def leave_mark(self, mark: str) -> None:
        """Put an empty file of this name beside the checkpoints."""

    @abstractmethod
    def sees_mark(self, mark: str) -> bool:
        """Whether a process, on this machine or another, left this mark."""

    @abstractmethod
    def remove_mark(self, mark: str) -> None:
        """Remove what `leave_mark` left."""

    def is_whole(self, name: str) -> bool:
        """Whether there is a checkpoint of this name, written to its end. Its files may have been damaged since."""
        files = self.sizes(name)
        return METADATA in files and INCOMPLETE not in files

    def read_index(self, name: str) -> Metadata:
        """The index of a checkpoint whose files are all there in full; DamagedFileError names the one that is not."""
        sizes = self.sizes(name)
        if METADATA not in sizes:
            raise DamagedFileError(f"{METADATA} is missing")
        try:
            metadata = self.reader(name).read_metadata()
        except DamagedFileError as error:
            raise DamagedFileError(f"{METADATA} cannot be read ({error})") from error
        needed: dict[str, int] = {}
        for part in metadata.storage_data.values():
            needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
        for file, size in sorted(needed.items()):
            if file not in sizes:
                raise DamagedFileError(f"{file} is missing")
            if sizes[file] < size:
                raise DamagedFileError(f"{file} has {sizes[file]} bytes of {size}")
        return metadata

    def check_written(self, name: str) -> None:
        """Asked before `commit` lets it appear: does this process see what all ranks wrote? StorageError if not."""
        try:
            self.read_index(name)
        except DamagedFileError as error:
            raise StorageError(
                f"{error}, although it was written: checkpoint.folder must be a place that all machines share, such as "
                "a folder of a network file system or a bucket"
            ) from error


def step_of(name: str) -> int | None:
    """N of "step-N"; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def model_step_of(name: str) -> int | None:
    """N of "step-N-model"; None for any other name."""
    return step_of(name.removesuffix(_OF_WEIGHTS)) if name.endswith(_OF_WEIGHTS) else None


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is ours to write and to remove."""
    return step_of(name) is not None or model_step_of(name) is not None


class NamesTheFile:
    """Mixed into a file system of torch.distributed.checkpoint: an error that occurs in a file says in which."""

    storage_errors: tuple[type[Exception], ...] = (OSError,)
    """What the storage raises when it fails."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator:
        with (
            errors_in_file(path, self.storage_errors, reading="r" in mode),
            super().create_stream(path, mode) as stream,
        ):
            yield stream


class ReadsItsIndexOnce:
    """Mixed into a reader of torch.distributed.checkpoint: the index grows with tensors times ranks."""

    _index: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        if self._index is None:
            self._index = super().read_metadata(*args, **kwargs)
        return self._index


@contextmanager
def errors_in_file(
    path: str | os.PathLike, storage_errors: tuple[type[Exception], ...], *, reading: bool
) -> Iterator[None]:
    """What goes wrong with a file becomes a StorageError that names it; what goes wrong beside it stays as it is."""
    try:
        yield
    except (*_NOT_OF_FILES, StorageError):
        raise
    except (*_ERRORS_OF_CONTENT, *storage_errors) as error:
        kind = DamagedFileError if reading and _is_of_content(error) else StorageError
        raise kind(f"{path}: {reason_of(_find_os_error(error) or error)}") from error


# Memory and devices: RuntimeErrors too, and nothing that a file could help.
_NOT_OF_FILES = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError, AssertionError)

# Of torch's archives and of pickles that are none.
_ERRORS_OF_CONTENT = (
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
    """Whether an error in reading is the file's own, and no passing one of the storage or of memory."""
    if (cause := _find_os_error(error)) is not None:
        return isinstance(cause, FileNotFoundError)
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _BROKEN_ARCHIVE)
    return isinstance(error, _ERRORS_OF_CONTENT)


def _find_os_error(error: BaseException) -> OSError | None:
    """That of the file system, which torch's archive writer hides behind one of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
