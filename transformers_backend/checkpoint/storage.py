"""Where checkpoints lie: folders `step-N` under one root, local or remote. A leaf of the package: no collectives.

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
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from transformers_backend.folders import replace_folder

METADATA = ".metadata"
_STEP = re.compile(r"step-(\d+)")


class StorageError(Exception):
    """A file of a checkpoint could not be written or read; the message names it."""


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


def open_storage(folder: str, inside: Path) -> Storage:
    """The storage of a path (relative ones lie `inside`) or URL (`s3://bucket/run`)."""
    if is_remote(folder):
        from transformers_backend.checkpoint.remote import RemoteStorage  # fsspec only where it is asked for

        return RemoteStorage(folder)
    return LocalStorage(inside / folder)


def is_remote(folder: str) -> bool:
    return "://" in folder


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
        except _ERRORS_IN_FILES as error:
            raise StorageError(f"{path}: {_reason(error)}") from error


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


def _reason(error: BaseException) -> str:
    """What an error says; torch's archive writer hides that of the file system behind one of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if cause is not None:
        return cause.strerror or str(cause)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _LocalFileSystem(NamesTheFile, FileSystem):
    pass


class LocalStorage(Storage):
    def __init__(self, root: Path) -> None:
        self.root = root

    def locate(self, name: str) -> str:
        return str(self.root / name)

    def find(self) -> Found:
        found = Found()
        for path in self.root.glob("step-*"):
            if (step := step_of(path.name)) is not None:
                (found.whole if (path / METADATA).is_file() else found.damaged).append(step)
            elif path.suffix == ".abandoned" and (step := step_of(path.stem)) is not None:
                found.abandoned.append(step)
        for steps in (found.whole, found.damaged, found.abandoned):
            steps.sort()
        return found

    def begin(self, name: str) -> None:
        for pattern in ("step-*.tmp", "step-*.old"):
            for leftover in self.root.glob(pattern):
                shutil.rmtree(leftover)
        self._temporary(name).mkdir(parents=True)

    def writer(self, name: str) -> StorageWriter:
        writer = FileSystemWriter(self._temporary(name))  # it forces every file to disk before it closes it
        writer.fs = _LocalFileSystem()
        return writer

    def commit(self, name: str, files: dict[str, str]) -> None:
        for file, text in files.items():
            with open(self._temporary(name) / file, "w", encoding="utf-8") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
        _force_to_disk(self._temporary(name))
        replace_folder(self.root / name, self._temporary(name))
        _force_to_disk(self.root)

    def discard(self, name: str) -> None:
        shutil.rmtree(self._temporary(name), ignore_errors=True)

    def reader(self, name: str) -> StorageReader:
        reader = FileSystemReader(self.root / name)
        reader.fs = _LocalFileSystem()
        return reader

    def sizes(self, name: str) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in (self.root / name).iterdir() if path.is_file()}

    def read_text(self, name: str, file: str) -> str | None:
        path = self.root / name / file
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def abandon(self, step: int) -> None:
        replace_folder(self.root / f"step-{step}.abandoned", self.root / f"step-{step}")

    def delete(self, step: int, *, abandoned: bool = False) -> None:
        going = self._temporary(f"step-{step}")  # a name under which half of it is no checkpoint
        shutil.rmtree(going, ignore_errors=True)
        (self.root / f"step-{step}{'.abandoned' if abandoned else ''}").rename(going)
        shutil.rmtree(going)

    def _temporary(self, name: str) -> Path:
        return self.root / f"{name}.tmp"


def _force_to_disk(folder: Path) -> None:
    """Make names in a folder last through a power failure (man 2 fsync)."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
