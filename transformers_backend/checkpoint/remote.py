"""Checkpoints under a URL (`s3://`, `gs://`, `memory://` ...), through fsspec. `storage.py` says what is promised."""

from __future__ import annotations

import fsspec
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from transformers_backend.checkpoint.storage import METADATA, Found, NamesTheFile, Storage, step_of

_INCOMPLETE, _ABANDONED = ".incomplete", ".abandoned"  # objects that mark the folder that they lie in


class _RemoteFileSystem(NamesTheFile, FileSystem):
    pass


class RemoteStorage(Storage):
    """Credentials and endpoints are those of the protocol's own settings, e.g. AWS_* variables or ~/.aws for s3."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:  # the protocol is known, its package is not installed
            raise ImportError(f'checkpoint.folder = "{url}": {error}.') from error
        except ValueError as error:
            raise ValueError(
                f'checkpoint.folder = "{url}": {error}. Name a folder, or a URL of a protocol that fsspec knows, such '
                "as s3://bucket/run."
            ) from error

    def locate(self, name: str) -> str:
        return f"{self.url}/{name}"

    def find(self) -> Found:
        found = Found()
        for name, files in self._folders().items():
            step = step_of(name)
            if step is None or _INCOMPLETE in files:
                continue
            kinds = {True: found.abandoned, False: found.whole if METADATA in files else found.damaged}
            kinds[_ABANDONED in files].append(step)
        for steps in (found.whole, found.damaged, found.abandoned):
            steps.sort()
        return found

    def begin(self, name: str) -> None:
        for folder, files in self._folders().items():
            if folder == name or _INCOMPLETE in files:
                self._remove(folder)
        self._fs.pipe_file(self._path(name, _INCOMPLETE), b"being written\n")

    def writer(self, name: str) -> StorageWriter:
        writer = FsspecWriter(self.locate(name), sync_files=False)  # an object is stored when its upload ends
        _give_file_system(writer, self.locate(name))
        return writer

    def commit(self, name: str, files: dict[str, str]) -> None:
        for file, text in files.items():
            self._fs.pipe_file(self._path(name, file), text.encode())
        self._fs.rm_file(self._path(name, _INCOMPLETE))

    def discard(self, name: str) -> None:
        self._remove(name)

    def reader(self, name: str) -> StorageReader:
        reader = FsspecReader(self.locate(name))
        _give_file_system(reader, self.locate(name))
        return reader

    def sizes(self, name: str) -> dict[str, int]:
        return self._folders().get(name, {})

    def read_text(self, name: str, file: str) -> str | None:
        path = self._path(name, file)
        return self._fs.cat_file(path).decode() if self._fs.isfile(path) else None

    def abandon(self, step: int) -> None:
        self._fs.pipe_file(self._path(f"step-{step}", _ABANDONED), b"a run went back to an earlier step\n")

    def delete(self, step: int, *, abandoned: bool = False) -> None:
        # From here on half of it is no checkpoint.
        self._fs.pipe_file(self._path(f"step-{step}", _INCOMPLETE), b"being deleted\n")
        self._remove(f"step-{step}")

    def _folders(self) -> dict[str, dict[str, int]]:
        """{folder: {file: bytes}} of the whole root, in one listing."""
        self._fs.invalidate_cache()
        folders: dict[str, dict[str, int]] = {}
        for path, info in self._fs.find(self._root, detail=True).items():
            folder, _, file = path.removeprefix(self._root).lstrip("/").rpartition("/")
            folders.setdefault(folder, {})[file] = info["size"]
        return folders

    def _path(self, name: str, file: str) -> str:
        return f"{self._root}/{name}/{file}"

    def _remove(self, name: str) -> None:
        """Delete a folder, its marker last: what is interrupted is still known to be incomplete."""
        self._fs.invalidate_cache()
        marker = self._path(name, _INCOMPLETE)
        paths = self._fs.find(f"{self._root}/{name}")
        if others := [path for path in paths if path != marker]:
            self._fs.rm(others)
        if marker in paths:
            self._fs.rm_file(marker)


def _give_file_system(storage: FsspecReader | FsspecWriter, url: str) -> None:
    storage.fs = _RemoteFileSystem()
    storage.path = storage.fs.init_path(url)
