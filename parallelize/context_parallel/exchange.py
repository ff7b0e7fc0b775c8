"""Which keys and values travel where: every rank gets the chunks that its queries see, and no others.

Keys and values go round in steps, as in Ring Attention (Liu et al., https://arxiv.org/abs/2310.01889): at step t each
rank receives from the one t before it and sends to the one t after it, while it computes with what step t - 1 brought.
They come straight from their owner, so that chunks which no query of a rank sees are not sent to it, and steps that
bring nothing to anyone (far ones, with a sliding window) are left out.

What is sent, with n ranks and a causal mask: keys and values of a chunk are

    C = batch * key_heads * chunk_length * (dim + value_dim)    numbers.

In a zigzag (chunk_length = sequence / 2n) every other rank needs the early chunk of rank r, for its own late one, and
the r ranks before it need the late one, too:

    forward, rank r     (n - 1 + r) * C               numbers in the dtype of keys and values
    forward, all        3/2 * n * (n - 1) * C         of n * (n - 1) * 2 C if everything went to everyone
    backward, rank r    the same again, and (2 (n - 1) - r) * C numbers in fp32: gradients of all that it received

In contiguous parts (chunk_length = sequence / n) rank r sends n - 1 - r chunks, and r chunks of gradients.
`chunks_sent` counts them for any mask. A window of w tokens reaches over ceil((w - 1) / chunk_length) chunks, so that
in both layouts keys and values go to ranks at most that far away on the ring.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import MaskRule


@dataclass(frozen=True)
class Step:
    """What one rank sends and receives at one step: chunks by their place among the owner's."""

    receives_from: int
    receives: tuple[int, ...]
    sends_to: int
    sends: tuple[int, ...]


def needed_chunks(layout: SequenceLayout, rule: MaskRule, rank: int, owner: int) -> tuple[int, ...]:
    """Which of the owner's chunks any query of `rank` sees."""
    queries = layout.chunks(rank)
    return tuple(
        number
        for number, keys in enumerate(layout.chunks(owner))
        if any(not rule.is_empty(chunk, keys) for chunk in queries)
    )


@functools.lru_cache(maxsize=256)
def plan_steps(layout: SequenceLayout, rule: MaskRule, rank: int) -> tuple[Step, ...]:
    """The steps of one rank, in order; those at which no rank gets anything are left out on all.

    Every layer asks for the same few again; on 64 ranks with a window they take 45 ms to find.
    """
    degree = layout.degree
    steps = []
    for distance in range(1, degree):
        if not any(needed_chunks(layout, rule, r, (r - distance) % degree) for r in range(degree)):
            continue
        source, target = (rank - distance) % degree, (rank + distance) % degree
        steps.append(
            Step(source, needed_chunks(layout, rule, rank, source), target, needed_chunks(layout, rule, target, rank))
        )
    return tuple(steps)


def chunks_sent(layout: SequenceLayout, rule: MaskRule, rank: int) -> tuple[int, int]:
    """How many chunks of keys and values a rank sends in a forward, and how many chunks of gradients in a backward."""
    steps = plan_steps(layout, rule, rank)
    return sum(len(step.sends) for step in steps), sum(len(step.receives) for step in steps)


class RingCommunication:
    """Sends and receives of one step, started together and waited for together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._operations: list[dist.P2POp] = []
        self._works: list[dist.Work] | None = None
        self._kept: list[torch.Tensor] = []  # sent tensors, alive until they are sent

    @property
    def is_under_way(self) -> bool:
        return self._works is not None

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """tensor: (batch, heads, tokens, dim); nothing is copied where tokens lie one after the other in memory, as
        models make them for a batch of one."""
        tensor = tensor.transpose(1, 2).contiguous()
        self._kept.append(tensor)
        self._operations.append(dist.P2POp(dist.isend, tensor, group=self._group, group_peer=to))

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        batch, heads, tokens, dim = like.shape
        buffer = like.new_empty((batch, tokens, heads, dim))
        self._operations.append(dist.P2POp(dist.irecv, buffer, group=self._group, group_peer=source))
        return buffer.transpose(1, 2)

    def commit(self) -> None:
        if self._works is not None:
            raise RuntimeError("commit twice: wait for the step that is under way first")
        self._works = dist.batch_isend_irecv(self._operations) if self._operations else []
        self._operations = []

    def wait(self) -> None:
        if self._works is None:
            raise RuntimeError("wait before commit: no step is under way")
        for work in self._works:
            work.wait()
        self._works, self._kept = None, []
