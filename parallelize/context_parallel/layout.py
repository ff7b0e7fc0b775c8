"""Which tokens of a sequence each context-parallel rank has.

    contiguous, 4 ranks    [0 0 | 1 1 | 2 2 | 3 3]
    zigzag, 4 ranks        [0 | 1 | 2 | 3 | 3 | 2 | 1 | 0]

With a causal mask later queries see more keys, so that contiguous parts leave the first ranks idle. In a zigzag each
rank has an early and a late chunk, and all ranks compute nearly the same number of (query, key) pairs (Brandon et al.,
Striped Attention, https://arxiv.org/abs/2311.09431; the zigzag is ring-flash-attention's).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of the whole sequence."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SequenceLayout:
    """How a sequence of `length` tokens lies on `degree` ranks."""

    length: int
    degree: int
    is_zigzag: bool = True

    def __post_init__(self) -> None:
        assert self.length % self.chunk_count == 0, "checked where the sequence comes in"

    @property
    def chunk_count(self) -> int:
        return 2 * self.degree if self.is_zigzag else self.degree

    @property
    def chunk_length(self) -> int:
        return self.length // self.chunk_count

    def chunks(self, rank: int) -> tuple[Chunk, ...]:
        """The chunks of a rank, in the order in which it has them: ascending."""
        numbers = (rank, self.chunk_count - 1 - rank) if self.is_zigzag else (rank,)
        return tuple(Chunk(number * self.chunk_length, (number + 1) * self.chunk_length) for number in numbers)

    def shard(self, whole: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        """A rank's part of a tensor with the whole sequence along `dim`."""
        return torch.cat([whole.narrow(dim, chunk.start, len(chunk)) for chunk in self.chunks(rank)], dim)

    def join(self, shards: list[torch.Tensor], dim: int) -> torch.Tensor:
        """The whole sequence again, from the parts of all ranks in rank order."""
        pieces: dict[int, torch.Tensor] = {}
        for rank, shard in enumerate(shards):
            own = self.chunks(rank)
            for chunk, piece in zip(own, shard.chunk(len(own), dim), strict=True):
                pieces[chunk.start] = piece
        return torch.cat([pieces[start] for start in sorted(pieces)], dim)


def sequence_length_problems(key: str, length: int, degree: int, *, is_zigzag: bool = True) -> list[str]:
    """The sentence for a sequence length that cannot be shared out evenly, with the nearest that can."""
    parts = 2 * degree if is_zigzag else degree
    if length % parts == 0:
        return []
    below, above = length // parts * parts, -(-length // parts) * parts
    nearest = f"{below} or {above}" if below else f"{above}"
    return [
        f"{key} = {length}: context_parallel_degree = {degree} cuts every sequence into {parts} equal chunks, so it "
        f"must be divisible by {parts}; the nearest are {nearest}."
    ]
