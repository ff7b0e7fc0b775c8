"""Which keys a query sees, by description instead of by a tensor of (seq, seq).

A mask is causal, and may have a sliding window, attention chunks and documents. For a block of queries and a block of
keys it says whether there is anything to compute, and only where a block is neither empty nor whole it makes a tensor
of the block's size. With the scale and the softcap of the scores it is the rule by which every method attends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from parallelize.context_parallel.layout import Chunk


@dataclass(frozen=True)
class MaskRule:
    """A causal mask by the places of tokens in the whole sequence."""

    window: int | None = None
    """A query sees this many tokens, itself included; None sees all before it."""
    chunk: int | None = None
    """Queries see only keys of their own chunk of this many tokens (chunked attention); None: no chunks."""

    def is_empty(self, queries: Chunk, keys: Chunk) -> bool:
        """Whether no query of a block sees any key of the other."""
        if keys.start >= queries.stop:
            return True
        if self.window is not None and queries.start - (keys.stop - 1) >= self.window:
            return True
        return self.chunk is not None and queries.start // self.chunk > (keys.stop - 1) // self.chunk

    def reach(self, queries: Chunk, keys: Chunk) -> Chunk | None:
        """The keys from the first to the last that any of the queries sees; None where none sees any."""
        if self.is_empty(queries, keys):
            return None
        start = keys.start
        if self.window is not None:
            start = max(start, queries.start - self.window + 1)
        if self.chunk is not None:
            start = max(start, queries.start // self.chunk * self.chunk)
        return Chunk(start, min(keys.stop, queries.stop))

    def is_whole(self, queries: Chunk, keys: Chunk) -> bool:
        """Whether every query sees every key."""
        if keys.stop - 1 > queries.start:
            return False
        if self.window is not None and queries.stop - 1 - keys.start >= self.window:
            return False
        return self.chunk is None or keys.start // self.chunk == (queries.stop - 1) // self.chunk

    def is_plain_causal(self, queries: Chunk, keys: Chunk) -> bool:
        """Whether the blocks are the same tokens and nothing but the causal order hides any."""
        if queries != keys:
            return False
        if self.window is not None and len(queries) > self.window:
            return False
        return self.chunk is None or queries.start // self.chunk == (queries.stop - 1) // self.chunk

    def sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Whether queries see keys, bool, by their places in the whole sequence, of shapes that broadcast."""
        distance = queries - keys
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance < self.window)
        if self.chunk is not None:
            seen = seen & (queries // self.chunk == keys // self.chunk)
        return seen


CAUSAL = MaskRule()


@dataclass(frozen=True)
class AttentionRule:
    """What is computed of queries, keys and values, whoever has them: softmax(cap(scale * q k^T), where seen) v."""

    mask: MaskRule = CAUSAL
    """Which keys a query sees."""
    scale: float | None = None
    """Of the scores; None is 1 / sqrt(dim)."""
    softcap: float | None = None
    """Bounds the scores, cap(z) = softcap * tanh(z / softcap); None does not."""

    def scale_for(self, query: torch.Tensor) -> float:
        """Of queries (..., dim)."""
        return 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale


@dataclass(frozen=True)
class BlockMask:
    """What the queries of one chunk see of the keys of another."""

    rule: MaskRule
    queries: Chunk
    keys: Chunk
    query_documents: torch.Tensor | None = None
    """Number of each query's document, (batch, queries); None where a sequence is one document. On the CPU, where
    blocks are cut by them without waiting for an accelerator."""
    key_documents: torch.Tensor | None = None

    @property
    def is_whole(self) -> bool:
        return self.query_documents is None and self.rule.is_whole(self.queries, self.keys)

    @property
    def is_plain_causal(self) -> bool:
        return self.query_documents is None and self.rule.is_plain_causal(self.queries, self.keys)

    def visible(self, device: torch.device, first: int = 0, last: int | None = None) -> torch.Tensor:
        """bool, (queries, keys) or with documents (batch, 1, queries, keys), of the queries from `first` to `last`."""
        last = len(self.queries) if last is None else last
        places = torch.arange(self.queries.start + first, self.queries.start + last, device=device)
        seen = self.rule.sees(places[:, None], torch.arange(self.keys.start, self.keys.stop, device=device))
        if self.query_documents is None:
            return seen
        same = self.query_documents[:, first:last, None].to(device) == self.key_documents[:, None, :].to(device)
        return (seen & same)[:, None]

    def on(self, device: torch.device) -> BlockMask:
        """The same with its documents on a device, to be asked several times what is visible there."""
        if self.query_documents is None:
            return self
        documents = (numbers.to(device, non_blocking=True) for numbers in (self.query_documents, self.key_documents))
        return BlockMask(self.rule, self.queries, self.keys, *documents)
