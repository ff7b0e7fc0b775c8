"""Documents of local files: the built-in source, text files (read directly) and records (through `datasets`)."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from transformers_backend.data.sources import (
    BUILT_IN_SOURCE,
    NOT_EMPTY,
    ChooseFormat,
    Collection,
    Encoder,
    import_datasets,
)

FILE_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json"} | {
    f".{kind}": kind for kind in ("parquet", "csv", "arrow")
}


# Bytes of a text file that make one document; longer files are cut at ends of lines.
TEXT_PIECE = 2**16
# Every so many files of the built-in source are held out of "train" for "validation".
_HOLD_OUT_EVERY = 20


def open_standard_library(split: str, choose_format: ChooseFormat) -> tuple[Collection, Encoder]:
    """The .py files of the running Python's standard library; those that are not UTF-8 (test data) are empty."""
    name = f'dataset = "{BUILT_IN_SOURCE}"'
    if split not in ("train", "validation"):
        raise ValueError(
            f'dataset_split = "{split}": {name} has the splits "train" and "validation". Name one of them.'
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = _files_below(root, skip_folders=("site-packages", "dist-packages"))
    files = [path for path in paths if path.suffix == ".py"]
    held_out = split == "validation"
    files = [path for index, path in enumerate(files) if (index % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1) == held_out]
    fingerprint = _fingerprint_of_files(BUILT_IN_SOURCE, root, files)
    pieces = _TextPieces(name, files, [file.stat().st_size for file in files], whole=True)
    return pieces.collection(fingerprint), choose_format(None, name).encode


def open_path(dataset_path: str, split: str, choose_format: ChooseFormat) -> tuple[Collection, Encoder]:
    """Local files: .txt ones are read directly, records through `datasets`, which keeps an Arrow copy in its cache."""
    root = Path(dataset_path).expanduser()
    kind, files = _data_files(root, name := f'dataset_path = "{dataset_path}"')
    sizes = [file.stat().st_size for file in files]
    files, sizes = [file for file, size in zip(files, sizes, strict=True) if size], [size for size in sizes if size]
    fingerprint = _fingerprint_of_files(root.resolve().name, root, files)
    if not files:
        raise ValueError(f"{name}: all its files are empty. {NOT_EMPTY}")
    if kind == "text":
        if "[" in split:
            raise ValueError(
                f'dataset_split = "{split}": {name} is plain text, of which no slice can be taken. Put the files of '
                "each split into a folder of its own."
            )
        return _TextPieces(name, files, sizes).collection(fingerprint), choose_format(None, name).encode
    return _open_records(kind, files, sizes, split, name, fingerprint, choose_format)


def _open_records(
    kind: str,
    files: list[Path],
    sizes: list[int],
    split: str,
    name: str,
    fingerprint: dict[str, Any],
    choose_format: ChooseFormat,
) -> tuple[Collection, Encoder]:
    split_name, bracket, bounds = split.partition("[")
    datasets = import_datasets(name)
    try:
        records = datasets.load_dataset(kind, data_files={split_name: [str(file) for file in files]}, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # none; a bad slice; a broken file
        raise ValueError(
            f'{name} (dataset_split = "{split}"): must hold at least one record in valid {kind} form, and could not '
            f"be read. Correct the files or the split. ({type(error).__name__}: {error.__cause__ or error})"
        ) from error
    record_format = choose_format(records.column_names, name)
    fingerprint |= {"columns": ", ".join(record_format.columns), "slice": bracket + bounds}
    records = records.select_columns(list(record_format.columns))
    places = _RecordPlaces(kind, tuple(files), split if bracket else None)
    reader = _Records(name, files, sizes, records)
    return Collection(name, reader, len(records), fingerprint, places), record_format.encode


class _Records:
    """Row number -> record. Every read looks at one of the files, in turns, so that a change is not found out only by
    the resume that refuses it: `datasets` itself reads its copy in the cache."""

    def __init__(self, name: str, files: list[Path], sizes: list[int], records: Any) -> None:
        self._name, self._files, self._sizes, self._records = name, files, sizes, records
        self._turn = 0

    def __call__(self, number: int) -> Any:
        index = self._turn % len(self._files)
        self._turn += 1
        try:
            _require_size(self._name, self._files[index], self._sizes[index], self._files[index].stat().st_size)
        except OSError as error:
            raise _unreadable(self._name, self._files[index], self._sizes[index], error) from error
        return self._records[number]


@dataclass(frozen=True)
class _RecordPlaces:
    """The file and row of a record, which `datasets` does not keep: files are read again, one by one, for an error."""

    kind: str
    files: tuple[Path, ...]
    slice: str | None

    def __call__(self, number: int) -> str:
        if self.slice is not None:  # where it begins is known to `datasets` alone
            return f'row {number} of dataset_split = "{self.slice}", over {len(self.files)} files from {self.files[0]}'
        datasets = import_datasets("dataset_path")
        for file in self.files[:-1]:
            rows = len(datasets.load_dataset(self.kind, data_files={"train": [str(file)]}, split="train"))
            if number < rows:
                return f"file {file}, row {number}"
            number -= rows
        return f"file {self.files[-1]}, row {number}"


class _TextPieces:
    """Text files as documents: a short file is one, a longer one is cut into pieces (unless `whole`).

    Every read compares the file's size with the one it had when the run began, because the pieces follow from it.
    """

    def __init__(self, name: str, files: list[Path], sizes: list[int], *, whole: bool = False) -> None:
        self._name, self._files, self._sizes, self._whole = name, files, sizes, whole
        self._piece = TEXT_PIECE
        counts = [1 if whole else -(-size // self._piece) for size in sizes]
        self._ends = list(itertools.accumulate(counts))  # of each file, the number of pieces up to its end

    def collection(self, fingerprint: dict[str, Any]) -> Collection:
        return Collection(self._name, self.read, self._ends[-1] if self._ends else 0, fingerprint, self.where)

    def read(self, number: int) -> str:
        index, piece = self._place(number)
        try:
            with self._files[index].open("rb") as file:
                _require_size(self._name, self._files[index], self._sizes[index], os.fstat(file.fileno()).st_size)
                content = file.read() if self._whole else self._read_piece(file, piece)
        except OSError as error:
            raise _unreadable(self._name, self._files[index], self._sizes[index], error) from error
        try:
            return content.decode("utf-8" if piece else "utf-8-sig")  # without a byte order mark at the file's start
        except UnicodeDecodeError as error:
            if self._whole:
                return ""
            raise ValueError(
                f"{self._name}: {self._files[index]} is not UTF-8 text ({error}). Convert or remove the file."
            ) from error

    def where(self, number: int) -> str:
        index, piece = self._place(number)
        return f"file {self._files[index]}" + f", from byte {piece * self._piece} on" * bool(piece)

    def _place(self, number: int) -> tuple[int, int]:
        index = bisect.bisect_right(self._ends, number)
        return index, number - (self._ends[index - 1] if index else 0)

    def _read_piece(self, file: BinaryIO, piece: int) -> bytes:
        """From the first line that begins at or after the piece's start to the one that ends it."""
        start = _line_start(file, piece * self._piece)
        end = _line_start(file, (piece + 1) * self._piece)
        file.seek(start)
        return file.read(end - start)


def _require_size(name: str, file: Path, at_start: int, now: int) -> None:
    if now != at_start:
        raise ValueError(
            f"{name}: {file} had {at_start:,} bytes when the run began and has {now:,} now: data must not change "
            "during a run. Restore the file and resume from the last checkpoint, or start a new run."
        )


def _unreadable(name: str, file: Path, at_start: int, error: OSError) -> ValueError:
    return ValueError(
        f"{name}: {file} was there when the run began, with {at_start:,} bytes, and cannot be read now "
        f"({error.strerror}). Put it back and resume from the last checkpoint."
    )


def _data_files(root: Path, name: str) -> tuple[str, list[Path]]:
    """Return the kind of the data files at `root` ("text", "json", ...) and their sorted paths."""
    supported = ", ".join(FILE_KINDS)
    if root.is_file():
        if root.suffix.lower() not in FILE_KINDS:
            raise ValueError(
                f"{name}: unknown file type {root.suffix!r}: must be one of {supported}. Convert the file."
            )
        return FILE_KINDS[root.suffix.lower()], [root]
    if not root.is_dir():
        raise ValueError(f"{name}: no such file or folder; it must exist on every machine. Correct the path.")
    if (root / "dataset_dict.json").is_file():
        raise ValueError(f"{name}: holds several splits in folders. Give one of them, e.g. {root / 'train'}.")
    # `Dataset.save_to_disk` writes these two beside its .arrow files.
    files = [file for file in _files_below(root) if file.name not in ("dataset_info.json", "state.json")]
    files = [file for file in files if file.suffix.lower() in FILE_KINDS]
    kinds = sorted({FILE_KINDS[file.suffix.lower()] for file in files})
    if not files:
        raise ValueError(f"{name}: holds no file of a known type: must have some of {supported}. Convert the files.")
    if len(kinds) > 1:
        examples = ", ".join(next(f.name for f in files if FILE_KINDS[f.suffix.lower()] == kind) for kind in kinds)
        raise ValueError(
            f"{name}: holds files of several kinds ({examples}): must be of one kind. Give a file or a subfolder."
        )
    return kinds[0], files


def _files_below(root: Path, skip_folders: tuple[str, ...] = ()) -> list[Path]:
    """All files in `root` and its folders, sorted by relative path; hidden ones and `skip_folders` are left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in skip_folders and not s.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _fingerprint_of_files(name: str, root: Path, files: list[Path]) -> dict[str, Any]:
    """The name, and a digest of relative paths and sizes: data may move, and content would have to be read."""
    listing = "\n".join(f"{file.relative_to(root).as_posix()} {file.stat().st_size}" for file in files)
    return {"dataset": name, "files": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]}


def _line_start(file: BinaryIO, position: int) -> int:
    """The first position at or after `position` where a line begins (or the end of the file)."""
    if position == 0:
        return 0
    file.seek(position - 1)
    file.readline()
    return file.tell()
