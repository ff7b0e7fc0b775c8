"""Fused parameters ([q | k | v], [gate | up]): the order in which tensor parallelism stores them, and the way back.

A leaf of tensor parallelism. What shards a model describes its fused parameters with `set_packing`; whatever reads or
writes parameters asks `packing_of`: loading, initialisation, full tensors, checkpoints, exports.

A fused parameter cannot be cut straight through: the first half of [gate | up] is all of gate and nothing of up. Each
rank needs its part of every segment, and a DTensor's shards lie side by side, so the parameter is stored in another
order than Transformers' (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3, shards q, k and v each by
heads). For [gate | up] of 4 + 4 rows on 2 ranks:

    original   g0 g1 g2 g3 u0 u1 u2 u3
    stored     g0 g1 u0 u1 | g2 g3 u2 u3        (rank 0 | rank 1)

The stored order depends on the degree, so nothing leaves the process in it: what is saved or exported is in the
original order, and any degree reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

_ATTRIBUTE = "_packings"  # of a module: {name of its own parameter: Packing}


@dataclass(frozen=True)
class Piece:
    """A run of positions that lie side by side both in stored and in original order."""

    stored_start: int
    original_start: int
    length: int


@dataclass(frozen=True)
class Packing:
    """Along `dim` the original parameter is the concatenation of `segments`; stored is, for each rank of `degree` in
    turn, its equal part of every segment."""

    dim: int
    """Counted from the front, as in Shard(dim)."""
    segments: tuple[int, ...]
    """Sizes along `dim`, each divisible by `degree`."""
    degree: int
    """Number of tensor-parallel ranks."""

    def __post_init__(self) -> None:
        assert self.dim >= 0, self
        assert self.degree >= 1, self
        assert all(size % self.degree == 0 for size in self.segments), self

    @property
    def size(self) -> int:
        """Of the parameter along `dim`."""
        return sum(self.segments)

    def stored_order(self) -> torch.Tensor:
        """(size,) int64 on the CPU: stored[i] = original[order[i]] along `dim`."""
        return torch.cat(
            [torch.arange(block.original_start, block.original_start + block.length) for block in self._blocks()]
        )

    def original_order(self) -> torch.Tensor:
        """(size,) int64 on the CPU: original[i] = stored[order[i]] along `dim`, the inverse of `stored_order`."""
        return self.stored_order().argsort()

    def to_stored(self, full: torch.Tensor) -> torch.Tensor:
        """A copy in stored order of a full tensor in original order, of the parameter's shape."""
        return self._select(full, self.stored_order())

    def to_original(self, full: torch.Tensor) -> torch.Tensor:
        """A copy in original order of a full tensor in stored order, of the parameter's shape."""
        return self._select(full, self.original_order())

    def pieces(self, start: int, end: int) -> list[Piece]:
        """Where the stored positions start <= position < end are in the original, as few pieces in stored order."""
        assert 0 <= start <= end <= self.size, (start, end, self)
        pieces: list[Piece] = []
        for block in self._blocks():
            first, last = max(start, block.stored_start), min(end, block.stored_start + block.length)
            if first < last:
                pieces.append(Piece(first, block.original_start + first - block.stored_start, last - first))
        return _merge(pieces)

    def _blocks(self) -> list[Piece]:
        """Every rank's part of every segment, in stored order."""
        blocks, stored_start = [], 0
        for rank in range(self.degree):
            segment_start = 0
            for size in self.segments:
                part = size // self.degree
                blocks.append(Piece(stored_start, segment_start + rank * part, part))
                stored_start += part
                segment_start += size
        return blocks

    def _select(self, full: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        assert full.shape[self.dim] == self.size, (full.shape, self)
        return full.index_select(self.dim, order.to(full.device))


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Join neighbours in stored order that are neighbours in original order too."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and last.original_start + last.length == piece.original_start:
            merged[-1] = Piece(last.stored_start, last.original_start, last.length + piece.length)
        else:
            merged.append(piece)
    return merged


def set_packing(module: nn.Module, parameter_name: str, packing: Packing) -> None:
    """Note on the module that owns a parameter that it is stored as `packing` says.

    parameter_name: the module's own name of it, such as "weight". The parameter becomes a DTensor whose shard along
    `packing.dim` of each tensor-parallel rank is that rank's part of the stored order. That local tensor has memory of
    its own: torch's stager for checkpoints takes no DTensor of a view ("invalid python storage", torch 2.13), and a
    view would keep the full parameter alive.
    """
    assert parameter_name in module._parameters, parameter_name
    vars(module).setdefault(_ATTRIBUTE, {})[parameter_name] = packing


def packing_of(model: nn.Module, parameter_name: str) -> Packing | None:
    """How a parameter (or buffer) of `model` is packed; None where its order is the original one.

    parameter_name: as in `model.named_parameters(remove_duplicate=False)`.
    """
    owner, _, name = parameter_name.rpartition(".")
    return vars(model.get_submodule(owner)).get(_ATTRIBUTE, {}).get(name)
