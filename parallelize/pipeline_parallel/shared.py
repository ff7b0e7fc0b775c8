"""Gradients of parameters of which several ranks of a pipeline hold a copy (a tied embedding: first and last stage).

Each stage computes the part of the gradient that its own use of the parameter gives. Added up they are the gradient of
the one parameter that the model has, on every rank that holds it, so that optimizers keep the copies equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


@contextlib.contextmanager
def summed_gradients(shared: Mapping[nn.Parameter, tuple[int, ...]], group: dist.ProcessGroup) -> Iterator[None]:
    """What the block adds to the gradients of `shared` parameters is summed over the ranks (of `group`) that hold each.

    Gradients that were there before are left as they are, so that any number of blocks may accumulate. They are back
    after an error in the block, too, without what it added.
    """
    before = {parameter: parameter.grad for parameter in shared}
    for parameter in shared:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, gradient in before.items():
            parameter.grad = gradient
        raise
    for parameter, ranks in shared.items():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        sum_between(gradient, ranks, group)
        if before[parameter] is not None:
            parameter.grad = before[parameter].add_(parameter.grad)


def sum_between(tensor: torch.Tensor, ranks: tuple[int, ...], group: dist.ProcessGroup) -> None:
    """Sum `tensor` in place over some `ranks` of a group, only they call it; bit-equal on all of them."""
    if len(ranks) == dist.get_world_size(group):
        dist.all_reduce(tensor, group=group)
        return
    own = dist.get_rank(group)
    mine = tensor.contiguous()
    parts = {rank: mine if rank == own else torch.empty_like(mine) for rank in ranks}
    exchanges = [
        exchange
        for rank, part in parts.items()
        if rank != own
        for exchange in (
            dist.P2POp(dist.isend, mine, group=group, group_peer=rank),
            dist.P2POp(dist.irecv, part, group=group, group_peer=rank),
        )
    ]
    if exchanges:
        for work in dist.batch_isend_irecv(exchanges):
            work.wait()
    total = parts[ranks[0]].clone()
    for rank in ranks[1:]:  # in this order on every rank
        total += parts[rank]
    tensor.copy_(total)
