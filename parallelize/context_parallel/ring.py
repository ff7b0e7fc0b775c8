"""Ring attention: exact attention over a sequence of which every rank has a part.

Each rank keeps its queries. Keys and values come to it from the other ranks, one rank's at a time and while it computes
with those before (`exchange.py`); the block outputs are merged by their log-sum-exp in fp32, so that nothing is lost in
low precision however many ranks there are. The backward lets keys and values travel again, and sends their gradients
back to where they belong, where they are added up in fp32.

Ring Attention: Liu et al., https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallelize.context_parallel.blocks import BlockAttention
from parallelize.context_parallel.blockwise import Blockwise, Gradients, Visit
from parallelize.context_parallel.exchange import RingCommunication, Step, plan_steps
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import AttentionRule
from parallelize.context_parallel.merge import sinks_gradient


@dataclass(frozen=True)
class HeadsGroup:
    """Ranks that exchange tokens for heads with each other (`ulysses.py`)."""

    group: dist.ProcessGroup
    layout: SequenceLayout
    """How what they have together, which is the part of one rank of a ring, lies on them."""

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


@dataclass(frozen=True)
class Ring:
    """The ranks that share a sequence, how it lies on them, and what computes a block."""

    group: dist.ProcessGroup | None
    """None is a ring of one rank, which sends nothing."""
    layout: SequenceLayout
    blocks: BlockAttention
    method: str = "ring"
    """Which of `methods.METHODS` computes attention."""
    heads: HeadsGroup | None = None
    """The ranks that stand for one of the ring, each with some of the heads; None where each has all heads."""

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def communication(self) -> RingCommunication:
        return RingCommunication(self.group)

    def blockwise(self, rule: AttentionRule) -> Blockwise:
        return Blockwise(self.layout, self.rank, self.blocks, rule)


def ring_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    ring: Ring,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a method (`methods.py`): its output, and the log-sum-exp of all scores in fp32, (batch, heads, local)."""
    blockwise = ring.blockwise(rule)
    return blockwise.forward(query, value.shape[-1], _visits(ring, blockwise, key, value), sinks, documents)


def ring_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    ring: Ring,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query (in its dtype), key, value (in fp32) and sinks, from what `ring_forward` returned."""
    blockwise = ring.blockwise(rule)
    homecoming = _Homecoming(ring, blockwise, key, value)
    visits = _visits(ring, blockwise, key, value)
    grad_query = blockwise.backward(
        grad_out, query, out, log_sum, visits, documents, homecoming.send, after_block=homecoming.land
    )
    grad_key, grad_value = homecoming.collect()
    grad_sinks = None if sinks is None else sinks_gradient(sinks, log_sum, grad_out, out)
    return grad_query, grad_key, grad_value, grad_sinks


def _visits(ring: Ring, blockwise: Blockwise, key: torch.Tensor, value: torch.Tensor) -> Iterator[Visit]:
    """This rank's own keys and values first; while they are computed with, the next ones travel."""
    own_keys, own_values = blockwise.views(key), blockwise.views(value)
    communication = ring.communication()
    visit = (ring.rank, dict(enumerate(own_keys)), dict(enumerate(own_values)))
    for step in plan_steps(ring.layout, blockwise.rule.mask, ring.rank):
        following = _start(communication, step, own_keys, own_values)
        yield visit
        communication.wait()
        visit = following
    yield visit


def _start(
    communication: RingCommunication, step: Step, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> Visit:
    for number in step.sends:
        communication.send(keys[number], step.sends_to)
        communication.send(values[number], step.sends_to)
    arriving_keys, arriving_values = {}, {}
    for number in step.receives:
        arriving_keys[number] = communication.receive(keys[0], step.receives_from)
        arriving_values[number] = communication.receive(values[0], step.receives_from)
    communication.commit()
    return step.receives_from, arriving_keys, arriving_values


class _Homecoming:
    """Gradients of keys and values on their way back to their owner, and their sum there."""

    def __init__(self, ring: Ring, blockwise: Blockwise, key: torch.Tensor, value: torch.Tensor) -> None:
        self._rank = ring.rank
        self._steps = {step.receives_from: step for step in plan_steps(ring.layout, blockwise.rule.mask, ring.rank)}
        self._totals = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value)]
        self._own = list(zip(*(blockwise.views(total) for total in self._totals), strict=True))
        self._expected = {source: list(step.sends) for source, step in self._steps.items()}
        self._communication = ring.communication()
        self._arriving: list[tuple[int, tuple[torch.Tensor, ...]]] = []

    def send(self, source: int, grads: Gradients) -> None:
        """Send what was found for a chunk of `source`; and receive what another rank has found for this one's.

        They travel while one block is computed, so that little of them is in memory. Every rank goes through the same
        steps and, in each, through the chunks in their order; with its last a rank receives what comes later, too."""
        if source == self._rank:
            for number, found in grads.items():
                self._add(number, found)
            return
        self.land()
        step = self._steps[source]
        for found in grads.values():
            for part in found:
                self._communication.send(part, source)
        is_last = set(step.receives[-1:]) <= grads.keys()
        expected = [number for number in self._expected[source] if is_last or number in grads]
        for number in expected:
            self._expected[source].remove(number)
            arriving = tuple(self._communication.receive(part, step.sends_to) for part in self._own[number])
            self._arriving.append((number, arriving))
        self._communication.commit()

    def collect(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of this rank's keys and values, in fp32."""
        self.land()
        key, value = self._totals
        return key, value

    def land(self) -> None:
        """Wait for what is on its way, and add up what came."""
        if self._communication.is_under_way:
            self._communication.wait()
        for number, found in self._arriving:
            self._add(number, found)
        self._arriving = []

    def _add(self, number: int, found: tuple[torch.Tensor, ...]) -> None:
        for total, part in zip(self._own[number], found, strict=True):
            total += part
