"""Checkpoints under a URL (`s3://`, `gs://`, `memory://` ...), through fsspec. `storage.py` says what is promised.

The border to fsspec's packages: whatever they raise leaves this file as a StorageError.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import fsspec
import torch
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.futures import Future

from transformers_backend.checkpoint.storage import (
    INCOMPLETE,
    METADATA,
    DamagedFileError,
    Found,
    NamesTheFile,
    ReadsItsIndexOnce,
    Storage,
    StorageError,
    errors_in_file,
    is_checkpoint_name,
    model_step_of,
    reason_of,
    step_of,
)

_ABANDONED = ".abandoned"  # like INCOMPLETE an object that marks the folder that it lies in
_BYTES_AT_ONCE = 2**29  # fetched side by side by a rank


@contextmanager
def _failures_at(place: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # each package has its own: botocore's of no connection or credentials are no OSErrors
        raise StorageError(f"{place}: {reason_of(error)}") from error


def _tells_failures(method: Callable) -> Callable:
    @functools.wraps(method)
    def telling(self, *arguments, **keywords):
        with _failures_at(self.url):
            return method(self, *arguments, **keywords)

    return telling


class RemoteStorage(Storage):
    """Credentials and endpoints are those of the protocol's own settings, e.g. AWS_* variables or ~/.aws for s3."""

    def __init__(self, url: str, *, key: str = "checkpoint.folder") -> None:
        """key: what the user calls the URL, for messages."""
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:  # the protocol is known, its package is not installed
            raise ImportError(f'{key} = "{url}": {error}. For s3:// it is s3fs: pip install s3fs.') from error
        except ValueError as error:
            raise ValueError(
                f'{key} = "{url}": {error}. Name a folder, or a URL of a protocol that fsspec knows, such as '
                "s3://bucket/run."
            ) from error

    def locate(self, name: str) -> str:
        return f"{self.url}/{name}"

    @_tells_failures
    def find(self) -> Found:
        found = Found()
        for name, files in self._folders().items():
            if INCOMPLETE in files:
                continue
            if (step := step_of(name)) is not None:
                kinds = {True: found.abandoned, False: found.whole if METADATA in files else found.damaged}
                kinds[_ABANDONED in files].append(step)
            elif (step := model_step_of(name)) is not None and METADATA in files:
                found.models.append(step)
        found.sort()
        return found

    @_tells_failures
    def begin(self, name: str) -> None:
        for folder, files in self._folders().items():
            if folder == name or INCOMPLETE in files:
                self._remove(folder)
        self._fs.pipe_file(self._path(name, INCOMPLETE), b"being written\n")

    @_tells_failures
    def writer(self, name: str) -> StorageWriter:
        writer = FsspecWriter(self.locate(name), sync_files=False)  # an object is stored when its upload ends
        _give_file_system(writer, self.locate(name))
        return writer

    @_tells_failures
    def commit(self, name: str, files: dict[str, str]) -> None:
        self.check_written(name)
        for file, text in files.items():
            self._fs.pipe_file(self._path(name, file), text.encode())
        self._fs.rm_file(self._path(name, INCOMPLETE))

    @_tells_failures
    def discard(self, name: str) -> None:
        self._remove(name)

    @_tells_failures
    def reader(self, name: str) -> StorageReader:
        reader = _Reader(self.locate(name))
        _give_file_system(reader, self.locate(name))
        return reader

    @_tells_failures
    def sizes(self, name: str) -> dict[str, int]:
        self._fs.invalidate_cache()
        return self._list(self._path(name)).get("", {})

    @_tells_failures
    def read_text(self, name: str, file: str) -> str | None:
        path = self._path(name, file)
        return self._fs.cat_file(path).decode() if self._fs.isfile(path) else None

    @_tells_failures
    def abandon(self, step: int) -> None:
        self._fs.pipe_file(self._path(f"step-{step}", _ABANDONED), b"a run went back to an earlier step\n")

    @_tells_failures
    def delete(self, step: int, *, abandoned: bool = False) -> None:
        # From here on half of it is no checkpoint.
        self._fs.pipe_file(self._path(f"step-{step}", INCOMPLETE), b"being deleted\n")
        self._remove(f"step-{step}")

    @_tells_failures
    def leave_mark(self, mark: str) -> None:
        self._fs.pipe_file(self._path(mark), b"")

    @_tells_failures
    def sees_mark(self, mark: str) -> bool:
        self._fs.invalidate_cache()
        return self._fs.isfile(self._path(mark))

    @_tells_failures
    def remove_mark(self, mark: str) -> None:
        self._fs.rm_file(self._path(mark))

    def _folders(self) -> dict[str, dict[str, int]]:
        """{name: {file: bytes}} of the checkpoints right under the root, in one listing; what else is there is not
        ours, other runs' checkpoints further down among it."""
        self._fs.invalidate_cache()
        return {name: files for name, files in self._list(self._root).items() if is_checkpoint_name(name)}

    def _list(self, root: str) -> dict[str, dict[str, int]]:
        """{folder under the root: {file: bytes}}, however deep."""
        folders: dict[str, dict[str, int]] = {}
        for path, info in self._fs.find(root, detail=True).items():
            folder, _, file = path.removeprefix(root).lstrip("/").rpartition("/")
            folders.setdefault(folder, {})[file] = info["size"]
        return folders

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *filter(None, parts)))

    def _remove(self, name: str) -> None:
        """Delete a folder, its marker last: what is interrupted is still known to be incomplete."""
        self._fs.invalidate_cache()
        marker = self._path(name, INCOMPLETE)
        paths = self._fs.find(self._path(name))
        if others := [path for path in paths if path != marker]:
            self._fs.rm(others)
        if marker in paths:
            self._fs.rm_file(marker)


class _RemoteFileSystem(NamesTheFile, FileSystem):
    storage_errors = (Exception,)  # as in `_failures_at`

    def mkdir(self, path: str | os.PathLike) -> None:
        with _failures_at(path):
            super().mkdir(path)

    def exists(self, path: str | os.PathLike) -> bool:
        with _failures_at(path):
            return super().exists(path)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        with _failures_at(path):
            super().rename(path, new_path)

    def rm_file(self, path: str | os.PathLike) -> None:
        with _failures_at(path):
            super().rm_file(path)


class _Reader(ReadsItsIndexOnce, FsspecReader):
    """torch's reader for URLs, made for many small reads: it fetches the exact ranges of many tensors side by side,
    where the plain one opens file after file and reads ahead in each."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for items in _batches(plan.items, lambda item: self.storage_data[item.storage_index].length):
            for item, (path, content) in zip(items, self._fetch(items), strict=True):
                with errors_in_file(path, (), reading=True):
                    _hand_over(item, content, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fetch(self, items: list[ReadItem]) -> Iterator[tuple[str, bytes]]:
        """Path and bytes of each."""
        places = [self.storage_data[item.storage_index] for item in items]
        paths = [self.fs.concat_path(self.path, place.relative_path) for place in places]
        starts = [place.offset for place in places]
        ends = [place.offset + place.length for place in places]
        with _failures_at(self.path):
            contents = self.fs.fs.cat_ranges(paths, starts, ends, on_error="return")
        for path, place, content in zip(paths, places, contents, strict=True):
            if isinstance(content, FileNotFoundError):
                raise DamagedFileError(f"{path}: {reason_of(content)}") from content
            if isinstance(content, Exception):
                raise StorageError(f"{path}: {reason_of(content)}") from content
            if len(content) < place.length:
                raise DamagedFileError(f"{path}: {len(content)} bytes of {place.length} at {place.offset}")
            yield path, content


def _hand_over(item: ReadItem, content: bytes, planner: LoadPlanner) -> None:
    if item.type == LoadItemType.BYTE_IO:
        planner.load_bytes(item, io.BytesIO(content))
        return
    saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    target = planner.resolve_tensor(item).detach()
    target.copy_(saved[tuple(map(_slice, item.storage_offsets, item.lengths))])
    planner.commit_tensor(item, target)


def _slice(start: int, length: int) -> slice:
    return slice(start, start + length)


def _batches(items: list[ReadItem], size: Callable[[ReadItem], int]) -> Iterator[list[ReadItem]]:
    """Consecutive items, as many at a time as `_BYTES_AT_ONCE` holds, at least one."""
    batch, filled = [], 0
    for item in items:
        if batch and filled + size(item) > _BYTES_AT_ONCE:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += size(item)
    if batch:
        yield batch


def _give_file_system(storage: FsspecReader | FsspecWriter, url: str) -> None:
    storage.fs = _RemoteFileSystem()
    storage.path = storage.fs.init_path(url)
