"""Cuts the partial mask of a block into rectangles that a kernel with no mask but the causal one can compute.

    window of 4, queries 8 to 12            the last four keys are a causal square,
    keys 5 6 7 8 9 . .                      what all queries see is a whole rectangle,
         5 6 7 8                            the first ones are a causal square seen from the other side: with queries
           6 7 8 9                          and keys in reverse order the same kernel computes it.
             7 8 9 10
               8 9 10 11

Documents are cut apart first, each row of the batch by itself; inside a document there are only window and chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from parallelize.context_parallel.layout import Chunk
from parallelize.context_parallel.masks import BlockMask, MaskRule

SMALLEST_TILE = 32
"""Queries: with narrower windows or chunks the pieces would be too many for what they compute."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of a block: tokens by their places in the whole sequence, `row` of the batch or all (None)."""

    queries: Chunk
    keys: Chunk
    kind: Literal["whole", "causal", "reversed"]
    row: int | None = None


def cut(mask: BlockMask) -> list[Piece] | None:
    """The pieces that together are what a block's mask lets be seen, each pair once.

    None where they would be too many for what they compute.
    """
    rule = mask.rule
    if any(size is not None and size < SMALLEST_TILE for size in (rule.window, rule.chunk)):
        return None
    if mask.query_documents is None:
        return list(_pieces(rule, mask.queries, mask.keys, None))
    pieces = []
    most = mask.query_documents.shape[0] * (4 + len(mask.queries) // SMALLEST_TILE)
    for row, (queries, keys) in enumerate(zip(mask.query_documents, mask.key_documents, strict=True)):
        found = _runs(keys, mask.keys.start)
        for document, query_run in _runs(queries, mask.queries.start):
            for other, key_run in found:
                if document == other and not rule.is_empty(query_run, key_run):
                    pieces += _pieces(rule, query_run, key_run, row)
        if len(pieces) > most:
            return None
    return pieces


def _runs(documents: torch.Tensor, start: int) -> list[tuple[int, Chunk]]:
    """(number, tokens) of every document among consecutive tokens (tokens,) from `start` on."""
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), documents.diff().nonzero().flatten() + 1])
    numbers, begins = documents[begins].tolist(), begins.tolist()
    ends = [*begins[1:], len(documents)]
    return [
        (number, Chunk(start + begin, start + end)) for number, begin, end in zip(numbers, begins, ends, strict=True)
    ]


def _pieces(rule: MaskRule, queries: Chunk, keys: Chunk, row: int | None) -> Iterator[Piece]:
    for tokens in _tiles(rule, queries, keys):
        first, stop = tokens.start, tokens.stop
        lowest, seen_by_all = _first_seen(rule, first), _first_seen(rule, stop - 1)
        if lowest < seen_by_all and keys.start <= lowest and lowest + len(tokens) <= keys.stop:
            yield Piece(tokens, Chunk(lowest, lowest + len(tokens)), "reversed", row)
            seen_by_all += 1  # the last key of that square is the first that all see
        before = Chunk(max(keys.start, seen_by_all), min(keys.stop, first))
        if before.start < before.stop:
            yield Piece(tokens, before, "whole", row)
        if keys.start <= first and stop <= keys.stop:
            yield Piece(tokens, tokens, "causal", row)


def _first_seen(rule: MaskRule, query: int) -> int:
    """The first key that a query sees; below 0 where its window reaches over the beginning."""
    first = 0 if rule.window is None else query - rule.window + 1
    return first if rule.chunk is None else max(first, query // rule.chunk * rule.chunk)


def _tiles(rule: MaskRule, queries: Chunk, keys: Chunk) -> Iterator[Chunk]:
    """The queries in tiles whose squares lie either inside the keys or outside, and do not overlap each other."""
    begins = [queries.start]
    if rule.chunk is not None:
        begins += range(queries.start // rule.chunk * rule.chunk, queries.stop, rule.chunk)
    bounds = {*begins, queries.stop, keys.start, keys.stop}
    if rule.window is not None:
        reach = rule.window - 1
        if rule.chunk is not None:
            bounds |= {begin + reach for begin in begins}
        bounds |= {keys.start + reach, keys.stop + reach}
    inside = sorted(bound for bound in bounds if queries.start <= bound <= queries.stop)
    for start, stop in itertools.pairwise(inside):
        size = stop - start
        if rule.window is not None and keys.start + rule.window - 1 <= start < keys.stop + rule.window - 1:
            size = _rounded(rule.window - 1)
        for begin in range(start, stop, size):
            yield Chunk(begin, min(begin + size, stop))


def _rounded(size: int) -> int:
    return size // 128 * 128 or size
