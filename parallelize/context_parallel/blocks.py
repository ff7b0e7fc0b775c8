"""Attention of one block of queries to one block of keys, and its backward: the small interface under the ring.

Every backend computes, for a block that the mask does not leave empty,

    forward    out (batch, heads, queries, value_dim), log-sum-exp of the scores (batch, heads, queries) in fp32
    backward   gradients of queries, keys and values, given the output and the log-sum-exp of the WHOLE attention

(outputs and gradients in fp32 where the backend has them so: they are added up in fp32, and rounded once at the end).

Queries are (batch, heads, queries, dim), keys (batch, key_heads, keys, dim), values (batch, key_heads, keys, value_dim)
with key_heads dividing heads; keys and values are never repeated in memory for longer than a block's computation.
A query that sees nothing in a block has log-sum-exp -inf and output 0 there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from parallelize.context_parallel.layout import Chunk
from parallelize.context_parallel.masks import BlockMask
from parallelize.context_parallel.merge import empty_sum


class BlockAttention(Protocol):
    name: str

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: BlockMask,
        *,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        log_sum_exp: torch.Tensor,
        mask: BlockMask,
        *,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


class ReferenceBlocks:
    """Plain torch, some queries at a time: every mask, softcap and head size; fp32 inside."""

    name = "reference"

    def __init__(self, rows: int = 256) -> None:
        """rows: queries whose scores are in memory at a time."""
        self._rows = rows

    def forward(self, query, key, value, mask, *, scale, softcap=None):
        key, value = for_heads(key, query.shape[1]).float(), for_heads(value, query.shape[1]).float()
        out, log_sums = empty_sum(query, value.shape[-1])
        mask = mask.on(query.device)
        for first, last, seen in self._pieces(mask):
            piece = query[:, :, first:last].float()
            scores = self._scores(piece, key[:, :, seen], mask, first, last, seen, scale, softcap)[0]
            log_sum = scores.logsumexp(-1)  # (batch, heads, rows); -inf where nothing is seen
            weights = (scores - log_sum.masked_fill(log_sum.isinf(), 0.0)[..., None]).exp()
            out[:, :, first:last] = weights @ value[:, :, seen]
            log_sums[:, :, first:last] = log_sum
        return out, log_sums

    def backward(self, grad_out, query, key, value, out, log_sum_exp, mask, *, scale, softcap=None):
        heads, key_heads = query.shape[1], key.shape[1]
        wide_key, wide_value = for_heads(key, heads).float(), for_heads(value, heads).float()
        delta = (grad_out.float() * out.float()).sum(-1)  # (batch, heads, queries)
        mask = mask.on(query.device)
        grad_query = torch.zeros_like(query, dtype=torch.float32)
        grad_key, grad_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
        for first, last, seen in self._pieces(mask):
            piece, grad = query[:, :, first:last].float(), grad_out[:, :, first:last].float()
            scores, slope = self._scores(piece, wide_key[:, :, seen], mask, first, last, seen, scale, softcap)
            log_sum = log_sum_exp[:, :, first:last, None]
            weights = (scores - log_sum.masked_fill(log_sum.isinf(), 0.0)).exp()
            grad_value[:, :, seen] += weights.transpose(-1, -2) @ grad
            grad_scores = weights * (grad @ wide_value[:, :, seen].transpose(-1, -2) - delta[:, :, first:last, None])
            grad_scores = grad_scores * scale if slope is None else grad_scores * slope * scale
            grad_query[:, :, first:last] = grad_scores @ wide_key[:, :, seen]
            grad_key[:, :, seen] += grad_scores.transpose(-1, -2) @ piece
        return grad_query, sum_groups(grad_key, key_heads), sum_groups(grad_value, key_heads)

    def _pieces(self, mask: BlockMask) -> Iterator[tuple[int, int, slice]]:
        """(first, last, slice of the keys that may be seen) of some queries at a time that see any."""
        for first in range(0, len(mask.queries), self._rows):
            last = min(first + self._rows, len(mask.queries))
            queries = Chunk(mask.queries.start + first, mask.queries.start + last)
            seen = mask.rule.reach(queries, mask.keys)
            if seen is not None:
                yield first, last, slice(seen.start - mask.keys.start, seen.stop - mask.keys.start)

    @staticmethod
    def _scores(query, key, mask, first, last, seen, scale, softcap):
        """Masked scores (batch, heads, rows, keys), and the slope of the softcap at them or None."""
        scores, slope = query @ key.transpose(-1, -2) * scale, None
        if softcap is not None:
            ratio = torch.tanh(scores / softcap)
            scores, slope = softcap * ratio, 1 - ratio.square()
        if not mask.is_whole:
            scores = scores.masked_fill(~mask.visible(scores.device, first, last)[..., seen], float("-inf"))
        return scores, slope


def for_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values (batch, key_heads, ...) repeated for every head: (batch, heads, ...)."""
    return tensor if heads == tensor.shape[1] else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def sum_groups(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """The gradient of what `for_heads` repeated."""
    return tensor if key_heads == tensor.shape[1] else tensor.unflatten(1, (key_heads, -1)).sum(2)
