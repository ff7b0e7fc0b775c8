"""Blocks through a flash kernel, which knows no mask but the causal one: others are cut into pieces (`cut.py`).

What a kernel cannot compute (softcaps, values of another width than keys, very narrow windows, very many documents)
goes to the reference, block by block; or, with another backend for `rest`, to that, and what would be cut as well.
"""

from __future__ import annotations

from typing import Protocol

import torch

from parallelize.context_parallel.blocks import BlockAttention, ReferenceBlocks
from parallelize.context_parallel.cut import Piece, cut
from parallelize.context_parallel.layout import Chunk
from parallelize.context_parallel.masks import BlockMask
from parallelize.context_parallel.merge import empty_sum, merge


class FlashKernel(Protocol):
    """Attention with all keys seen, or with as many keys as queries and the causal order; shapes as in `blocks.py`."""

    name: str

    def takes(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softcap: float | None) -> bool: ...

    def forward(self, query, key, value, is_causal: bool, scale: float, softcap: float | None) -> tuple: ...

    def backward(
        self, grad_out, query, key, value, out, log_sum, is_causal: bool, scale: float, softcap: float | None
    ) -> tuple: ...


class FlashBlocks:
    """A kernel as a block backend."""

    def __init__(self, kernel: FlashKernel, rest: BlockAttention | None = None) -> None:
        self.name = kernel.name if rest is None else f"{kernel.name}, {rest.name} for the rest"
        self._kernel = kernel
        self._cuts = rest is None
        self._rest = ReferenceBlocks() if rest is None else rest

    def forward(self, query, key, value, mask, *, scale, softcap=None):
        pieces = self._pieces(query, key, value, mask, softcap)
        if pieces is None:
            return self._rest.forward(query, key, value, mask, scale=scale, softcap=softcap)
        if _is_single(pieces, mask):
            return self._kernel.forward(query, key, value, pieces[0].kind == "causal", scale, softcap)
        out, log_sum = empty_sum(query, value.shape[-1])
        for piece in pieces:
            queries, keys = _places(piece, mask)
            found = self._kernel.forward(
                *_taken(piece, queries, query), *_taken(piece, keys, key, value), piece.kind != "whole", scale, softcap
            )
            merge(out[queries], log_sum[queries], *_turned(piece, *found))
        return out, log_sum

    def backward(self, grad_out, query, key, value, out, log_sum_exp, mask, *, scale, softcap=None):
        pieces = self._pieces(query, key, value, mask, softcap)
        if pieces is None:
            return self._rest.backward(
                grad_out, query, key, value, out, log_sum_exp, mask, scale=scale, softcap=softcap
            )
        if _is_single(pieces, mask):
            is_causal = pieces[0].kind == "causal"
            return self._kernel.backward(grad_out, query, key, value, out, log_sum_exp, is_causal, scale, softcap)
        totals = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (query, key, value)]
        for piece in pieces:
            queries, keys = _places(piece, mask)
            piece_grad, piece_query, piece_out, piece_sum = _taken(piece, queries, grad_out, query, out, log_sum_exp)
            piece_key, piece_value = _taken(piece, keys, key, value)
            found = self._kernel.backward(
                piece_grad, piece_query, piece_key, piece_value, piece_out, piece_sum,
                piece.kind != "whole", scale, softcap,
            )  # fmt: skip
            for total, place, part in zip(totals, (queries, keys, keys), _turned(piece, *found), strict=True):
                total[place] += part
        return tuple(totals)

    def _pieces(self, query, key, value, mask: BlockMask, softcap: float | None) -> list[Piece] | None:
        if not self._kernel.takes(query, key, value, softcap):
            return None
        return cut(mask) if self._cuts else _uncut(mask)


def _uncut(mask: BlockMask) -> list[Piece] | None:
    """The block as one piece, if it is one without being cut."""
    if mask.is_whole:
        return [Piece(mask.queries, mask.keys, "whole")]
    return [Piece(mask.queries, mask.keys, "causal")] if mask.is_plain_causal else None


def _is_single(pieces: list[Piece], mask: BlockMask) -> bool:
    """Whether the one piece is the whole block as it is."""
    return (
        len(pieces) == 1
        and pieces[0].kind != "reversed"
        and (pieces[0].row, pieces[0].queries, pieces[0].keys) == (None, mask.queries, mask.keys)
    )


def _places(piece: Piece, mask: BlockMask) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Indices of a piece's queries, and of its keys, in tensors (batch, heads, tokens, ...)."""
    rows = slice(None) if piece.row is None else slice(piece.row, piece.row + 1)

    def index(part: Chunk, block: Chunk) -> tuple[slice, ...]:
        return rows, slice(None), slice(part.start - block.start, part.stop - block.start)

    return index(piece.queries, mask.queries), index(piece.keys, mask.keys)


def _taken(piece: Piece, place: tuple[slice, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views, but for log-sum-exps (batch, heads, tokens), which kernels want dense."""
    taken = _turned(piece, *(tensor[place] for tensor in tensors))
    return tuple(tensor if tensor.dim() == 4 else tensor.contiguous() for tensor in taken)


def _turned(piece: Piece, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.flip(2) for tensor in tensors) if piece.kind == "reversed" else tensors
