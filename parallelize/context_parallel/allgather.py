"""Attention over a shared sequence by one collective: every rank gets all keys and values, and keeps its own queries.

The simplest way, and with few ranks or a fast network often a quick one: nothing overlaps, and while a layer computes
each rank has the keys and values of the whole sequence. They are gathered again in the backward instead of being kept;
their gradients are summed where they belong by one reduce-scatter in fp32. (This is how Llama 3 was trained on long
contexts: https://arxiv.org/abs/2407.21783, section 3.3.2.)
"""

from __future__ import annotations

import torch

from parallelize.context_parallel.blockwise import Blockwise, Gradients, Visit
from parallelize.context_parallel.masks import AttentionRule
from parallelize.context_parallel.merge import sinks_gradient
from parallelize.context_parallel.ring import Ring

_collectives = torch.ops._c10d_functional


def allgather_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    ring: Ring,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ring.ring_forward`.

    A rank sends its keys and values to all others, (degree - 1) * batch * key_heads * local * (dim + value_dim) numbers
    in a forward; the same again in a backward, and as many in fp32.
    """
    blockwise = ring.blockwise(rule)
    return blockwise.forward(query, value.shape[-1], _gathered(ring, blockwise, key, value), sinks, documents)


def allgather_backward(
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
    """As `ulysses.two_level_backward`, without heads groups."""
    blockwise = ring.blockwise(rule)
    degree, length = ring.layout.degree, ring.layout.chunk_length
    totals = [
        torch.zeros((degree, *tensor.shape), dtype=torch.float32, device=tensor.device) for tensor in (key, value)
    ]

    def found(source: int, grads: Gradients) -> None:
        for number, parts in grads.items():
            for total, part in zip(totals, parts, strict=True):
                total[source, :, :, number * length : (number + 1) * length] = part

    visits = _gathered(ring, blockwise, key, value)
    grad_query = blockwise.backward(grad_out, query, out, log_sum, visits, documents, found)
    grads = []
    for total, like in zip(totals, (key, value), strict=True):
        own = _collectives.reduce_scatter_tensor(total.flatten(0, 1), "sum", degree, ring.group.group_name)
        grads.append(_collectives.wait_tensor(own).to(like.dtype))
    grad_sinks = None if sinks is None else sinks_gradient(sinks, log_sum, grad_out, out)
    return grad_query, *grads, grad_sinks


def _gathered(ring: Ring, blockwise: Blockwise, key: torch.Tensor, value: torch.Tensor) -> list[Visit]:
    every_key, every_value = (_gather(tensor, ring) for tensor in (key, value))
    return [
        (source, *(dict(enumerate(blockwise.views(every[source]))) for every in (every_key, every_value)))
        for source in range(ring.layout.degree)
    ]


def _gather(tensor: torch.Tensor, ring: Ring) -> torch.Tensor:
    """(degree, *shape), from all ranks in their order."""
    degree = ring.layout.degree
    gathered = _collectives.all_gather_into_tensor(tensor.contiguous(), degree, ring.group.group_name)
    return _collectives.wait_tensor(gathered).unflatten(0, (degree, -1))
