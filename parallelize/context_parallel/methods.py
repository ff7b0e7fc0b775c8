"""The ways in which ranks compute attention over a sequence that they share, by name; all with one signature.

Models call them as one operator (`operator.py`), which finds the ranks by their address; `shared_attention` takes a
`Ring` as it is, which need not be one of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from parallelize.context_parallel.allgather import allgather_backward, allgather_forward
from parallelize.context_parallel.masks import AttentionRule
from parallelize.context_parallel.ring import Ring
from parallelize.context_parallel.ulysses import two_level_backward, two_level_forward


@dataclass(frozen=True)
class Method:
    """Functions with the arguments of `ulysses.two_level_forward` and `ulysses.two_level_backward`."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]


METHODS: dict[str, Method] = {
    "ring": Method(two_level_forward, two_level_backward),
    "allgather": Method(allgather_forward, allgather_backward),
}
"""The values of `ParallelismConfig.context_parallel_method`, but for "ulysses": heads groups around a ring of one."""


def shared_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ring: Ring,
    rule: AttentionRule,
    *,
    sinks: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of the whole sequence, by the method of `ring`.

    query (batch, heads, local, dim), key (batch, key_heads, local, dim), value (batch, key_heads, local, value_dim),
    each this rank's part of the sequence by `ring.layout`. sinks: a score for each head (heads,) that takes part in
    every softmax and has no value. documents: the number of each token's document (batch, seq), of the whole sequence
    and on the CPU, whatever device computes; queries see their own only.
    Returns (batch, heads, local, value_dim) in the dtype of `query`. Every rank calls it, forward and backward.
    """
    return _SharedAttention.apply(query, key, value, sinks, documents, ring, rule)


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, documents, ring, rule):
        out, log_sum = METHODS[ring.method].forward(query, key, value, sinks, documents, ring, rule)
        ctx.save_for_backward(query, key, value, sinks, documents, out, log_sum)
        ctx.ring, ctx.rule = ring, rule
        return out

    @staticmethod
    def backward(ctx, grad_out):
        found = METHODS[ctx.ring.method].backward(grad_out, *ctx.saved_tensors, ctx.ring, ctx.rule)
        return *found, None, None, None
