"""Putting block outputs together: each weighted by its share of the softmax, in fp32; and the sinks' share.

The merge is that of FlashAttention's split softmax (Dao et al., https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import math

import torch


def empty_sum(query: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (batch, heads, queries, value_dim) and log-sum-exp (batch, heads, queries) of queries that have seen
    nothing yet, fp32. In memory the output's heads lie beside each other, as models want it next."""
    batch, heads, queries, _ = query.shape
    out = query.new_zeros((batch, queries, heads, value_dim), dtype=torch.float32).transpose(1, 2)
    return out, query.new_full(query.shape[:-1], -math.inf, dtype=torch.float32)


def merge(out: torch.Tensor, log_sum: torch.Tensor, block_out: torch.Tensor, block_sum: torch.Tensor) -> None:
    """Add a block to what was there, in place."""
    total = torch.logaddexp(log_sum, block_sum)
    seen = total.masked_fill(total.isinf(), 0.0)  # where neither has seen a key both weights are exp(-inf) = 0
    out *= (log_sum - seen).exp()[..., None]
    out.addcmul_(block_out.float(), (block_sum - seen).exp()[..., None])
    log_sum.copy_(total)


def add_sinks(out: torch.Tensor, log_sum: torch.Tensor, sinks: torch.Tensor) -> None:
    """Let a score of each head (heads,), which has no value, take part in every softmax, in place."""
    total = torch.logaddexp(log_sum, sinks.float()[None, :, None])
    out *= (log_sum - total).exp()[..., None]
    log_sum.copy_(total)


def sinks_gradient(
    sinks: torch.Tensor, log_sum: torch.Tensor, grad_out: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Of the sinks (heads,), from these queries alone; log_sum and out include the sinks."""
    weights = (sinks.float()[None, :, None] - log_sum).exp()
    return -(weights * (grad_out.float() * out.float()).sum(-1)).sum((0, 2)).to(sinks.dtype)
