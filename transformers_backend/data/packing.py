"""From documents to blocks: tokens are concatenated and cut, with labels, and positions that say where documents start.

`Packer` holds what is read and not yet in a batch. Between `feeds.py` and `batches.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from transformers_backend.data.sources import Document
from transformers_backend.loss import IGNORE_INDEX


class Packer:
    """A queue of documents that gives tokens back as blocks."""

    def __init__(self) -> None:
        self._documents: deque[Document] = deque()
        self.tokens = 0  # in the queue

    def add(self, document: Document) -> None:
        if len(document.tokens):
            self._documents.append(document)
            self.tokens += len(document.tokens)

    def clear(self) -> None:
        self._documents.clear()
        self.tokens = 0

    def take(
        self, blocks: int, seq_len: int, rows: slice, *, fill_token: int, positions: bool
    ) -> dict[str, torch.Tensor]:
        """Take the next `blocks` blocks of `seq_len` tokens from the queue, and return those at `rows` as a batch.

        Returns int64 tensors of shape (rows, seq_len): "input_ids", "labels" (aligned, -100 where there is no loss) and
        with `positions` "position_ids", which start at 0 with every document and every block; the label there is -100.
        Where the queue ends the rest is `fill_token` without loss.
        """
        wanted = blocks * seq_len
        documents = self._take_documents(min(wanted, self.tokens))
        filled = sum(len(document.tokens) for document in documents)
        if filled < wanted:
            filler = np.full(wanted - filled, fill_token, dtype=np.int32)
            documents.append(Document(filler, np.full_like(filler, IGNORE_INDEX)))
        shape = (blocks, seq_len)
        tokens = np.concatenate([document.tokens for document in documents])
        input_ids = tokens.reshape(shape)[rows].astype(np.int64)
        if all(document.labels is None for document in documents):
            labels = input_ids.copy()
        else:
            flat = [d.tokens.astype(np.int64) if d.labels is None else d.labels for d in documents]
            labels = np.concatenate(flat).reshape(shape)[rows].astype(np.int64)
        if not positions:
            return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        position_ids = _positions(documents, shape)[rows].astype(np.int64)
        labels[position_ids == 0] = IGNORE_INDEX
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
        }

    def state(self) -> list[dict[str, Any]]:
        """The queue as plain data, a dict for each document or rest of one."""
        return [
            {"tokens": d.tokens.tolist(), "labels": None if d.labels is None else d.labels.tolist()}
            for d in self._documents
        ]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        self.clear()
        for piece in state:
            labels = None if piece["labels"] is None else np.asarray(piece["labels"], dtype=np.int64)
            self.add(Document(np.asarray(piece["tokens"], dtype=np.int64), labels))

    def _take_documents(self, count: int) -> list[Document]:
        """Documents of exactly `count` tokens together; the last one is cut, and its rest stays."""
        taken = []
        self.tokens -= count
        while count:
            document = self._documents.popleft()
            if len(document.tokens) > count:
                document, rest = _cut(document, count)
                self._documents.appendleft(rest)
            taken.append(document)
            count -= len(document.tokens)
        return taken


def _cut(document: Document, count: int) -> tuple[Document, Document]:
    tokens, labels = document.tokens, document.labels
    if labels is None:
        return Document(tokens[:count]), Document(tokens[count:])
    return Document(tokens[:count], labels[:count]), Document(tokens[count:], labels[count:])


def _positions(documents: Sequence[Document], shape: tuple[int, int]) -> np.ndarray:
    """Positions (int32, of shape (blocks, seq_len)) counted from the start of the document or of the block."""
    lengths = [len(document.tokens) for document in documents]
    starts = np.zeros(shape[0] * shape[1], dtype=bool)
    starts[np.cumsum([0, *lengths[:-1]])] = True
    starts = starts.reshape(shape)
    starts[:, 0] = True
    columns = np.arange(shape[1], dtype=np.int32)
    return columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
