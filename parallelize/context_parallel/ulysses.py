"""Attention over a shared sequence in two levels: tokens are exchanged for heads, around a ring.

Of n = r * u ranks, u neighbours make a *heads group*. Each rank gives the others of its group its tokens of their
heads, and gets their tokens of its own heads; then ranks with the same heads are a ring of r (`ring.py`); then the
outputs are exchanged back. With u = 1 there is only the ring, with u = n only the exchange, and each head is computed
as on one device. The exchange alone is DeepSpeed-Ulysses (Jacobs et al., https://arxiv.org/abs/2309.14509), the two
levels are USP (Fang and Zhao, https://arxiv.org/abs/2405.07719).

    tokens of 4 ranks, zigzag           [0 | 1 | 2 | 3 | 3 | 2 | 1 | 0]
    of heads groups of 2                [  0   |   1   |   1   |   0  ]    the zigzag of a ring of 2 (`levels.py`)

u must divide the heads; where it does not divide those of keys and values they are repeated until it does, no more
often than needed. Where documents begin is known to every rank, and sinks are cut like the heads.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from parallelize.context_parallel.blocks import for_heads, sum_groups
from parallelize.context_parallel.masks import AttentionRule
from parallelize.context_parallel.ring import HeadsGroup, Ring, ring_backward, ring_forward


def two_level_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    ring: Ring,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ring.ring_forward`, but that the log-sum-exp is that of this rank's heads, (batch, heads / u, u * local).

    Raises a ValueError where u does not divide the heads. With K = least common multiple of key_heads and u it sends

        exchange    (u - 1) / u * batch * local * (heads + K) * (dim + value_dim)    numbers in a forward

    and what a rank of a ring of r sends, of K / u heads (`exchange.py`). In a backward the exchange sends twice as
    many, half of those of K in fp32 where heads were repeated. (Half of all it could do without, had it kept what was
    exchanged; but per-operator recomputation would then keep queries, keys and values of every layer, so better not.)
    """
    if ring.heads is None:
        return ring_forward(query, key, value, sinks, documents, ring, rule)
    if problem := heads_problem(query.shape[1], ring.heads.layout.degree, is_ring=ring.layout.degree > 1):
        raise ValueError(problem)
    query, key, value = _whole(query, key, value, ring.heads)
    out, log_sum = ring_forward(query, key, value, _own(sinks, ring.heads), documents, ring, rule)
    return _to_tokens(out, ring.heads), log_sum


def two_level_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    ring: Ring,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and sinks, in their dtypes, from what `two_level_forward` returned.

    Of the sinks' gradient a rank has that of its own queries and heads: like other parameters' it is summed over ranks.
    """
    dtypes, key_heads, heads, own_sinks = (key.dtype, value.dtype), key.shape[1], ring.heads, sinks
    if heads is not None:
        query, key, value = _whole(query, key, value, heads)
        out, grad_out, own_sinks = _to_heads(out, heads), _to_heads(grad_out, heads), _own(sinks, heads)
    grad_query, *grads, grad_sinks = ring_backward(
        grad_out, query, key, value, own_sinks, documents, out, log_sum, ring, rule
    )
    if heads is None:
        return grad_query, *(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)), grad_sinks
    if sinks is not None:
        all_sinks = torch.zeros_like(sinks)
        _own(all_sinks, heads).copy_(grad_sinks)
        grad_sinks = all_sinks
    grads = [_shared_gradient(grad, key_heads, dtype, heads) for grad, dtype in zip(grads, dtypes, strict=True)]
    return _to_tokens(grad_query, heads), *grads, grad_sinks


def heads_problem(heads: int, degree: int, *, is_ring: bool) -> str | None:
    """The sentence for heads (of a tensor-parallel rank) that `degree` ranks cannot share out, or None.

    is_ring: whether there is a ring over the rest, so that it is not the method "ulysses".
    """
    if heads % degree == 0:
        return None
    key, remedy = 'parallelism.context_parallel_method = "ulysses": context_parallel_degree', ", or another degree"
    if is_ring:
        key, remedy = "parallelism.context_parallel_ulysses_degree", ""
    other = f"it to a divisor of {heads}" if is_ring else 'the method to "ring" or "allgather"'
    return f"{key} = {degree} must divide the attention heads of a rank, and they are {heads}. Set {other}{remedy}."


def _whole(query, key, value, heads: HeadsGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All tokens of this rank's heads, and of as many keys and values as all ranks can share."""
    shared = math.lcm(key.shape[1], heads.layout.degree)
    return tuple(_to_heads(t, heads) for t in (query, for_heads(key, shared), for_heads(value, shared)))


def _shared_gradient(grad: torch.Tensor, key_heads: int, dtype: torch.dtype, heads: HeadsGroup) -> torch.Tensor:
    """Of keys or values as they were before `_whole`; repeated ones are summed before they are rounded."""
    is_repeated = grad.shape[1] * heads.layout.degree != key_heads
    return sum_groups(_to_tokens(grad if is_repeated else grad.to(dtype), heads), key_heads).to(dtype)


def _own(sinks: torch.Tensor | None, heads: HeadsGroup) -> torch.Tensor | None:
    return None if sinks is None else sinks.chunk(heads.layout.degree)[heads.rank]


def _to_heads(tensor: torch.Tensor, heads: HeadsGroup) -> torch.Tensor:
    """(batch, heads, local, dim) -> (batch, heads / u, u * local, dim), tokens in the order of the sequence."""
    sent = tensor.unflatten(1, (heads.layout.degree, -1)).movedim(1, 0)
    return heads.layout.join(list(_exchange(sent, heads)), 2)


def _to_tokens(tensor: torch.Tensor, heads: HeadsGroup) -> torch.Tensor:
    """The way back."""
    sent = torch.stack([heads.layout.shard(tensor, rank, 2) for rank in range(heads.layout.degree)])
    return _exchange(sent, heads).movedim(0, 1).flatten(1, 2)


def _exchange(sent: torch.Tensor, heads: HeadsGroup) -> torch.Tensor:
    """(u, ...): part r goes to rank r, and part s of the result has come from rank s."""
    sent = sent.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=heads.group)
    return received
