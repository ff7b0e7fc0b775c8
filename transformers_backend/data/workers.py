"""Reading and tokenizing, in worker processes or in this one: torch's DataLoader over chunks of documents.

The main process says which documents come next and gets them in that order; what a worker does depends on nothing else,
so that results are the same for any number of workers. Between `sources.py` and `feeds.py`.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from transformers_backend.data.sources import Collection, Document, Encoder, encode_record
from transformers_backend.signals import STOP_SIGNALS, die_with_parent, shield_child_process

# Documents of about so many tokens are read at a time: little beside a batch of a large model, and enough that the
# queue between processes costs next to nothing.
CHUNK_TOKENS = 2**16


@dataclass(frozen=True)
class Chunk:
    """Documents one after the other, in as few arrays as can be: a queue between processes is slow with many."""

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None

    def documents(self) -> Iterator[Document]:
        end = 0
        for length in self.lengths.tolist():
            start, end = end, end + length
            yield Document(self.tokens[start:end], None if self.labels is None else self.labels[start:end])


@dataclass(frozen=True)
class Failure:
    """What a worker says instead of a chunk when the data is at fault; the main process raises ValueError."""

    message: str


@dataclass(frozen=True)
class Request:
    """Documents of one collection that a worker shall read."""

    source: int
    numbers: np.ndarray
    generation: int
    """Counts the restarts of the sequence; answers to requests from before the last one are thrown away."""


def make_chunk(documents: Sequence[Document]) -> Chunk:
    labels = None
    if any(document.labels is not None for document in documents):
        labels = np.concatenate([d.tokens if d.labels is None else d.labels for d in documents])
        labels = labels.astype(np.int64, copy=False)  # it holds -100, which unsigned tokens would not
    tokens = np.concatenate([document.tokens for document in documents]) if documents else np.empty(0, np.int32)
    return Chunk(tokens, np.array([len(document.tokens) for document in documents], dtype=np.int64), labels)


class CollectionReader(Dataset):
    """What runs in a worker for collections: answers a Request."""

    def __init__(self, sources: Sequence[tuple[Collection, Encoder] | None]) -> None:
        self._sources = sources  # None in place of a stream

    def __getitem__(self, request: Request) -> tuple[Request, Chunk | Failure]:
        if not len(request.numbers):
            return request, make_chunk([])
        collection, encode = self._sources[request.source]
        try:
            return request, make_chunk([_read(collection, encode, number) for number in request.numbers.tolist()])
        except ValueError as error:
            return request, Failure(str(error))


def _read(collection: Collection, encode: Encoder, number: int) -> Document:
    record = collection.read(number)
    return encode_record(encode, record, lambda: f"{collection.name}: {collection.where(number)}")


class WorkerIterator:
    """Iterator over what `dataset` gives for each of `requests` (None: over an IterableDataset itself), in order.

    `requests` is iterated in this process, as workers have room. With `num_workers = 0` all happens in this process,
    one request at a time.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        requests: Iterable[Any] | None,
        *,
        num_workers: int,
        prefetch_factor: int,
    ) -> None:
        # Forked workers start in milliseconds and need not import Transformers again.
        fork = num_workers > 0 and sys.platform == "linux"
        from_main_thread = threading.current_thread() is threading.main_thread()
        before = set(multiprocessing.active_children())
        with warnings.catch_warnings(), _blocked_signals() if fork else contextlib.nullcontext():
            # Workers never touch what other threads of this process may hold: they read files and tokenize.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more than there are cores
            self._iterator = iter(
                DataLoader(
                    dataset,
                    batch_size=None,
                    sampler=requests,
                    num_workers=num_workers,
                    prefetch_factor=prefetch_factor if num_workers else None,
                    collate_fn=_as_it_is,
                    worker_init_fn=functools.partial(_start_worker, forked_by_main_thread=fork and from_main_thread),
                    multiprocessing_context="fork" if fork else None,
                    generator=torch.Generator(),  # its seeds must not be drawn from the run's random numbers
                )
            )
        self._workers = [process for process in multiprocessing.active_children() if process not in before]

    def __iter__(self) -> WorkerIterator:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def close(self) -> None:
        """End the workers; one that does not end by itself (it may wait for a network) is killed."""
        self._iterator = iter(())  # the DataLoader's own iterator tells its workers to end when it goes
        for worker in self._workers:
            worker.join(timeout=1)
            if worker.is_alive():
                worker.kill()
                worker.join()
        self._workers = []


def _as_it_is(item: Any) -> Any:
    return item


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Hold the stop signals back from this thread; processes that it forks inherit that until they shield themselves.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group. The trainer finishes its step, for which it may
    still need data, saves, and ends its workers itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker_id: int, *, forked_by_main_thread: bool) -> None:
    shield_child_process()
    # A killed trainer takes its workers along at once: they hold copies of its sockets, by which its peers and the next
    # run on this machine would think that it lives. (The signal comes when the thread ends that has forked.)
    if forked_by_main_thread:
        die_with_parent()
    # Each worker is one process of many; threads of the tokenizer in each would only get into each other's way. This
    # variable is the only switch that `tokenizers` has.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
