"""Attention over a shared sequence by exchanging it for heads: every rank gets all tokens of some of the heads.

DeepSpeed-Ulysses: Jacobs et al., https://arxiv.org/abs/2309.14509. Each head is then computed as on one device, in one
block. The degree must divide the heads; where it does not divide those of keys and values they are repeated until it
does, no more often than needed. Where documents begin is known to every rank, and sinks are cut like the heads.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from parallelize.context_parallel.blocks import for_heads, sum_groups
from parallelize.context_parallel.blockwise import Blockwise
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import MaskRule
from parallelize.context_parallel.merge import sinks_gradient
from parallelize.context_parallel.ring import Ring


def ulysses_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ring: Ring,
    rule: MaskRule,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments, result and who calls it as for `ring.ring_attention`. Raises a ValueError where the degree does not
    divide the heads.

    With n ranks and K = least common multiple of key_heads and n, a rank sends (n - 1) / n * batch * local *
    (heads * (dim + value_dim) + K * (dim + value_dim)) numbers in a forward and as many in a backward, there those of K
    in fp32.
    """
    if problem := ulysses_problem(query.shape[1], ring.layout.degree):
        raise ValueError(problem)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _UlyssesAttention.apply(query, key, value, sinks, documents, ring, rule, scale, softcap)


def ulysses_problem(heads: int, degree: int) -> str | None:
    """The sentence for heads (of a tensor-parallel rank) that cannot be shared out, or None."""
    if heads % degree == 0:
        return None
    return (
        f'parallelism.context_parallel_method = "ulysses": context_parallel_degree = {degree} must divide the '
        f'attention heads of a rank, and they are {heads}. Set the method to "ring" or "allgather", or another degree.'
    )


class _UlyssesAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, documents, ring, rule, scale, softcap):
        degree, key_heads = ring.layout.degree, key.shape[1]
        shared = math.lcm(key_heads, degree)
        whole = [_to_heads(t, ring) for t in (query, for_heads(key, shared), for_heads(value, shared))]
        heads = whole[0].shape[1]
        mine = None if sinks is None else sinks[ring.rank * heads : (ring.rank + 1) * heads]
        blockwise = Blockwise(
            SequenceLayout(ring.layout.length, 1, is_zigzag=False), 0, ring.blocks, rule, scale, softcap
        )
        out, log_sum = blockwise.forward(whole[0], value.shape[-1], _visit(*whole[1:]), mine, documents)
        ctx.save_for_backward(*whole, sinks, mine, documents, out, log_sum)
        ctx.ring, ctx.blockwise, ctx.key_heads = ring, blockwise, key_heads
        return _to_tokens(out, ring)

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, sinks, mine, documents, out, log_sum = ctx.saved_tensors
        ring, grads = ctx.ring, []
        grad_out = _to_heads(grad_out, ring)
        grad_query = ctx.blockwise.backward(
            grad_out, query, out, log_sum, _visit(key, value), documents, lambda _, found: grads.extend(found[0])
        )
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            # Each rank's own heads; like those of all other parameters they are summed over the ranks afterwards.
            grad_sinks = torch.zeros_like(sinks)
            heads = query.shape[1]
            grad_sinks[ring.rank * heads : (ring.rank + 1) * heads] = sinks_gradient(mine, log_sum, grad_out, out)
        grad_key, grad_value = (sum_groups(_to_tokens(grad, ring), ctx.key_heads).to(key.dtype) for grad in grads)
        return _to_tokens(grad_query, ring), grad_key, grad_value, grad_sinks, None, None, None, None, None


def _visit(key: torch.Tensor, value: torch.Tensor) -> list:
    return [(0, {0: key}, {0: value})]


def _to_heads(tensor: torch.Tensor, ring: Ring) -> torch.Tensor:
    """(batch, heads, local, dim) -> (batch, heads / degree, seq, dim), tokens in the order of the sequence."""
    sent = tensor.unflatten(1, (ring.layout.degree, -1)).movedim(1, 0)
    return ring.layout.join(list(_exchange(sent, ring)), 2)


def _to_tokens(tensor: torch.Tensor, ring: Ring) -> torch.Tensor:
    """The way back."""
    sent = torch.stack([ring.layout.shard(tensor, rank, 2) for rank in range(ring.layout.degree)])
    return _exchange(sent, ring).movedim(0, 1).flatten(1, 2)


def _exchange(sent: torch.Tensor, ring: Ring) -> torch.Tensor:
    """(degree, ...): part r goes to rank r, and part s of the result has come from rank s."""
    sent = sent.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=ring.group)
    return received
