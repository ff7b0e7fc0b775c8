"""Who holds which tensor in a pipeline, and any of them on every rank: how weights and gradients leave it.

A rank has the tensors of its own stages only. One after another each is sent by the first rank that holds it, so that
nobody needs memory for more than one tensor that it does not keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from parallelize.distributed import gather_objects


@dataclass(frozen=True)
class _Held:
    rank: int  # of the group, the first that holds it
    shape: torch.Size
    dtype: torch.dtype
    device_type: str


class Holders:
    """The tensors of all ranks of a pipeline by name; iterating gives the names, those of the first rank first."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> None:
        """Every rank of `group` calls it with what it has. Of a DTensor the full shape counts, and its local device."""
        self._group, self._rank = group, dist.get_rank(group)
        here = {name: (tensor.shape, tensor.dtype, _device_type(tensor)) for name, tensor in tensors.items()}
        self._held: dict[str, _Held] = {}
        for rank, listed in enumerate(gather_objects(here, group)):
            for name, described in listed.items():
                self._held.setdefault(name, _Held(rank, *described))

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def meta(self, name: str) -> torch.Tensor:
        """Shape and dtype of the full tensor, on the meta device."""
        held = self._held[name]
        return torch.empty(held.shape, dtype=held.dtype, device="meta")

    def fetch(self, name: str, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The full tensor on every rank, on a device of its holder's kind. All call it for the same names in order.

        read: gives the full tensor; called on the first holder alone, which means on every rank of that stage, so it
        may gather shards among these.
        """
        held = self._held[name]
        if held.rank == self._rank:
            full = read().detach().contiguous()
        else:
            full = torch.empty(held.shape, dtype=held.dtype, device=held.device_type)
        # As bytes, because backends do not know every dtype.
        dist.broadcast(full.view(-1).view(torch.uint8), group=self._group, group_src=held.rank)
        return full


def _device_type(tensor: torch.Tensor) -> str:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).device.type
