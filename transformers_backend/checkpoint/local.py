"""Checkpoints in a folder of this machine or of a shared file system: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from transformers_backend.checkpoint.storage import (
    METADATA,
    Found,
    NamesTheFile,
    ReadsItsIndexOnce,
    Storage,
    model_step_of,
    step_of,
)
from transformers_backend.folders import replace_folder


class _LocalFileSystem(NamesTheFile, FileSystem):
    pass


class _Reader(ReadsItsIndexOnce, FileSystemReader):
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
            elif (step := model_step_of(path.name)) is not None and (path / METADATA).is_file():
                found.models.append(step)
        found.sort()
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
        self.check_written(self._temporary(name).name)
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
        reader = _Reader(self.root / name)
        reader.fs = _LocalFileSystem()
        return reader

    def sizes(self, name: str) -> dict[str, int]:
        folder = self.root / name
        if not folder.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}

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

    def leave_mark(self, mark: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / mark).touch()

    def sees_mark(self, mark: str) -> bool:
        return (self.root / mark).exists()

    def remove_mark(self, mark: str) -> None:
        (self.root / mark).unlink(missing_ok=True)

    def _temporary(self, name: str) -> Path:
        return self.root / f"{name}.tmp"


def _force_to_disk(folder: Path) -> None:
    """Make names in a folder last through a power failure (man 2 fsync)."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
