"""The next document of each source, in this data rank's order, read ahead by the workers.

`Feeds` belongs to one data rank and stands between `workers.py` and `batches.py`. Its position counts the documents
that were taken; what workers have read ahead is no part of it and is simply read again after a resume.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from transformers_backend.data.order import Cursor, documents_at, merge_cursors
from transformers_backend.data.sources import Collection, Document, Encoder
from transformers_backend.data.streams import Stream, StreamReader, first_position, merge_positions
from transformers_backend.data.workers import CHUNK_TOKENS, Chunk, CollectionReader, Failure, Request, WorkerIterator

# Documents in a chunk at most, for those without any token.
_CHUNK_DOCUMENTS = 256


class _CollectionFeed:
    """One collection's documents for one rank."""

    def __init__(self, collection: Collection, order: tuple[int | None, int, int], *, repeat: bool) -> None:
        self._count, self._repeat = collection.count, repeat
        self._seed, self._rank, self._world_size = order
        self._documents_read, self._tokens_read = 0, 0
        self.generation = 0
        self.ready: deque[Document] = deque()
        self.cursor = Cursor(self._rank, self._world_size)
        self._requested = 0  # documents beyond the cursor that workers were asked for, or that are ready

    @property
    def nothing_under_way(self) -> bool:
        return self._requested == len(self.ready)

    @property
    def tokens_ahead(self) -> float:
        return self._requested * self._mean_tokens

    @property
    def _mean_tokens(self) -> float:
        """Before the first document is read, one of a fourth of a chunk is assumed."""
        return (self._tokens_read + CHUNK_TOKENS / 4) / (self._documents_read + 1)

    def next_numbers(self) -> np.ndarray:
        """The documents to read next, none after the end; they count as requested."""
        wanted = int(min(max(CHUNK_TOKENS / max(self._mean_tokens, 1), 1), _CHUNK_DOCUMENTS))
        places = self.cursor.places(self.cursor.taken + self._requested, wanted)
        if not self._repeat:
            places = places[places < self._count]
        self._requested += len(places)
        return documents_at(places, self._count, self._seed)

    def receive(self, chunk: Chunk) -> None:
        self._documents_read += len(chunk.lengths)
        self._tokens_read += len(chunk.tokens)
        self.ready.extend(chunk.documents())

    def take(self) -> Document:
        self.cursor.taken += 1
        self._requested -= 1
        return self.ready.popleft()

    def ready_in_first_epoch(self) -> tuple[int, bool]:
        """Tokens that are ready of epoch 0, and whether there may be more of it."""
        lengths = [len(document.tokens) for document in self.ready]
        inside = self.cursor.places(self.cursor.taken, len(lengths)) < self._count
        return int(np.dot(lengths, inside)), bool(inside.all())

    def restart(self, cursor: Cursor) -> None:
        self.cursor, self._requested = cursor, 0
        self.ready.clear()
        self.generation += 1

    def state_dict(self) -> dict[str, Any]:
        return self.cursor.state_dict()

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        if len(states) == self._world_size:
            state = states[self._rank]
            cursor = Cursor(self._rank, self._world_size, tuple(state["holes"]), state["next"], state["taken"])
        elif not self._repeat:  # every rank reads everything: all states are the same
            cursor = Cursor(self._rank, self._world_size, (), 0, states[0]["taken"])
        else:
            cursor = merge_cursors(states, self._rank, self._world_size)
        self.restart(cursor)


class _StreamFeed:
    """One stream's documents for one rank, from a reader of its own: a stream cannot be shared by workers."""

    def __init__(
        self, stream: Stream, encode: Encoder, order: tuple[int | None, int, int], *, repeat: bool, prefetch: dict
    ) -> None:
        self._stream, self._encode, self._order, self._repeat = stream, encode, order, repeat
        self._prefetch = prefetch | {"num_workers": min(prefetch["num_workers"], 1)}
        self._reader: WorkerIterator | None = None
        self.ready: deque[tuple[Document, dict[str, Any], int, int]] = deque()
        self.position = first_position()

    def fill(self) -> bool:
        """Make at least one more document ready; False at the end."""
        if self._reader is None:
            reader = StreamReader(self._stream, self._encode, self.position, self._order, self._repeat)
            self._reader = WorkerIterator(reader, None, **self._prefetch)
        answer = next(self._reader, None)
        if isinstance(answer, Failure):
            raise ValueError(answer.message)
        if answer is not None:
            documents = enumerate(answer.chunk.documents(), start=1)
            self.ready.extend((document, answer.position, index, answer.epoch) for index, document in documents)
        return answer is not None

    def take(self) -> Document:
        document, position, index, _ = self.ready.popleft()
        current, *others = position["parts"]
        self.position = position | {"parts": [current | {"place": current["place"] + index}, *others]}
        return document

    def ready_in_first_epoch(self) -> tuple[int, bool]:
        lengths = [len(document.tokens) for document, _, _, epoch in self.ready if epoch == 0]
        return sum(lengths), len(lengths) == len(self.ready)

    def restart(self, position: dict[str, Any]) -> None:
        self.close()
        self.position = position
        self.ready.clear()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def state_dict(self) -> dict[str, Any]:
        return self.position

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        _, rank, world_size = self._order
        if len(states) == world_size or not self._repeat:
            self.restart(states[rank])
        else:
            self.restart(merge_positions(states, rank, world_size))


class Feeds:
    """The sources of one data rank, by number, and the workers that they share.

    Args:
        sources: what is read, each with its encoder.
        order: (seed or None for the source's own order, data rank, number of data ranks).
        repeat: whether a source goes on with its next epoch, for ever.
        num_workers: processes that read and tokenize collections; each stream has one more. 0 means none.
        prefetch_factor: chunks that each of them works ahead.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Collection | Stream, Encoder]],
        order: tuple[int | None, int, int],
        *,
        repeat: bool,
        num_workers: int,
        prefetch_factor: int,
    ) -> None:
        self.num_workers = num_workers
        self._prefetch = {"num_workers": num_workers, "prefetch_factor": prefetch_factor}
        self._sources, self._order, self._repeat = sources, order, repeat
        self._feeds = [
            _CollectionFeed(source, order, repeat=repeat)
            if isinstance(source, Collection)
            else _StreamFeed(source, encode, order, repeat=repeat, prefetch=self._prefetch)
            for source, encode in sources
        ]
        self._shares = [1.0] * len(sources)
        self._wanted: int | None = None
        self._workers: WorkerIterator | None = None

    def name(self, source: int) -> str:
        """For messages."""
        return self._sources[source][0].name

    def read_ahead(self, shares: Sequence[float]) -> None:
        """Tell the shares (0: none) in which documents of the sources are about to be taken."""
        self._shares = list(shares)

    def take(self, source: int) -> Document | None:
        """The next document of a source; None at its end. Raises ValueError for data that cannot be read."""
        feed = self._feeds[source]
        while not feed.ready:
            if not self._read_more(source):
                return None
        return feed.take()

    def require_tokens(self, source: int, needed: int) -> int:
        """The number of tokens, at least `needed` if there are, that this rank gets in epoch 0; nothing is taken."""
        feed = self._feeds[source]
        while True:
            tokens, more = feed.ready_in_first_epoch()
            if tokens >= needed or not more or not self._read_more(source):
                return tokens

    def state_dicts(self) -> list[dict[str, Any]]:
        return [feed.state_dict() for feed in self._feeds]

    def load_state_dicts(self, source: int, states: Sequence[dict[str, Any]]) -> None:
        """Go on where the ranks that saved `states` (of this source, all of them, in rank order) have stopped."""
        self._feeds[source].load(states)

    def restart(self) -> None:
        """Start over with the first document of the first epoch."""
        _, rank, world_size = self._order
        for feed in self._feeds:
            feed.restart(Cursor(rank, world_size) if isinstance(feed, _CollectionFeed) else first_position())

    def close(self) -> None:
        """End the worker processes; what is taken afterwards starts new ones."""
        for feed in self._feeds:
            if isinstance(feed, _StreamFeed):
                feed.close()
        if self._workers is not None:
            self._workers.close()
            self._workers = None
            for feed in self._feeds:
                if isinstance(feed, _CollectionFeed):
                    feed.restart(feed.cursor)

    def _read_more(self, source: int) -> bool:
        """Wait for the workers' next answer, to whichever source it belongs; False if `source` has ended."""
        feed = self._feeds[source]
        if isinstance(feed, _StreamFeed):
            return feed.fill()
        self._wanted = source
        if self._workers is None:
            reader = CollectionReader([pair if isinstance(pair[0], Collection) else None for pair in self._sources])
            self._workers = WorkerIterator(reader, _Requests(self), **self._prefetch)
        request, answer = next(self._workers)
        if request.generation != self._feeds[request.source].generation:
            return True  # of before a restart
        if isinstance(answer, Failure):
            raise ValueError(answer.message)
        self._feeds[request.source].receive(answer)
        return bool(len(request.numbers)) or request.source != source

    def next_request(self) -> Request:
        """What a worker that has room shall read: of the source whose documents would run out first."""
        feeds = {i: feed for i, feed in enumerate(self._feeds) if isinstance(feed, _CollectionFeed)}
        if self._wanted is not None and feeds[self._wanted].nothing_under_way and not feeds[self._wanted].ready:
            source = self._wanted
        else:
            source = min(feeds, key=lambda i: feeds[i].tokens_ahead / max(self._shares[i], 1e-9))
        return Request(source, feeds[source].next_numbers(), feeds[source].generation)


class _Requests:
    """Endless requests, made when the DataLoader asks for one. An empty one where the source has ended."""

    def __init__(self, feeds: Feeds) -> None:
        # No cycle of references: in one the garbage collector takes the queues away before the workers hear of the end.
        self._feeds = weakref.proxy(feeds)

    def __iter__(self) -> Iterator[Request]:
        while True:
            yield self._feeds.next_request()
