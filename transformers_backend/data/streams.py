"""Documents that can only be read from the start: which part of a stream a data rank reads, window by window.

A data rank reads one part after another. A part is what rank r of W reads in an epoch, and its position is plain data,
so that another rank can finish it after a resume on another number of data ranks. The stream of the Hugging Face hub
is opened in `hub.py`; `feeds.py` puts the reader into a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset

from transformers_backend.data.sources import NOT_EMPTY, Document, Encoder, encode_record
from transformers_backend.data.workers import CHUNK_TOKENS, Chunk, Failure, make_chunk

# Documents of a stream are shuffled inside windows of this many. `datasets` has a shuffle buffer of its own, but
# loses its content on a resume; a window is simply read again.
SHUFFLE_WINDOW = 1000


class Records(Protocol):
    """The records of one part, as an IterableDataset of `datasets` gives them."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass
class Stream:
    name: str
    """For messages, e.g. 'dataset = "allenai/c4"'."""

    part: Callable[[int | None, int, int, int], Records]
    """(seed or None for the source's own order, epoch, data_rank, data_world_size) to the records of that part."""

    fingerprint: dict[str, Any]
    """Plain values that tell whether a saved position still means the same."""


@dataclass
class RepeatedIterable:
    """The `part` of a Stream for any iterable that starts over with each `iter()`: rank r of W takes r, r + W, ...

    It is read from its start on a resume, and always in its own order (but for the shuffle inside windows).
    """

    iterable: Iterable[Any]

    def __call__(self, seed: int | None, epoch: int, data_rank: int, data_world_size: int) -> Records:
        return _EveryNth(self.iterable, data_rank, data_world_size)


@dataclass
class _EveryNth:
    iterable: Iterable[Any]
    first: int
    step: int
    taken: int = 0

    def __iter__(self) -> Iterator[Any]:
        for record in islice(self.iterable, self.first + self.taken * self.step, None, self.step):
            self.taken += 1
            yield record

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken = state_dict["taken"]


def first_position() -> dict[str, Any]:
    """Where a data rank starts: no part is begun, and the next is its own of epoch 0."""
    return {"parts": [], "next_epoch": 0}


def merge_positions(positions: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """The position of `rank` where the ranks that saved `positions` (all of them, in rank order) have stopped.

    The new ranks share out the parts that are not finished, and then go on with parts of their own. Where the old
    ranks were in different epochs, those behind leave whole parts too, so that nothing is lost and nothing seen twice.
    """
    next_epoch = max(position["next_epoch"] for position in positions)
    unfinished = [part for position in positions for part in position["parts"]]
    for old_rank, position in enumerate(positions):
        unfinished += [_whole_part(e, old_rank, len(positions)) for e in range(position["next_epoch"], next_epoch)]
    return {"parts": unfinished[rank::world_size], "next_epoch": next_epoch}


def _whole_part(epoch: int, rank: int, world_size: int) -> dict[str, Any]:
    """A part from its start: the window's number, the place in its order, the state of the stream where it begins."""
    return {"epoch": epoch, "rank": rank, "world_size": world_size, "window": 0, "place": 0, "stream": None}


@dataclass(frozen=True)
class StreamChunk:
    chunk: Chunk
    position: dict[str, Any]
    """Where the chunk's first document is; the place of its first part counts on with every document."""

    epoch: int


class StreamReader(IterableDataset):
    """What runs in a worker for a stream: its documents from `position` on, in chunks."""

    def __init__(
        self,
        stream: Stream,
        encode: Encoder,
        position: dict[str, Any],
        order: tuple[int | None, int, int],
        repeat: bool,
    ) -> None:
        self._stream, self._encode, self._position, self._repeat = stream, encode, position, repeat
        self._seed, self._rank, self._world_size = order

    def __iter__(self) -> Iterator[StreamChunk | Failure]:
        parts, next_epoch = list(self._position["parts"]), self._position["next_epoch"]
        try:
            while True:
                if not parts:
                    if next_epoch and not self._repeat:
                        return
                    parts = [_whole_part(next_epoch, self._rank, self._world_size)]
                    next_epoch += 1
                part, *parts = parts
                tokens = 0
                for chunk, position in self._read_part(part):
                    tokens += len(chunk.tokens)
                    yield StreamChunk(chunk, {"parts": [position, *parts], "next_epoch": next_epoch}, part["epoch"])
                if (
                    self._repeat
                    and tokens == 0
                    and part == _whole_part(part["epoch"], part["rank"], part["world_size"])
                ):
                    self._complain_of_no_tokens(part)
        except ValueError as error:
            yield Failure(str(error))

    def _read_part(self, part: dict[str, Any]) -> Iterator[tuple[Chunk, dict[str, Any]]]:
        window, place, stream = part["window"], part["place"], part["stream"]
        dataset = self._stream.part(self._seed, part["epoch"], part["rank"], part["world_size"])
        if stream is not None:
            dataset.load_state_dict(stream)
        records = iter(dataset)
        while texts := next_records(self._stream.name, records, SHUFFLE_WINDOW):
            numbers = np.arange(len(texts))
            if self._seed is not None:
                numbers = np.random.default_rng((self._seed, part["epoch"], window)).permutation(numbers)
            while place < len(texts):
                position = part | {"window": window, "place": place, "stream": stream}
                documents, tokens = [], 0
                while place < len(texts) and tokens < CHUNK_TOKENS:
                    documents.append(encode_stream_record(self._encode, texts[numbers[place]], self._stream.name))
                    tokens += len(documents[-1].tokens)
                    place += 1
                yield make_chunk(documents), position
            window, place, stream = window + 1, 0, dataset.state_dict()

    def _complain_of_no_tokens(self, part: dict[str, Any]) -> None:
        raise ValueError(
            f"{self._stream.name}: data rank {part['rank']} of {part['world_size']} gets no text in an epoch. "
            f"{NOT_EMPTY} Use more text or fewer data ranks."
        )


def encode_stream_record(encode: Encoder, record: Any, name: str) -> Document:
    """The document of a record of the stream of that name; a record has no number there, so errors show its start."""
    return encode_record(encode, record, lambda: f"{name}: record {str(record)[:100]}")


def next_records(name: str, records: Iterator[Any], count: int) -> list[Any]:
    """The next `count` records of the stream of that name, fewer at its end; ValueError where it cannot be read."""
    try:
        with _without_shuffle_buffer_message():
            return list(islice(records, count))
    except (OSError, ValueError) as error:  # a file that went away or is broken, a connection that is lost
        raise ValueError(
            f"{name}: reading stopped ({type(error).__name__}: {error}). Mend the data or the connection, and resume "
            "from the last checkpoint."
        ) from error


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
