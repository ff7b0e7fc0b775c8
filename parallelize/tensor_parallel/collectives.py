"""The communication of tensor parallelism: six functions, each with its backward.

They come in pairs, because a value that every rank has whole gets whole gradients, and a value of which every rank
has a part (a term of a sum, or a shard) gets partial ones:

    function            forward           backward          turns                        into
    enter               identity          all-reduce        the whole value              input of a split computation
    leave               all-reduce        identity          terms of a sum               the whole value
    gather_and_enter    all-gather        reduce-scatter    shards                       input of a split computation
    leave_and_scatter   reduce-scatter    all-gather        terms of a sum               shards
    cut                 own shard         all-gather        the whole value              shards
    join                all-gather        own shard         shards                       the whole value

(`enter` and `leave` are the f and g of Megatron-LM, https://arxiv.org/abs/1909.08053; the two in the middle are the
g and g-bar of its sequence parallelism, https://arxiv.org/abs/2205.05198, section 4.2.2.)

All are made of torch's functional collectives, which the compiler can trace and CommDebugMode counts. They are called
as operators, because their Python names changed between the versions of torch that are supported here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

_collectives = torch.ops._c10d_functional


def enter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The same tensor; its gradient, of which every rank computes a term, is summed over the group."""
    return _Enter.apply(tensor, group)


def leave(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of every rank's term; its gradient is the whole one, which each term gets as it is."""
    return _Leave.apply(tensor, group)


def gather_and_enter(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' shards along `dim` in the order of the ranks; the gradients' terms are summed and cut again."""
    return _GatherAndEnter.apply(tensor, dim, group)


def leave_and_scatter(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's shard along `dim`, which the group divides evenly, of the sum of every rank's term."""
    return _LeaveAndScatter.apply(tensor, dim, group)


def cut(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's shard along `dim`, which the group divides evenly, of a tensor that every rank has."""
    return _Cut.apply(tensor, dim, group)


def join(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' shards along `dim`, for a computation that every rank then does alike."""
    return _Join.apply(tensor, dim, group)


def pad_to_multiple(tensor: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """`tensor` with zeros at the end of `dim`, as few as make its size a multiple."""
    missing = -tensor.shape[dim] % multiple
    if missing == 0:
        return tensor
    after = tensor.dim() - 1 - (dim % tensor.dim())
    return F.pad(tensor, (0, 0) * after + (0, missing))


def all_reduce(tensor: torch.Tensor, operation: str, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's tensor, combined by "sum" or "max"; without a backward."""
    return _collectives.wait_tensor(_collectives.all_reduce(tensor.contiguous(), operation, group.group_name))


def all_gather(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's tensor, all of one shape, side by side along `dim`; without a backward."""
    size = dist.get_world_size(group)
    gathered = _collectives.all_gather_into_tensor(tensor.contiguous(), size, group.group_name)
    gathered = _collectives.wait_tensor(gathered)  # (size x first dimension, ...)
    return gathered if dim == 0 else torch.cat(gathered.chunk(size), dim)


def reduce_scatter(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's shard along `dim` of the sum of every rank's tensor; without a backward."""
    size = dist.get_world_size(group)
    stacked = tensor.contiguous() if dim == 0 else torch.cat(tensor.chunk(size, dim))
    return _collectives.wait_tensor(_collectives.reduce_scatter_tensor(stacked, "sum", size, group.group_name))


def _own_shard(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    return tensor.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, "sum", ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        return all_reduce(tensor, "sum", group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _GatherAndEnter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, group):
        ctx.dim, ctx.group = dim, group
        return all_gather(tensor, dim, group)

    @staticmethod
    def backward(ctx, gradient):
        return reduce_scatter(gradient, ctx.dim, ctx.group), None, None


class _LeaveAndScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, group):
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(tensor, dim, group)

    @staticmethod
    def backward(ctx, gradient):
        return all_gather(gradient, ctx.dim, ctx.group), None, None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, group):
        ctx.dim, ctx.group = dim, group
        return _own_shard(tensor, dim, group)

    @staticmethod
    def backward(ctx, gradient):
        return all_gather(gradient, ctx.dim, ctx.group), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, group):
        ctx.dim, ctx.group = dim, group
        return all_gather(tensor, dim, group)

    @staticmethod
    def backward(ctx, gradient):
        return _own_shard(gradient, ctx.dim, ctx.group), None, None
