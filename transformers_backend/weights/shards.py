"""Which part of a full tensor a rank holds, how to fill it, and the full tensor again: the leaf of weights in and out.

Outside the process every tensor is in Transformers' order. Fused parameters that tensor parallelism stores in another
one (`parallelize/tensor_parallel/packing.py`) are translated here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallelize.distributed import gathered
from parallelize.tensor_parallel.packing import Packing, packing_of

ReadSlice = Callable[[tuple[slice, ...]], torch.Tensor]


@dataclass(frozen=True)
class Region:
    """A box of a rank's part of a tensor, and where it lies in the full tensor."""

    local: tuple[slice, ...]
    """In this rank's part."""
    original: tuple[slice, ...]
    """In the full tensor, in Transformers' order."""


def local_slices(tensor: torch.Tensor) -> tuple[slice, ...]:
    """The part of the full tensor, as it is stored, that this rank holds; all of it for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def local_regions(tensor: torch.Tensor, packing: Packing | None = None) -> list[Region]:
    """What this rank holds of `tensor`, by where it comes from in Transformers' order; nothing where its part is empty.

    One region, or several for a fused parameter: its part of every segment.
    """
    held = local_slices(tensor)
    sizes = [part.stop - part.start for part in held]
    if 0 in sizes:
        return []
    local = tuple(slice(0, size) for size in sizes)
    if packing is None:
        return [Region(local, held)]
    dim, start = packing.dim, held[packing.dim].start
    return [
        Region(
            _replaced(local, dim, piece.stored_start - start, piece.length),
            _replaced(held, dim, piece.original_start, piece.length),
        )
        for piece in packing.pieces(start, held[dim].stop)
    ]


def _replaced(box: tuple[slice, ...], dim: int, start: int, length: int) -> tuple[slice, ...]:
    return (*box[:dim], slice(start, start + length), *box[dim + 1 :])


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`: not a copy, and without gradients."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_local(tensor: torch.Tensor, read: ReadSlice, packing: Packing | None = None) -> None:
    """Fill this rank's part of `tensor` from `read(slices)`, casting to its dtype and moving to its device.

    read: gives a box of the full tensor in Transformers' order; called for each of `local_regions`.
    """
    local = local_part(tensor)
    for region in local_regions(tensor, packing):
        local[region.local].copy_(read(region.original))


def full_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """All of `tensor` in Transformers' order: a parameter or buffer of `model`, or what has its shape (its gradient).

    Every rank of its mesh calls it and gets it, on its device. A plain tensor is returned as it is, not a copy.
    """
    tensor = tensor.detach()
    packing = packing_of(model, name)
    full = gathered(tensor) if isinstance(tensor, DTensor) else tensor
    return full if packing is None else packing.to_original(full)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer by name, tied ones under each of their names, as they are (sharded)."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors
