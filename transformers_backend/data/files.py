"""Documents of local files: the built-in source, text files (read directly) and records (through `datasets`)."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Any, BinaryIO

from transformers_backend.data.sources import (
    BUILT_IN_SOURCE,
    NOT_EMPTY,
    IndexedSource,
    Order,
    import_datasets,
    require_column,
    require_text,
)

FILE_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json"} | {
    f".{kind}": kind for kind in ("parquet", "csv", "arrow")
}


# Bytes of a text file that make one document; longer files are cut at ends of lines.
TEXT_PIECE = 2**16
# Every so many files of the built-in source are held out of "train" for "validation".
_HOLD_OUT_EVERY = 20


def open_standard_library(split: str, order: Order) -> IndexedSource:
    """The .py files of the running Python's standard library; those that are not UTF-8 (test data) are skipped."""
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

    def read(number: int) -> str:
        try:
            return files[number].read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            return ""

    return IndexedSource(name, read, len(files), order, _fingerprint_of_files(BUILT_IN_SOURCE, root, files))


def open_path(dataset_path: str, split: str, text_column: str, order: Order) -> IndexedSource:
    """Local files: .txt ones are read directly, records through `datasets`, which keeps an Arrow copy in its cache."""
    root = Path(dataset_path).expanduser()
    kind, files = _data_files(root, name := f'dataset_path = "{dataset_path}"')
    files = [file for file in files if file.stat().st_size > 0]
    fingerprint = _fingerprint_of_files(root.resolve().name, root, files)
    if not files:
        raise ValueError(f"{name}: all its files are empty. {NOT_EMPTY}")
    split_name, bracket, bounds = split.partition("[")
    if kind == "text":
        if bracket:
            raise ValueError(
                f'dataset_split = "{split}": {name} is plain text, of which no slice can be taken. Put the files of '
                "each split into a folder of its own."
            )
        pieces = [(file, piece) for file in files for piece in range(-(-file.stat().st_size // TEXT_PIECE))]
        return IndexedSource(
            name, lambda number: _read_text_piece(*pieces[number], name), len(pieces), order, fingerprint
        )

    datasets = import_datasets(name)
    try:
        records = datasets.load_dataset(kind, data_files={split_name: [str(file) for file in files]}, split=split)
    except (ValueError, datasets.exceptions.DatasetsError) as error:  # no record; a bad slice; not what it is named
        raise ValueError(
            f'{name} (dataset_split = "{split}"): must hold at least one record in valid {kind} form, and could not '
            f"be read. Correct the files or the split. ({type(error).__name__}: {error.__cause__ or error})"
        ) from error
    require_column(text_column, records.column_names, name)
    records = records.select_columns([text_column])

    def read_record(number: int) -> str:
        where = f"{name}: record {number} (from 0, over {len(files)} files sorted by name, from {files[0].name})"
        return require_text(records[number][text_column], text_column, where)

    fingerprint |= {"text_column": text_column, "slice": bracket + bounds}
    return IndexedSource(name, read_record, len(records), order, fingerprint)


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


def _read_text_piece(path: Path, piece: int, name: str) -> str:
    """Piece `piece` of a text file: from the first line that begins at or after its start to the one that ends it.

    Short files are one piece. Long ones are cut, so that data ranks can share a single file.
    """
    with path.open("rb") as file:
        start = _line_start(file, piece * TEXT_PIECE)
        end = _line_start(file, (piece + 1) * TEXT_PIECE)
        file.seek(start)
        content = file.read(end - start)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path} is not UTF-8 text ({error}). Convert or remove the file.") from error


def _line_start(file: BinaryIO, position: int) -> int:
    """The first position at or after `position` where a line begins (or the end of the file)."""
    if position == 0:
        return 0
    file.seek(position - 1)
    file.readline()
    return file.tell()
