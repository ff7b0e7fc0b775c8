"""One rank's queries against keys and values that come a few chunks at a time: what every method has in common.

A *visit* is (source rank, its chunks' keys by number, their values by number).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from parallelize.context_parallel.blocks import BlockAttention
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import AttentionRule, BlockMask
from parallelize.context_parallel.merge import add_sinks, empty_sum, merge

Visit = tuple[int, dict[int, torch.Tensor], dict[int, torch.Tensor]]
Gradients = dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Blockwise:
    """Attention of one rank's queries, block by block."""

    layout: SequenceLayout
    rank: int
    blocks: BlockAttention
    rule: AttentionRule

    def forward(
        self,
        query: torch.Tensor,
        value_dim: int,
        visits: Iterable[Visit],
        sinks: torch.Tensor | None,
        documents: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output in the dtype of `query`, and log-sum-exp in fp32."""
        scale, softcap = self.rule.scale_for(query), self.rule.softcap
        out, log_sum = empty_sum(query, value_dim)
        for source, keys, values in visits:
            for mine, number, mask in self.masks(documents, source, keys):
                block = self.blocks.forward(
                    query[:, :, mine], keys[number], values[number], mask, scale=scale, softcap=softcap
                )
                merge(out[:, :, mine], log_sum[:, :, mine], *block)
                del block  # its memory is the next one's
        if sinks is not None:
            add_sinks(out, log_sum, sinks)
        return out.to(query.dtype), log_sum

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        visits: Iterable[Visit],
        documents: torch.Tensor | None,
        found: Callable[[int, Gradients], None],
        after_block: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """The gradient of `query`, in its dtype; `found(source, ...)` is told those of each visit's keys and values,
        (grad_key, grad_value) in fp32 by the chunk's number: chunk by chunk, in their order, as soon as one's are
        complete, and of a visit that brings nothing once, without any. after_block: called after every block."""
        scale, softcap = self.rule.scale_for(query), self.rule.softcap
        grad_query = torch.zeros_like(query, dtype=torch.float32)
        log_sums = self.chunks(log_sum)  # kernels want them dense
        for source, keys, values in visits:
            if not keys:
                found(source, {})
            for number in list(keys):
                key, value = keys.pop(number), values.pop(number)  # no longer in memory than they are needed
                grads = None
                for mine, _, mask in self.masks(documents, source, [number]):
                    parts = self.blocks.backward(
                        grad_out[:, :, mine], query[:, :, mine], key, value, out[:, :, mine],
                        log_sums[mine.start // self.layout.chunk_length], mask, scale=scale, softcap=softcap,
                    )  # fmt: skip
                    grad_query[:, :, mine] += parts[0]
                    grads = add_up(grads, parts[1:])
                    del parts  # its memory is the next one's
                    after_block()
                del key, value
                if grads is not None:
                    found(source, {number: grads})
                del grads
        return grad_query.to(query.dtype)

    def masks(
        self, documents: torch.Tensor | None, source: int, numbers: Iterable[int]
    ) -> Iterator[tuple[slice, int, BlockMask]]:
        """(slice of this rank's queries, number of the source's chunk, mask) of every block that is not empty."""
        rule, length, chunks = self.rule.mask, self.layout.chunk_length, self.layout.chunks(source)
        for number in numbers:
            keys = chunks[number]
            for place, queries in enumerate(self.layout.chunks(self.rank)):
                if rule.is_empty(queries, keys):
                    continue
                both = (
                    (None, None)
                    if documents is None
                    else tuple(documents[:, chunk.start : chunk.stop] for chunk in (queries, keys))
                )
                yield slice(place * length, (place + 1) * length), number, BlockMask(rule, queries, keys, *both)

    def views(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The chunks of a rank's part of a tensor (batch, heads, local, ...), none of them copied."""
        return tensor.chunk(len(self.layout.chunks(self.rank)), 2)

    def chunks(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The same, each dense."""
        return [part.contiguous() for part in self.views(tensor)]


def add_up(totals: tuple[torch.Tensor, ...] | None, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Sums in fp32, in place of the totals; the parts themselves where there are none yet."""
    if totals is None:
        return tuple(part.float() for part in parts)
    for total, part in zip(totals, parts, strict=True):
        total += part
    return totals
