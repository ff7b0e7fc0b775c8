"""Ring attention: exact attention over a sequence of which every rank has a part.

Each rank keeps its queries. Keys and values come to it from the other ranks, one rank's at a time and while it computes
with those before (`exchange.py`); the block outputs are merged by their log-sum-exp in fp32, so that nothing is lost in
low precision however many ranks there are. The backward lets keys and values travel again, and sends their gradients
back to where they belong, where they are added up in fp32.

Ring Attention: Liu et al., https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallelize.context_parallel.blocks import BlockAttention
from parallelize.context_parallel.blockwise import Blockwise, Gradients, Visit, zeros_like
from parallelize.context_parallel.exchange import RingCommunication, Step, plan_steps
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import MaskRule
from parallelize.context_parallel.merge import sinks_gradient


@dataclass(frozen=True)
class Ring:
    """The ranks that share a sequence, how it lies on them, and what computes a block."""

    group: dist.ProcessGroup
    layout: SequenceLayout
    blocks: BlockAttention
    method: str = "ring"
    """Which of `methods.METHODS` computes attention."""

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def communication(self) -> RingCommunication:
        return RingCommunication(self.group)

    def blockwise(self, rule: MaskRule, scale: float, softcap: float | None) -> Blockwise:
        return Blockwise(self.layout, self.rank, self.blocks, rule, scale, softcap)


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ring: Ring,
    rule: MaskRule,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of the whole sequence.

    query (batch, heads, local, dim), key (batch, key_heads, local, dim), value (batch, key_heads, local, value_dim),
    each this rank's part of the sequence by `ring.layout`. scale: of the scores, None is 1 / sqrt(dim). softcap: bounds
    the scores, None does not. sinks: a score for each head (heads,) that takes part in every softmax and has no value.
    documents: the number of each token's document (batch, seq), of the whole sequence; queries see their own only.
    Returns (batch, heads, local, value_dim) in the dtype of `query`. Every rank calls it, forward and backward.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _RingAttention.apply(query, key, value, sinks, documents, ring, rule, scale, softcap)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, documents, ring, rule, scale, softcap):
        blockwise = ring.blockwise(rule, scale, softcap)
        visits = _visits(ring, blockwise, key, value)
        out, log_sum = blockwise.forward(query, value.shape[-1], visits, sinks, documents)
        ctx.save_for_backward(query, key, value, sinks, documents, out, log_sum)
        ctx.ring, ctx.blockwise = ring, blockwise
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, sinks, documents, out, log_sum = ctx.saved_tensors
        homecoming = _Homecoming(ctx.ring, ctx.blockwise, key, value)
        grad_query = ctx.blockwise.backward(
            grad_out, query, out, log_sum, _visits(ctx.ring, ctx.blockwise, key, value), documents, homecoming.send
        )
        grad_key, grad_value = homecoming.collect()
        grad_sinks = sinks_gradient(sinks, log_sum, grad_out, out) if ctx.needs_input_grad[3] else None
        return grad_query, grad_key, grad_value, grad_sinks, None, None, None, None, None


def _visits(ring: Ring, blockwise: Blockwise, key: torch.Tensor, value: torch.Tensor) -> Iterator[Visit]:
    """This rank's own keys and values first; while they are computed with, the next ones travel."""
    own_keys, own_values = blockwise.chunks(key), blockwise.chunks(value)
    communication = ring.communication()
    visit = (ring.rank, dict(enumerate(own_keys)), dict(enumerate(own_values)))
    for step in plan_steps(ring.layout, blockwise.rule, ring.rank):
        following = _start(communication, step, own_keys, own_values)
        yield visit
        communication.wait()
        visit = following
    yield visit


def _start(communication: RingCommunication, step: Step, keys: list[torch.Tensor], values: list[torch.Tensor]) -> Visit:
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
        self._like = key, value
        self._steps = {step.receives_from: step for step in plan_steps(ring.layout, blockwise.rule, ring.rank)}
        self._own = [zeros_like(*parts) for parts in zip(blockwise.chunks(key), blockwise.chunks(value), strict=True)]
        self._communication = ring.communication()
        self._arriving: list[tuple[int, tuple[torch.Tensor, ...]]] = []

    def send(self, source: int, grads: Gradients) -> None:
        """Send what was found for the chunks of `source`; and receive what another rank has found for this one's."""
        if source == self._rank:
            for number, found in grads.items():
                self._add(number, found)
            return
        self._land()
        step = self._steps[source]
        for number in step.receives:
            for part in grads[number]:
                self._communication.send(part, source)
        for number in step.sends:
            arriving = tuple(self._communication.receive(part, step.sends_to) for part in self._own[number])
            self._arriving.append((number, arriving))
        self._communication.commit()

    def collect(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of this rank's keys and values, in their dtypes."""
        self._land()
        return tuple(
            torch.cat(parts, 2).to(like.dtype)
            for parts, like in zip(zip(*self._own, strict=True), self._like, strict=True)
        )

    def _land(self) -> None:
        if self._communication.is_under_way:
            self._communication.wait()
        for number, found in self._arriving:
            self._add(number, found)
        self._arriving = []

    def _add(self, number: int, found: tuple[torch.Tensor, ...]) -> None:
        for total, part in zip(self._own[number], found, strict=True):
            total += part
