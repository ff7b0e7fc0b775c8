"""One gradient norm for the whole model, whatever the meshes its parameters live on.

Called between backward and optimizer step (`HFTransformerModel.clip_grad_norm_`). torch's own `clip_grad_norm_`
raises where parameters live on different meshes (some sharded over all ranks, some plain or on a sub-mesh: tensor
parallelism alone, or with FSDP2 on top), because it stacks DTensors of different meshes. Here the norm is taken mesh
by mesh, each is reduced to a plain number that is the same on every rank, and the numbers are combined.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    pipeline_group: dist.ProcessGroup | None = None,
    counted_elsewhere: Collection[Tensor] = (),
) -> Tensor:
    """Scale all gradients in place so that their one norm is at most `max_norm`, and return the norm before that.

    `parameters` are DTensors, on one mesh or several, and plain tensors, whose gradients count once because they are
    the same on every rank. `norm_type` may be `float("inf")`. Use max_norm = inf to measure without scaling.

    Every rank of every mesh has to call this, with its parameters in the same order. The result is a plain scalar
    tensor on the gradients' device, the same on every rank; without any gradient it is 0. A non-finite norm raises a
    RuntimeError where `error_if_nonfinite`; otherwise it is returned, and the gradients stay as they are.

    pipeline_group: ranks with other parameters of the same model, whose gradients count, too. counted_elsewhere: those
    of `parameters` of which another rank of that group has a copy that counts.
    """
    parameters = list(parameters)
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(_mesh_of(parameter.grad), []).append(parameter)

    elsewhere = {id(parameter) for parameter in counted_elsewhere}
    norms = [torch.zeros((), device=parameters[0].device if parameters else None)]
    for group in groups.values():
        if gradients := [parameter.grad for parameter in group if id(parameter) not in elsewhere]:
            norms.append(_norm_of_one_mesh(gradients, norm_type).to(norms[0].device))
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if pipeline_group is not None:
        total = _combined_over(total, pipeline_group, norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"The gradient norm is {total.item()}: gradients cannot be clipped to {max_norm}. Look for an overflow in "
            "the loss, lower the learning rate, or pass error_if_nonfinite=False to get the norm back."
        )
    # Scaling by a non-finite norm would spoil every gradient and hide the one that was to blame.
    norm_to_clip = torch.where(total.isfinite(), total, torch.zeros_like(total))
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, norm_to_clip)
    return total


def _combined_over(norm: Tensor, group: dist.ProcessGroup, norm_type: float) -> Tensor:
    """The norm of all gradients whose norms the ranks of the group have."""
    norms = [torch.empty_like(norm) for _ in range(dist.get_world_size(group))]
    dist.all_gather(norms, norm.contiguous(), group=group)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _mesh_of(tensor: Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def _norm_of_one_mesh(gradients: list[Tensor], norm_type: float) -> Tensor:
    """The norm of gradients that share a mesh (or have none), as a plain scalar of at least float32.

    Every number of a gradient is counted on one rank: along a dimension on which it is whole, on the first. Then one
    scalar is reduced along each dimension, whatever the placements, and all ranks get the same bits. (torch's own
    function gathers gradients of unlike placements one by one, and refuses the infinity norm of empty shards.)
    """
    mesh = _mesh_of(gradients[0])
    if mesh is None:
        return _at_least_float32(get_total_norm(gradients, norm_type))
    counted = [local for gradient in gradients if (local := _counted_here(gradient)) is not None]
    norm = _at_least_float32(get_total_norm(counted, norm_type)).to(gradients[0].device)
    is_infinite = norm_type == float("inf")
    total = norm if is_infinite else norm**norm_type
    for dimension in range(mesh.ndim):
        if mesh.size(dimension) > 1:
            operation = dist.ReduceOp.MAX if is_infinite else dist.ReduceOp.SUM
            dist.all_reduce(total, op=operation, group=mesh.get_group(dimension))
    return total if is_infinite else total ** (1.0 / norm_type)


def _counted_here(gradient: DTensor) -> Tensor | None:
    """This rank's part of a gradient; None where it is empty or another rank counts it. Partial sums are added up."""
    mesh = gradient.device_mesh
    if any(placement.is_partial() for placement in gradient.placements):
        gradient = gradient.redistribute(
            placements=[Replicate() if placement.is_partial() else placement for placement in gradient.placements]
        )
    for dimension, placement in enumerate(gradient.placements):
        if placement.is_replicate() and mesh.get_local_rank(dimension) > 0:
            return None
    local = gradient.to_local()
    return local if local.numel() > 0 else None


def _at_least_float32(norm: Tensor) -> Tensor:
    """bf16 gradients give a bf16 norm: combining those would round once more."""
    return norm.to(torch.promote_types(norm.dtype, torch.float32))
