"""One gradient norm for the whole model, whatever the meshes its parameters live on.

Called between backward and optimizer step (`HFTransformerModel.clip_grad_norm_`). torch's own `clip_grad_norm_`
raises where parameters live on different meshes (some sharded over all ranks, some plain or on a sub-mesh), because
it stacks DTensors of different meshes. Here the norm is taken mesh by mesh, each is reduced to a plain number that
is the same on every rank, and the numbers are combined.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, *, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale all gradients in place so that their one norm is at most `max_norm`, and return the norm before that.

    `parameters` are DTensors, on one mesh or several, and plain tensors, whose gradients count once because they are
    the same on every rank. `norm_type` may be `float("inf")`. Use max_norm = inf to measure without scaling.

    Every rank of every mesh has to call this, with its parameters in the same order. The result is a plain scalar
    tensor on the gradients' device, the same on every rank; without any gradient it is 0. A non-finite norm raises a
    RuntimeError where `error_if_nonfinite`; otherwise it is returned, and the gradients stay as they are.
    """
    parameters = list(parameters)
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(_mesh_of(parameter.grad), []).append(parameter)
    if not groups:
        return torch.zeros((), device=parameters[0].device if parameters else None)

    norms = [_norm_of_one_mesh([parameter.grad for parameter in group], norm_type) for group in groups.values()]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
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


def _mesh_of(tensor: Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def _norm_of_one_mesh(gradients: list[Tensor], norm_type: float) -> Tensor:
    """The norm of gradients that share a mesh (or have none), as a plain scalar of at least float32."""
    mesh = _mesh_of(gradients[0])
    if mesh is not None and norm_type == float("inf"):
        norm = _infinity_norm(gradients, mesh)
    else:
        norm = get_total_norm(gradients, norm_type)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # sums the shards' contributions over the mesh
    # bf16 gradients give a bf16 norm: combining those would round once more.
    return norm.to(torch.promote_types(norm.dtype, torch.float32))


def _infinity_norm(gradients: list[Tensor], mesh: DeviceMesh) -> DTensor:
    """The largest absolute entry: torch refuses the infinity norm of the empty shards that small parameters have."""
    reduced = [
        gradient.redistribute(placements=[Replicate() if p.is_partial() else p for p in gradient.placements])
        for gradient in gradients
    ]
    filled = [local for local in (gradient.to_local() for gradient in reduced) if local.numel() > 0]
    largest = get_total_norm(filled, float("inf")).to(device=gradients[0].device, dtype=torch.float32)
    return DTensor.from_local(largest, mesh, [Partial("max")] * mesh.ndim, run_check=False)
