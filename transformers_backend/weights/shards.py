"""Which part of a full tensor a rank holds, and how to fill it: the leaf of loading and initialising."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

ReadSlice = Callable[[tuple[slice, ...]], torch.Tensor]


def local_slices(tensor: torch.Tensor) -> tuple[slice, ...]:
    """The region of the full tensor that this rank's part of `tensor` covers; all of it for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


@torch.no_grad()
def fill_local(tensor: torch.Tensor, read: ReadSlice) -> None:
    """Fill this rank's part of `tensor` from `read(slices)`, casting to its dtype and moving to its device."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.numel() > 0:
        local.copy_(read(local_slices(tensor)))


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer by name, tied ones under each of their names, as they are (sharded)."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def full_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    from parallelize.tensor_parallel.packing import packing_of

    packing = packing_of(model, name)
    return packing.to_original(tensor.full_tensor()) if packing else tensor.full_tensor()
