"""From parts of a sequence to the whole one and back, for computations that every rank does on all of it.

    function          forward                               backward
    gather_sequence   every rank's part -> the whole        the parts' gradients, summed over the ranks in fp32
    own_part          the whole -> this rank's part         zeros for all other tokens
    spread            this rank's part -> the whole, with   this rank's part
                      zeros for all other tokens

The first is for what a rank computes of the whole for the sake of its own part: there each rank has a term of every
token's gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from parallelize.context_parallel.layout import SequenceLayout
from parallelize.tensor_parallel.collectives import all_gather, reduce_scatter


def gather_sequence(part: torch.Tensor, layout: SequenceLayout, group: dist.ProcessGroup) -> torch.Tensor:
    """(batch, local, ...) of every rank of the group -> (batch, seq, ...), tokens in their order.

    Every rank of the group calls it, forward and backward.
    """
    return _GatherSequence.apply(part, layout, group)


def own_part(whole: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    """(batch, seq, ...) -> (batch, local, ...)"""
    return layout.shard(whole, rank, 1)


def spread(part: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    """(batch, local, ...) -> (batch, seq, ...)"""
    nothing = torch.zeros_like(part)
    return layout.join([part if other == rank else nothing for other in range(layout.degree)], 1)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, layout, group):
        ctx.layout, ctx.group = layout, group
        return layout.join(list(all_gather(part, 0, group).chunk(layout.degree)), 1)

    @staticmethod
    def backward(ctx, gradient):
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        parts = torch.cat([ctx.layout.shard(wide, rank, 1) for rank in range(ctx.layout.degree)])
        return reduce_scatter(parts, 0, ctx.group).to(gradient.dtype), None, None
