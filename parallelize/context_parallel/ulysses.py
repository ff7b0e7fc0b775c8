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


def ulysses_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    ring: Ring,
    rule: MaskRule,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ring.ring_forward`, but that the log-sum-exp is that of this rank's heads, (batch, heads / degree, seq).

    Raises a ValueError where the degree does not divide the heads. With n ranks and K = least common multiple of
    key_heads and n, a rank sends (n - 1) / n * batch * local * (heads + K) * (dim + value_dim) numbers in a forward; in
    a backward twice as many (less would have to be kept in memory), a quarter of those of K in fp32.
    """
    if problem := ulysses_problem(query.shape[1], ring.layout.degree):
        raise ValueError(problem)
    query, key, value = _whole(query, key, value, ring)
    out, log_sum = _blockwise(ring, rule, scale, softcap).forward(
        query, value.shape[-1], _visit(key, value), _own(sinks, ring), documents
    )
    return _to_tokens(out, ring), log_sum


def ulysses_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    ring: Ring,
    rule: MaskRule,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `ring.ring_backward`; of the sinks' gradient a rank has that of its own heads."""
    dtypes, key_heads = (key.dtype, value.dtype), key.shape[1]
    query, key, value = _whole(query, key, value, ring)
    out, grad_out = _to_heads(out, ring), _to_heads(grad_out, ring)
    grads = []
    grad_query = _blockwise(ring, rule, scale, softcap).backward(
        grad_out, query, out, log_sum, _visit(key, value), documents, lambda _, found: grads.extend(found[0])
    )
    grad_sinks = None
    if sinks is not None:  # the other heads' are zero: like gradients of other parameters they are summed over ranks
        grad_sinks = torch.zeros_like(sinks)
        _own(grad_sinks, ring).copy_(sinks_gradient(_own(sinks, ring), log_sum, grad_out, out))
    grad_key, grad_value = (
        sum_groups(_to_tokens(grad, ring), key_heads).to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    )
    return _to_tokens(grad_query, ring), grad_key, grad_value, grad_sinks


def ulysses_problem(heads: int, degree: int) -> str | None:
    """The sentence for heads (of a tensor-parallel rank) that cannot be shared out, or None."""
    if heads % degree == 0:
        return None
    return (
        f'parallelism.context_parallel_method = "ulysses": context_parallel_degree = {degree} must divide the '
        f'attention heads of a rank, and they are {heads}. Set the method to "ring" or "allgather", or another degree.'
    )


def _whole(query, key, value, ring: Ring) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All tokens of this rank's heads, and of as many keys and values as all ranks can share."""
    shared = math.lcm(key.shape[1], ring.layout.degree)
    return tuple(_to_heads(t, ring) for t in (query, for_heads(key, shared), for_heads(value, shared)))


def _blockwise(ring: Ring, rule: MaskRule, scale: float, softcap: float | None) -> Blockwise:
    layout = SequenceLayout(ring.layout.length, 1, is_zigzag=False)
    return Blockwise(layout, 0, ring.blocks, rule, scale, softcap)


def _own(sinks: torch.Tensor | None, ring: Ring) -> torch.Tensor | None:
    return None if sinks is None else sinks.chunk(ring.layout.degree)[ring.rank]


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
