"""Attention over a shared sequence by one collective: every rank gets all keys and values, and keeps its own queries.

The simplest way, and with few ranks or a fast network often a quick one: nothing overlaps, and while a layer computes
each rank has the keys and values of the whole sequence. They are gathered again in the backward instead of being kept;
their gradients are summed where they belong by one reduce-scatter in fp32. (This is how Llama 3 was trained on long
contexts: https://arxiv.org/abs/2407.21783, section 3.3.2.)
"""

from __future__ import annotations

import math

import torch

from parallelize.context_parallel.blockwise import Blockwise, Gradients, Visit
from parallelize.context_parallel.masks import MaskRule
from parallelize.context_parallel.merge import sinks_gradient
from parallelize.context_parallel.ring import Ring

_collectives = torch.ops._c10d_functional


def allgather_attention(
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
    """Arguments, result and who calls it as for `ring.ring_attention`.

    A rank sends its keys and values to all others, (degree - 1) * batch * key_heads * local * (dim + value_dim) numbers
    in a forward; the same again in a backward, and as many in fp32.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _AllGatherAttention.apply(query, key, value, sinks, documents, ring, rule, scale, softcap)


class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, documents, ring, rule, scale, softcap):
        blockwise = ring.blockwise(rule, scale, softcap)
        visits = _gathered(ring, blockwise, key, value)
        out, log_sum = blockwise.forward(query, value.shape[-1], visits, sinks, documents)
        ctx.save_for_backward(query, key, value, sinks, documents, out, log_sum)
        ctx.ring, ctx.blockwise = ring, blockwise
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, sinks, documents, out, log_sum = ctx.saved_tensors
        degree, length = ctx.ring.layout.degree, ctx.ring.layout.chunk_length
        totals = [
            torch.zeros((degree, *tensor.shape), dtype=torch.float32, device=tensor.device) for tensor in (key, value)
        ]

        def found(source: int, grads: Gradients) -> None:
            for number, parts in grads.items():
                for total, part in zip(totals, parts, strict=True):
                    total[source, :, :, number * length : (number + 1) * length] = part

        visits = _gathered(ctx.ring, ctx.blockwise, key, value)
        grad_query = ctx.blockwise.backward(grad_out, query, out, log_sum, visits, documents, found)
        grads = []
        for total, like in zip(totals, (key, value), strict=True):
            own = _collectives.reduce_scatter_tensor(total.flatten(0, 1), "sum", degree, ctx.ring.group.group_name)
            grads.append(_collectives.wait_tensor(own).to(like.dtype))
        grad_sinks = sinks_gradient(sinks, log_sum, grad_out, out) if ctx.needs_input_grad[3] else None
        return grad_query, *grads, grad_sinks, None, None, None, None, None


def _gathered(ring: Ring, blockwise: Blockwise, key: torch.Tensor, value: torch.Tensor) -> list[Visit]:
    every_key, every_value = (_gather(tensor, ring) for tensor in (key, value))
    return [
        (source, *(dict(enumerate(blockwise.chunks(every[source]))) for every in (every_key, every_value)))
        for source in range(ring.layout.degree)
    ]


def _gather(tensor: torch.Tensor, ring: Ring) -> torch.Tensor:
    """(degree, *shape), from all ranks in their order."""
    degree = ring.layout.degree
    gathered = _collectives.all_gather_into_tensor(tensor.contiguous(), degree, ring.group.group_name)
    return _collectives.wait_tensor(gathered).unflatten(0, (degree, -1))
