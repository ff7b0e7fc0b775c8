"""Fully sharded data parallelism (FSDP2): every parameter lives as a dim-0 shard on each data rank.

One unit per decoder layer, so that a layer's parameters are gathered just before it runs (forward: all-gather) and
its gradients are reduced while the layers before it still run backward (backward: all-gather, reduce-scatter). What
is left (norms, head, and the embedding where it is tied to the head) forms the root unit.

HSDP adds a replicate dimension: shards are reduced with reduce-scatter inside a group, then all-reduced across.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard


def apply_fsdp(
    root: nn.Module,
    units: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Shard `units` one by one and the rest of `root` as one unit, in place.

    param_dtype: dtype of gathered parameters and of the computation; None keeps the parameters' own. The sharded
    master copy, the gradients that reach the optimizer and its state keep the parameters' dtype.
    reduce_dtype: dtype in which gradients are summed over ranks; None keeps param_dtype.
    reshard_after_forward: free gathered parameters after a unit's forward and gather them again in the backward. The
    root unit is never resharded in between, since the backward starts with it.

    What is gathered ahead is left to FSDP2: the next unit as soon as the host reaches it, which runs ahead of the
    device as nothing in a step waits for that, and in the backward the unit before. To name units to gather earlier
    would hold one more of them, and pays only where the host is the slower one.

    Gradients are summed, not averaged: the loss is already divided by the global number of target tokens.
    """
    mixed_precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    options = {"mesh": mesh, "mp_policy": mixed_precision, "offload_policy": offload}
    for unit in units:
        fully_shard(unit, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(root, reshard_after_forward=False, **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this a factor is folded into the reduction, which gloo cannot do (no PREMUL_SUM).
            module.set_force_sum_reduction_for_comms(True)


def reshard(root: nn.Module) -> None:
    """Free gathered parameters after a forward that no backward follows; without FSDP2 units it does nothing."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def reduced_once(root: nn.Module) -> Iterator[None]:
    """Within the block any number of backwards accumulate unsharded gradients; they are reduced over ranks at its end.

    Forwards and backwards of several micro-batches may alternate in any order, as the schedules of pipelines have it,
    whichever units each of them runs; gathered parameters are kept until the end. Without FSDP2 it does nothing.
    """
    if not isinstance(root, FSDPModule):
        yield
        return
    _accumulate(root, True)
    try:
        yield
        # What the last backward of a usual step does by itself, as torch.distributed.pipelining does it.
        _accumulate(root, False)
        state = fully_shard.state(root)
        for group in _parameter_groups(root):
            group.post_backward()
        state._root_post_backward_final_callback()
    finally:
        _accumulate(root, False)


def add_up_precisely(root: nn.Module) -> None:
    """Move gradients that stand in gathered parameters into the sums that `reduced_once` reduces, in their dtype.

    FSDP2 does so where a backward ends. One for weights alone (zero-bubble schedules) reaches none of its hooks, so the
    gradients of several micro-batches would be added up in the dtype of the computation. Without FSDP2 it does nothing.
    """
    if not isinstance(root, FSDPModule):
        return
    for group in _parameter_groups(root):
        for parameter in group.fsdp_params:
            if hasattr(parameter, "_unsharded_param"):  # gathered before
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def _parameter_groups(root: FSDPModule) -> Iterator[Any]:
    """FSDP2's own record of the parameters of every unit, as torch.distributed.pipelining walks through it."""
    for unit in fully_shard.state(root)._state_ctx.all_states:
        if hasattr(unit, "_fsdp_param_groups"):  # torch 2.13; before, there was one or none
            yield from unit._fsdp_param_groups
        elif unit._fsdp_param_group is not None:
            yield unit._fsdp_param_group


def _accumulate(root: FSDPModule, accumulates: bool) -> None:
    root.set_is_last_backward(not accumulates)
    root.set_reshard_after_backward(not accumulates)
    root.set_requires_gradient_sync(not accumulates)
