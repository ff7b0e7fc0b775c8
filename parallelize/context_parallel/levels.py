"""The process groups of attention in two levels: a rank's ring, and the neighbours with which it exchanges heads.

With u ranks to a heads group ranks g * u ... g * u + u - 1 of those that share a sequence are one. Together they have
what rank g would have if there were only the ring: where the sequence lies in a zigzag on all ranks, their early chunks
are beside each other, and so are their late ones, in reverse order.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallelize.context_parallel.blocks import BlockAttention
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.ring import HeadsGroup, Ring


@dataclass(frozen=True)
class Levels:
    """The groups of one rank; None is one of this rank alone."""

    ring: dist.ProcessGroup | None
    heads: dist.ProcessGroup | None = None

    def over(self, layout: SequenceLayout, blocks: BlockAttention) -> Ring:
        """The ring, and the exchange around it. layout: of the whole sequence on all ranks."""
        if self.heads is None:
            return Ring(self.ring, layout, blocks)
        group_size = dist.get_world_size(self.heads)
        degree = layout.degree // group_size
        part = SequenceLayout(layout.length // degree, group_size, layout.is_zigzag)
        # On one rank a zigzag would only cut what can be one block.
        around = SequenceLayout(layout.length, degree, layout.is_zigzag and degree > 1)
        return Ring(self.ring, around, blocks, heads=HeadsGroup(self.heads, part))


def levels_of(mesh: DeviceMesh, heads_degree: int) -> Levels:
    """Those of the ranks of a one-dimensional mesh, of which `heads_degree` are a heads group.

    Every rank of the job calls it. Groups are made once: they stay until the process group of the job is destroyed, and
    each has threads of its own.
    """
    group = mesh.get_group()
    if heads_degree == 1:
        return Levels(group)
    if heads_degree == mesh.size():
        return Levels(None, group)
    made = _MADE.setdefault(group, {})
    if heads_degree not in made:
        names = ("context_ring", "context_heads")
        both = mesh._unflatten(0, (mesh.size() // heads_degree, heads_degree), names)
        made[heads_degree] = Levels(*(both.get_group(name) for name in names))
    return made[heads_degree]


def groups_made(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """What `levels_of` has made for a mesh, beside the mesh's own group; e.g. for timeouts."""
    levels = _MADE.get(mesh.get_group(), {}).values()
    return [group for level in levels for group in (level.ring, level.heads)]


_MADE: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, Levels]] = weakref.WeakKeyDictionary()
