"""One rank's queries against keys and values that come a few chunks at a time: what every method has in common.

A *visit* is (source rank, its chunks' keys by number, their values by number).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from parallelize.context_parallel.blocks import BlockAttention
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import BlockMask, MaskRule
from parallelize.context_parallel.merge import add_sinks, empty_sum, merge

Visit = tuple[int, dict[int, torch.Tensor], dict[int, torch.Tensor]]
Gradients = dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Blockwise:
    """Attention of one rank's queries, block by block."""

    layout: SequenceLayout
    rank: int
    blocks: BlockAttention
    rule: MaskRule
    scale: float
    softcap: float | None

    def forward(
        self,
        query: torch.Tensor,
        value_dim: int,
        visits: Iterable[Visit],
        sinks: torch.Tensor | None,
        documents: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output in the dtype of `query`, and log-sum-exp in fp32."""
        out, log_sum = empty_sum(query, value_dim)
        for source, keys, values in visits:
            for mine, number, mask in self.masks(documents, source, keys):
                block = self.blocks.forward(
                    query[:, :, mine].contiguous(), keys[number], values[number], mask,
                    scale=self.scale, softcap=self.softcap,
                )  # fmt: skip
                merge(out[:, :, mine], log_sum[:, :, mine], *block)
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
    ) -> torch.Tensor:
        """The gradient of `query`, in its dtype; `found(source, ...)` is told those of each visit's keys and values,
        (grad_key, grad_value) in fp32 by the chunk's number."""
        grad_out = grad_out.contiguous()
        grad_query = torch.zeros_like(query, dtype=torch.float32)
        for source, keys, values in visits:
            grads = {number: zeros_like(keys[number], values[number]) for number in keys}
            for mine, number, mask in self.masks(documents, source, keys):
                piece_grad, piece_query, piece_out, piece_sum = (
                    tensor[:, :, mine].contiguous() for tensor in (grad_out, query, out, log_sum)
                )
                parts = self.blocks.backward(
                    piece_grad, piece_query, keys[number], values[number], piece_out, piece_sum, mask,
                    scale=self.scale, softcap=self.softcap,
                )  # fmt: skip
                grad_query[:, :, mine] += parts[0]
                for total, part in zip(grads[number], parts[1:], strict=True):
                    total += part
            found(source, grads)
        return grad_query.to(query.dtype)

    def masks(
        self, documents: torch.Tensor | None, source: int, numbers: Iterable[int]
    ) -> Iterator[tuple[slice, int, BlockMask]]:
        """(slice of this rank's queries, number of the source's chunk, mask) of every block that is not empty."""
        length, chunks = self.layout.chunk_length, self.layout.chunks(source)
        for place, queries in enumerate(self.layout.chunks(self.rank)):
            for number in numbers:
                keys = chunks[number]
                if self.rule.is_empty(queries, keys):
                    continue
                both = (
                    (None, None)
                    if documents is None
                    else tuple(documents[:, chunk.start : chunk.stop] for chunk in (queries, keys))
                )
                yield slice(place * length, (place + 1) * length), number, BlockMask(self.rule, queries, keys, *both)

    def chunks(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A rank's part of a tensor (batch, heads, local, dim) in its chunks."""
        return [part.contiguous() for part in tensor.chunk(len(self.layout.chunks(self.rank)), 2)]


def zeros_like(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In fp32, to add up in."""
    return tuple(
        torch.zeros_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format) for tensor in tensors
    )
