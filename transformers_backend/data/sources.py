"""What a source of documents is, and the checks that all of them share; the leaf of the package.

A `Collection` is read by number, in any order; what can only be read from its start is a `Stream` (`streams.py`). An
`Encoder` makes a `Document`, tokens and labels, of a record of either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

BUILT_IN_SOURCE = "python_stdlib"
HUB_ALIASES = {"c4": ("allenai/c4", "en")}  # dataset and configuration; as torchtitan's files name it
NOT_EMPTY = "Point it to data that is not empty."


@dataclass(frozen=True)
class Document:
    """What an encoder makes of a record."""

    tokens: np.ndarray
    """Token numbers, integers of any width, shape (tokens,)."""

    labels: np.ndarray | None = None
    """Same shape, -100 where there is no loss. None: every token is a target."""


Encoder = Callable[[Any], Document]  # picklable: it runs in worker processes


@dataclass
class Collection:
    """Documents that can be read by number."""

    name: str
    """For messages, e.g. 'dataset_path = "x.jsonl"'."""

    read: Callable[[int], Any]
    """Number to record: a string, a dict, or an array of tokens. Picklable; raises ValueError that names the file."""

    count: int
    """Number of documents."""

    fingerprint: dict[str, Any]
    """Plain values that tell whether a saved position still means the same."""

    where: Callable[[int], str]
    """Number to "file x.jsonl, row 17", for errors. Rows count from 0."""


@dataclass(frozen=True)
class Format:
    """How the records of a source become documents: the columns that are read, and what encodes a record."""

    columns: Sequence[str]
    encode: Encoder


ChooseFormat = Callable[["Sequence[str] | None", str], Format]
"""(columns of the source or None where only a record shows them, name of the source) -> its format; ValueError if the
columns that the job names are not there."""


@dataclass(frozen=True)
class TextEncoder:
    """Records that are text, or have it in a column, to documents."""

    encode_text: Callable[[str], np.ndarray]
    text_column: str

    def __call__(self, record: Any) -> Document:
        if isinstance(record, dict):
            require_column(self.text_column, record, "the record")
            record = record[self.text_column]
        if not isinstance(record, str):
            raise ValueError(
                f'text_column "{self.text_column}" = {record!r} of type {type(record).__name__}: must be a string. '
                "Correct or remove the record, or choose another text_column"
            )
        return Document(self.encode_text(record) if record else np.empty(0, np.int32))


def encode_record(encode: Encoder, record: Any, where: Callable[[], str]) -> Document:
    """The record's document, or ValueError that says where the record is."""
    try:
        document = encode(record)
    # What tokenizers and templates raise for a record that is not what they expect.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{where()} cannot be tokenized: {kind}{error}.") from error
    assert document.tokens.ndim == 1
    assert document.labels is None or document.labels.shape == document.tokens.shape
    return document


def require_column(column: str, columns: Any, name: str, key: str = "text_column") -> None:
    if column not in columns:
        raise ValueError(
            f'{key} = "{column}": must be a column of {name}, which has {", ".join(map(str, columns))}. '
            f"Set {key} to the one with the text."
        )


def import_datasets(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name}: reading it needs the `datasets` package, which is not installed: pip install datasets. "
            f'Without it, dataset = "{BUILT_IN_SOURCE}" and .txt files work.'
        ) from error
    return datasets
