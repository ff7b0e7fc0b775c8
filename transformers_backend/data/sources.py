"""What a source of documents is, whether it is read by number or streamed; the leaf that `files.py` and `hub.py` use.

A source has a `name` for messages, a `fingerprint` that tells whether a saved position still means the same, and
`read_from(epoch, position)`, which yields (position after it, text) of every document that this data rank reads in
an epoch, in a shuffled or in the source's own order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np

BUILT_IN_SOURCE = "python_stdlib"
# Documents of a stream are shuffled inside windows of this many. `datasets` has a shuffle buffer of its own, but
# loses its content on a resume; a window is simply read again.
SHUFFLE_WINDOW = 1000
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


# (seed or None for the source's own order, data_rank, data_world_size)
Order = tuple["int | None", int, int]


class IndexedSource:
    """Documents that can be read by number: every epoch a full shuffle, of which rank r reads r, r + world, ..."""

    def __init__(self, name: str, read: Callable[[int], str], count: int, order: Order, fingerprint: dict[str, Any]):
        if count == 0:
            raise ValueError(f"{name}: holds no documents. {NOT_EMPTY}")
        self.name = name
        self._read = read
        self._count = count
        self._seed, self._rank, self._world_size = order
        self.fingerprint = fingerprint | {"documents": count}

    def read_from(self, epoch: int, position: int | None) -> Iterator[tuple[int, str]]:
        numbers = _permutation(self._count, self._seed, epoch)[self._rank :: self._world_size]
        for place in range(position or 0, len(numbers)):
            yield place + 1, self._read(int(numbers[place]))


class StreamedSource:
    """Records of an iterable dataset, which knows no numbers: files are shuffled and split over data ranks by
    `datasets`, records are shuffled inside windows of `SHUFFLE_WINDOW`.

    A position is the window's number, the place in its order, and the state of the stream where it starts.
    """

    def __init__(self, name: str, dataset: Any, text_column: str, order: Order, fingerprint: dict[str, Any]):
        self.name = name
        self._dataset = dataset
        self._text_column = text_column
        self._seed, self._rank, self._world_size = order
        self.fingerprint = fingerprint | {"text_column": text_column}
        if dataset.column_names is not None:  # else known only when a record is read
            require_column(text_column, dataset.column_names, name)

    def read_from(self, epoch: int, position: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], str]]:
        position = position or {"window": 0, "place": 0, "stream": None}
        window, place, stream = position["window"], position["place"], position["stream"]
        dataset = self._dataset_of_epoch(epoch)
        if stream is not None:
            dataset.load_state_dict(stream)
        records = iter(dataset)
        while True:
            with _without_shuffle_buffer_message():
                texts = [self._text(record) for record in islice(records, SHUFFLE_WINDOW)]
            if not texts:
                return
            numbers = _permutation(len(texts), self._seed, epoch, window)
            while place < len(texts):
                place += 1
                yield {"window": window, "place": place, "stream": stream}, texts[numbers[place - 1]]
            window, place, stream = window + 1, 0, dataset.state_dict()

    def _dataset_of_epoch(self, epoch: int) -> Any:
        from datasets.distributed import split_dataset_by_node

        dataset = self._dataset
        if self._seed is not None:
            # A buffer of one record: only the order of files changes. Taking records from several files at a time was
            # measured 20 times slower (`datasets` 5.2), and 5.0 then loses the split by files (its issue 8669).
            seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
            dataset = dataset.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        return split_dataset_by_node(dataset, rank=self._rank, world_size=self._world_size)

    def _text(self, record: dict[str, Any]) -> str:
        require_column(self._text_column, record, self.name)
        return require_text(record[self._text_column], self._text_column, f"{self.name}: record {str(record)[:100]}")


def _permutation(count: int, seed: int | None, *counters: int) -> np.ndarray:
    """The numbers below `count`, shuffled by seed and counters, or in order where `seed` is None."""
    return np.arange(count) if seed is None else np.random.default_rng((seed, *counters)).permutation(count)


def require_column(text_column: str, columns: Any, name: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f'text_column = "{text_column}": must be a column of {name}, which has {", ".join(columns)}. '
            "Set text_column to the one with the text."
        )


def require_text(value: Any, text_column: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f'{where} has text_column "{text_column}" = {value!r} of type {type(value).__name__}: must be a string. '
            "Correct or remove the record, or choose another text_column."
        )
    return value


def import_datasets(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name}: reading it needs the `datasets` package, which is not installed: pip install datasets. "
            f'Without it, dataset = "{BUILT_IN_SOURCE}" and .txt files work.'
        ) from error
    return datasets


@contextmanager
def _without_shuffle_buffer_message() -> Iterator[None]:
    """Hold back the warning of `datasets` that a resumed shuffle buffer is refilled: ours holds a single record."""

    def is_other(record: logging.LogRecord) -> bool:
        return "state dict of a shuffle buffer" not in record.getMessage()

    logger = logging.getLogger("datasets.iterable_dataset")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
