"""Computing with local shards: a module keeps DTensor parameters, and its forward sees plain local tensors.

FSDP2, the optimizer and checkpoints see the DTensors. Inside `forward` there is no DTensor arithmetic: every rank
runs the module's own code on its part, and `collectives.py` is the only communication.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from parallelize.tensor_parallel.collectives import enter, gather_and_enter
from parallelize.tensor_parallel.plan import Segment

LocalValue = Callable[[torch.Tensor], torch.Tensor]
"""From the local part of a parameter to the tensor that the module computes with."""


def compute_locally(module: nn.Module, values: Mapping[str, LocalValue]) -> None:
    """Let `module.forward` see, for each parameter that `values` names, the local value instead.

    Only parameters that this forward reads itself: the module's own, or with a dotted name those of an inner module
    whose forward is not what reads them. Everything else keeps its hands off.
    """
    module._local_values = {**vars(module).get("_local_values", {}), **values}
    plain_forward = module.forward

    @functools.wraps(plain_forward)
    def forward(*args, **kwargs):
        with _local_parameters([module]):
            return plain_forward(*args, **kwargs)

    module.forward = forward


def with_local_parameters(layer: nn.Module, forward: Callable) -> Callable:
    """`forward` of a whole layer, called while all its modules have their local values already.

    For a compiled forward: its graph then has plain tensors as inputs, and no parameters that change places in it.
    """
    modules = [module for module in layer.modules() if "_local_values" in vars(module)]
    if not modules:
        return forward

    @functools.wraps(forward)
    def forward_with_local_parameters(*args, **kwargs):
        with _local_parameters(modules):
            return forward(*args, **kwargs)

    return forward_with_local_parameters


@contextlib.contextmanager
def _local_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, parameters of `modules` that are DTensors are their local values."""
    places = [place for module in modules for place in _places(module)]
    try:
        for owner, name, parameter, value in places:
            owner._parameters[name] = value(parameter.to_local())
        yield
    finally:
        for owner, name, parameter, _ in places:
            owner._parameters[name] = parameter


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, DTensor, LocalValue]]:
    for full_name, value in module._local_values.items():
        inner, _, name = full_name.rpartition(".")
        owner = module.get_submodule(inner)
        if isinstance(parameter := owner._parameters[name], DTensor):
            yield owner, name, parameter, value


def own_part(shard: torch.Tensor) -> torch.Tensor:
    """The shard as it is; also what every rank has whole and has the whole gradient of."""
    return shard


def summed(group: dist.ProcessGroup) -> LocalValue:
    """A whole parameter that every rank computes a part of the gradient of.

    What is summed is the gradient of this one backward, before it is added to those of earlier micro-batches.
    """
    return lambda whole: _enter_precisely(whole, group)


def _enter_precisely(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`enter` whose gradient is summed in at least fp32: low-precision terms are rounded once, after the sum."""
    return enter(whole.to(torch.promote_types(whole.dtype, torch.float32)), group).to(whole.dtype)


def on_first_rank(group: dist.ProcessGroup) -> LocalValue:
    """A bias, added to one term of a sum over ranks. The others add 0 times it: all take part in its backward."""
    factor = float(dist.get_rank(group) == 0)
    return lambda whole: _enter_precisely(whole, group) * factor


def own_heads(segment: Segment, group: dist.ProcessGroup) -> LocalValue:
    """Rows of the head that this rank shares with others, of a parameter that has a row or value a head.

    There are fewer heads than ranks and little in a row, so every rank has them all.
    """
    degree, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = segment.size // segment.heads
    first = rank * segment.heads // degree * rows
    return lambda whole: _enter_precisely(whole, group).narrow(0, first, rows)


def shared_heads(segments: tuple[Segment, ...], dim: int, group: dist.ProcessGroup) -> LocalValue:
    """A colwise shard with segments of fewer heads than ranks: those are gathered, and each rank takes its head.

    The shard is (..., sum of sizes / ranks, ...) along `dim`. Keys and values are small beside queries, so gathering
    their weights costs little, and every number of them is stored once.
    """
    degree, rank = dist.get_world_size(group), dist.get_rank(group)

    def value(shard: torch.Tensor) -> torch.Tensor:
        parts = []
        for segment, part in zip(segments, shard.split([s.size // degree for s in segments], dim), strict=True):
            if segment.is_shared(degree):
                width = segment.size // segment.heads
                whole = gather_and_enter(part, dim, group)
                part = whole.narrow(dim, rank * segment.heads // degree * width, width)
            parts.append(part)
        return torch.cat(parts, dim)

    return value
