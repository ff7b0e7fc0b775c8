"""Fused parameters: stored order and back against concatenation by hand, and ranges of it against index_select."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from parallelize.tensor_parallel.packing import Packing, Piece, packing_of, set_packing

# dim, segments, degree: [gate | up], [q | k | v] with fewer kv heads, a Conv1D, one segment, degree 1, an empty one.
CASES = [
    (0, (4, 4), 2),
    (0, (8, 4, 4), 4),
    (1, (6, 6, 6), 3),
    (0, (12,), 4),
    (1, (5, 3), 1),
    (0, (4, 0, 8), 2),
    (2, (16, 8, 8), 8),
]


def _full(dim: int, size: int) -> torch.Tensor:
    shape = [3] * (dim + 2)
    shape[dim] = size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _stored_by_hand(full: torch.Tensor, dim: int, segments: tuple[int, ...], degree: int) -> torch.Tensor:
    parts = [segment.tensor_split(degree, dim) for segment in full.split(list(segments), dim)]
    return torch.cat([part[rank] for rank in range(degree) for part in parts], dim)


@pytest.mark.parametrize(("dim", "segments", "degree"), CASES)
def test_stored_order_is_each_ranks_part_of_every_segment(dim: int, segments: tuple[int, ...], degree: int):
    packing, full = Packing(dim, segments, degree), _full(dim, sum(segments))
    stored = packing.to_stored(full)
    assert torch.equal(stored, _stored_by_hand(full, dim, segments, degree))
    assert torch.equal(packing.to_original(stored), full)
    assert torch.equal(full.index_select(dim, packing.stored_order()), stored)
    assert torch.equal(stored.index_select(dim, packing.original_order()), full)


@pytest.mark.parametrize(("dim", "segments", "degree"), CASES)
def test_pieces_of_every_range(dim: int, segments: tuple[int, ...], degree: int):
    packing, full = Packing(dim, segments, degree), _full(dim, sum(segments))
    stored = _stored_by_hand(full, dim, segments, degree)
    for start in range(packing.size + 1):
        for end in range(start, packing.size + 1):
            pieces = packing.pieces(start, end)
            assert sum(piece.length for piece in pieces) == end - start
            expected_start = start
            for piece in pieces:
                assert piece.stored_start == expected_start, "side by side"
                expected_start += piece.length
                assert torch.equal(
                    full.narrow(dim, piece.original_start, piece.length),
                    stored.narrow(dim, piece.stored_start, piece.length),
                )
            joints = itertools.pairwise(pieces)
            assert all(one.original_start + one.length != next.original_start for one, next in joints), "merged"


def test_pieces_of_random_packings_are_those_of_the_order():
    generator = random.Random(0)
    for _ in range(200):
        degree = generator.randint(1, 8)
        packing = Packing(0, tuple(degree * generator.randint(1, 9) for _ in range(generator.randint(1, 4))), degree)
        start, end = sorted(generator.randint(0, packing.size) for _ in range(2))
        pieces = packing.pieces(start, end)
        positions = [piece.original_start + i for piece in pieces for i in range(piece.length)]
        assert positions == packing.stored_order()[start:end].tolist()


def test_pieces_of_the_example_in_the_documentation():
    packing = Packing(0, (4, 4), 2)
    assert packing.stored_order().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert packing.pieces(0, 4) == [Piece(0, 0, 2), Piece(2, 4, 2)], "rank 0"
    assert packing.pieces(5, 8) == [Piece(5, 3, 1), Piece(6, 6, 2)], "the end of rank 1"
    assert packing.pieces(3, 3) == []
    assert Packing(0, (4, 4), 1).pieces(0, 8) == [Piece(0, 0, 8)], "one rank: the original"


@pytest.mark.parametrize("wrong", [(0, (4, 3), 2), (-1, (4, 4), 2), (0, (4, 4), 0)])
def test_what_cannot_be_packed(wrong):
    with pytest.raises(AssertionError):
        Packing(*wrong)


def test_a_packing_is_found_by_the_name_in_the_model():
    model = nn.Sequential(nn.Linear(2, 4), nn.ModuleDict({"inner": nn.Linear(2, 4)}))
    packing = Packing(0, (2, 2), 2)
    set_packing(model[1]["inner"], "weight", packing)
    found = {name: packing_of(model, name) for name, _ in model.named_parameters()}
    assert found == {"0.weight": None, "0.bias": None, "1.inner.weight": packing, "1.inner.bias": None}
    assert packing_of(model[1]["inner"], "weight") == packing, "at the top"
    with pytest.raises(AssertionError, match="kernel"):
        set_packing(model[0], "kernel", packing)
