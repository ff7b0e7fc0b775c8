"""Attention of one block of queries to one block of keys, and its backward: the small interface under the ring.

Every backend computes, for a block that the mask does not leave empty,

    forward    out (batch, heads, queries, value_dim), log-sum-exp of the scores (batch, heads, queries) in fp32
    backward   gradients of queries, keys and values, given the output and the log-sum-exp of the WHOLE attention

Queries are (batch, heads, queries, dim), keys (batch, key_heads, keys, dim), values (batch, key_heads, keys, value_dim)
with key_heads dividing heads; keys and values are never repeated in memory for longer than a block's computation.
A query that sees nothing in a block has log-sum-exp -inf and output 0 there.
"""

from __future__ import annotations

from typing import Protocol

import torch

from parallelize.context_parallel.masks import BlockMask


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
        key, value = _for_heads(key, query.shape[1]).float(), _for_heads(value, query.shape[1]).float()
        outs, sums = [], []
        for first, last in self._pieces(query):
            scores = self._scores(query[:, :, first:last].float(), key, mask, first, last, scale, softcap)[0]
            log_sum = scores.logsumexp(-1)  # (batch, heads, rows); -inf where nothing is seen
            weights = (scores - log_sum.masked_fill(log_sum.isinf(), 0.0)[..., None]).exp()
            outs.append((weights @ value).to(query.dtype))
            sums.append(log_sum)
        return torch.cat(outs, 2), torch.cat(sums, 2)

    def backward(self, grad_out, query, key, value, out, log_sum_exp, mask, *, scale, softcap=None):
        heads, key_heads = query.shape[1], key.shape[1]
        wide_key, wide_value = _for_heads(key, heads).float(), _for_heads(value, heads).float()
        delta = (grad_out.float() * out.float()).sum(-1)  # (batch, heads, queries)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
        for first, last in self._pieces(query):
            piece, grad = query[:, :, first:last].float(), grad_out[:, :, first:last].float()
            scores, slope = self._scores(piece, wide_key, mask, first, last, scale, softcap)
            weights = (scores - log_sum_exp[:, :, first:last, None]).exp()
            grad_value += weights.transpose(-1, -2) @ grad
            grad_scores = weights * (grad @ wide_value.transpose(-1, -2) - delta[:, :, first:last, None])
            grad_scores = grad_scores * scale if slope is None else grad_scores * slope * scale
            grad_query[:, :, first:last] = (grad_scores @ wide_key).to(query.dtype)
            grad_key += grad_scores.transpose(-1, -2) @ piece
        return (
            grad_query,
            _sum_groups(grad_key, key_heads).to(key.dtype),
            _sum_groups(grad_value, key_heads).to(value.dtype),
        )

    def _pieces(self, query: torch.Tensor):
        length = query.shape[2]
        return [(first, min(first + self._rows, length)) for first in range(0, length, self._rows)]

    @staticmethod
    def _scores(query, key, mask, first, last, scale, softcap):
        """Masked scores (batch, heads, rows, keys), and the slope of the softcap at them or None."""
        scores, slope = query @ key.transpose(-1, -2) * scale, None
        if softcap is not None:
            ratio = torch.tanh(scores / softcap)
            scores, slope = softcap * ratio, 1 - ratio.square()
        if not mask.is_whole:
            scores = scores.masked_fill(~mask.visible(scores.device, first, last), float("-inf"))
        return scores, slope


class CpuFlashBlocks:
    """PyTorch's flash kernel for CPUs. No softcap, and values as wide as keys."""

    name = "torch's CPU flash kernel"

    def forward(self, query, key, value, mask, *, scale, softcap=None):
        assert softcap is None
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask.is_plain_causal, attn_mask=self._bias(query, mask), scale=scale
        )
        hidden = self._hidden_rows(query, mask)
        if hidden is not None:  # the kernel says 0 for the log-sum-exp of a query that sees nothing
            log_sum = log_sum.masked_fill(hidden, float("-inf"))
            out = out.masked_fill(hidden[..., None], 0.0)
        return out, log_sum

    def backward(self, grad_out, query, key, value, out, log_sum_exp, mask, *, scale, softcap=None):
        assert softcap is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, log_sum_exp, 0.0, mask.is_plain_causal,
            attn_mask=self._bias(query, mask), scale=scale,
        )  # fmt: skip

    @staticmethod
    def _bias(query: torch.Tensor, mask: BlockMask) -> torch.Tensor | None:
        if mask.is_whole or mask.is_plain_causal:
            return None
        seen = mask.visible(query.device)
        return torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, float("-inf"))

    @staticmethod
    def _hidden_rows(query: torch.Tensor, mask: BlockMask) -> torch.Tensor | None:
        if mask.is_whole or mask.is_plain_causal:
            return None
        return ~mask.visible(query.device).any(-1)  # (queries,) or (batch, 1, queries)


def _for_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _sum_groups(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    return tensor.unflatten(1, (key_heads, -1)).sum(2)
