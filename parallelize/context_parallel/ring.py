"""Ring attention: exact attention over a sequence of which every rank has a part.

Each rank keeps its queries. Keys and values come to it from the other ranks, one rank's at a time and while it computes
with those before (`exchange.py`); the block outputs are merged by their log-sum-exp in fp32, so that nothing is lost in
low precision however many ranks there are. The backward lets keys and values travel again, and sends their gradients
back to where they belong, where they are added up in fp32.

Ring Attention: Liu et al., https://arxiv.org/abs/2310.01889. The merge is that of FlashAttention's split softmax
(Dao et al., https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallelize.context_parallel.blocks import BlockAttention
from parallelize.context_parallel.exchange import RingCommunication, Step, plan_steps
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import BlockMask, MaskRule


@dataclass(frozen=True)
class Ring:
    """The ranks that share a sequence, how it lies on them, and what computes a block."""

    group: dist.ProcessGroup
    layout: SequenceLayout
    blocks: BlockAttention

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


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

    query (batch, heads, local, dim), key (batch, key_heads, local, dim), value (batch, key_heads, local, value_dim), each
    this rank's part of the sequence by `ring.layout`. scale: of the scores, None is 1 / sqrt(dim). softcap: bounds the
    scores, None does not. sinks: a score for each head (heads,) that takes part in every softmax and has no value.
    documents: the number of each token's document (batch, seq), of the whole sequence; queries see their own only.
    Returns (batch, heads, local, value_dim) in the dtype of `query`. Every rank of the group calls it, forward and backward.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _RingAttention.apply(query, key, value, sinks, documents, ring, rule, scale, softcap)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, documents, ring, rule, scale, softcap):
        out, log_sum = forward_of_ring(query, key, value, sinks, documents, ring, rule, scale, softcap)
        ctx.save_for_backward(query, key, value, sinks, documents, out, log_sum)
        ctx.options = ring, rule, scale, softcap
        return out

    @staticmethod
    def backward(ctx, grad_out):
        found = backward_of_ring(grad_out, *ctx.saved_tensors, *ctx.options)
        return *found, None, None, None, None, None


def forward_of_ring(
    query, key, value, sinks, documents, ring: Ring, rule: MaskRule, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ring_attention` without its gradients; and the log-sum-exp of all scores, fp32 (batch, heads, local)."""
    out = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=torch.float32)
    log_sum = query.new_full(query.shape[:-1], -math.inf, dtype=torch.float32)
    for source, keys, values in _visits(ring, rule, key, value):
        for mine, number, mask in _blocks(ring, rule, documents, source, keys):
            block = ring.blocks.forward(
                query[:, :, mine].contiguous(), keys[number], values[number], mask, scale=scale, softcap=softcap
            )
            _merge(out[:, :, mine], log_sum[:, :, mine], *block)
    if sinks is not None:
        total = torch.logaddexp(log_sum, sinks.float()[None, :, None])
        out *= (log_sum - total).exp()[..., None]
        log_sum = total
    return out.to(query.dtype), log_sum


def backward_of_ring(
    grad_out, query, key, value, sinks, documents, out, log_sum,
    ring: Ring, rule: MaskRule, scale: float, softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Gradients of query, key, value and sinks, in their dtypes, from what `forward_of_ring` returned."""
    grad_out = grad_out.contiguous()
    grad_query = torch.zeros_like(query, dtype=torch.float32)
    homecoming = _Homecoming(ring, rule, key, value)
    for source, keys, values in _visits(ring, rule, key, value):
        grads = {number: _zeros_like(keys[number], values[number]) for number in keys}
        for mine, number, mask in _blocks(ring, rule, documents, source, keys):
            pieces = (tensor[:, :, mine].contiguous() for tensor in (grad_out, query, out, log_sum))
            piece_grad, piece_query, piece_out, piece_sum = pieces
            found = ring.blocks.backward(
                piece_grad, piece_query, keys[number], values[number], piece_out, piece_sum, mask,
                scale=scale, softcap=softcap,
            )  # fmt: skip
            grad_query[:, :, mine] += found[0]
            for total, part in zip(grads[number], found[1:], strict=True):
                total += part
        homecoming.send(source, grads)
    grad_key, grad_value = homecoming.collect()
    grad_sinks = None
    if sinks is not None:
        weights = (sinks.float()[None, :, None] - log_sum).exp()
        grad_sinks = -(weights * (grad_out.float() * out.float()).sum(-1)).sum((0, 2)).to(sinks.dtype)
    return grad_query.to(query.dtype), grad_key, grad_value, grad_sinks


def _merge(out: torch.Tensor, log_sum: torch.Tensor, block_out: torch.Tensor, block_sum: torch.Tensor) -> None:
    """Add a block to what was there, in place: both weighted by their share of the softmax."""
    total = torch.logaddexp(log_sum, block_sum)
    seen = total.masked_fill(total.isinf(), 0.0)  # where neither has seen a key both weights are exp(-inf) = 0
    out *= (log_sum - seen).exp()[..., None]
    out += block_out.float() * (block_sum - seen).exp()[..., None]
    log_sum.copy_(total)


def _visits(ring: Ring, rule: MaskRule, key: torch.Tensor, value: torch.Tensor):
    """(source rank, its chunks' keys by number, their values), this rank's own first; the next ones travel meanwhile."""
    own_keys, own_values = _chunks(ring, key), _chunks(ring, value)
    steps = plan_steps(ring.layout, rule, ring.rank)
    communication = RingCommunication(ring.group)
    visit = (ring.rank, dict(enumerate(own_keys)), dict(enumerate(own_values)))
    for step in [*steps, None]:
        following = None
        if step is not None:
            following = _start(communication, step, own_keys, own_values)
        yield visit
        if following is not None:
            communication.wait()
            visit = following


def _start(communication: RingCommunication, step: Step, keys: list[torch.Tensor], values: list[torch.Tensor]):
    for number in step.sends:
        communication.send(keys[number], step.sends_to)
        communication.send(values[number], step.sends_to)
    arriving_keys, arriving_values = {}, {}
    for number in step.receives:
        arriving_keys[number] = communication.receive(keys[0], step.receives_from)
        arriving_values[number] = communication.receive(values[0], step.receives_from)
    communication.commit()
    return step.receives_from, arriving_keys, arriving_values


def _blocks(ring: Ring, rule: MaskRule, documents: torch.Tensor | None, source: int, numbers):
    """(slice of this rank's queries, number of the source's chunk, mask) of every block that has something in it."""
    length = ring.layout.chunk_length
    chunks = ring.layout.chunks(source)
    for place, queries in enumerate(ring.layout.chunks(ring.rank)):
        for number in numbers:
            if rule.is_empty(queries, chunks[number]):
                continue
            mask = BlockMask(rule, queries, chunks[number])
            if documents is not None:
                mask = BlockMask(
                    rule, queries, chunks[number], *(_documents(documents, c) for c in (queries, chunks[number]))
                )
            yield slice(place * length, (place + 1) * length), number, mask


def _documents(documents: torch.Tensor, chunk) -> torch.Tensor:
    return documents[:, chunk.start : chunk.stop]


class _Homecoming:
    """Gradients of keys and values on their way back to their owner, and their sum there."""

    def __init__(self, ring: Ring, rule: MaskRule, key: torch.Tensor, value: torch.Tensor) -> None:
        self._rank = ring.rank
        self._like = key, value
        self._steps = {step.receives_from: step for step in plan_steps(ring.layout, rule, ring.rank)}
        self._own = [_zeros_like(k, v) for k, v in zip(_chunks(ring, key), _chunks(ring, value), strict=True)]
        self._communication = RingCommunication(ring.group)
        self._arriving: list[tuple[torch.Tensor, torch.Tensor]] = []

    def send(self, source: int, grads: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
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

    def _add(self, number: int, found: tuple[torch.Tensor, torch.Tensor]) -> None:
        for total, part in zip(self._own[number], found, strict=True):
            total += part


def _zeros_like(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.zeros_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format) for tensor in tensors
    )


def _chunks(ring: Ring, tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = 2 if ring.layout.is_zigzag else 1
    return [part.contiguous() for part in tensor.chunk(parts, 2)]
