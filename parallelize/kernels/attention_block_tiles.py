"""How the kernels of attention blocks may cut their work: see `attention_block.py`.

Candidates are by head size, in bf16; `search.py` finds the fastest. The first is what compiled for compute capabilities
8.0 and 9.0 keeps (nearly) everything in registers and loads ahead; none has been measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from parallelize.kernels.language import next_power_of_two


class Tiles(NamedTuple):
    """How a kernel cuts its work: tokens of a tile (powers of two from 16 on), and warps and stages of the pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 1


SMALLEST = (Tiles(32, 32, 4, 1), Tiles(16, 16, 4, 1))
"""Where a GPU has room for no candidate."""

_FORWARD_TILES = {
    64: (Tiles(128, 128, 8, 2), Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 2)),
    128: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(128, 128, 8, 2), Tiles(128, 32, 4, 3), Tiles(64, 64, 4, 2)),
    256: (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2)),
    512: (Tiles(32, 32, 8, 1),),
}
_GRAD_QUERY_TILES = {
    64: (Tiles(128, 64, 8, 2), Tiles(128, 128, 8, 2), Tiles(64, 128, 4, 2), Tiles(64, 64, 4, 2)),
    128: (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 2), Tiles(64, 128, 8, 2)),
    256: (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(128, 32, 8, 1)),
    512: (Tiles(32, 32, 8, 1),),
}
_GRAD_KEY_TILES = {
    64: (Tiles(64, 128, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 128, 8, 2), Tiles(64, 128, 8, 3)),
    128: (Tiles(32, 128, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 128, 8, 3), Tiles(32, 64, 8, 3)),
    256: (Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 2), Tiles(16, 64, 8, 2)),
    512: (Tiles(32, 32, 8, 1),),
}


def forward_tiles(query: torch.Tensor, value: torch.Tensor) -> list[Tiles]:
    width, value_width = widths(query, value)
    return _that_fit(_FORWARD_TILES, query, value, lambda tiles: (
        tiles.queries * width + tiles.stages * tiles.keys * (width + value_width)
    ))  # fmt: skip


def grad_query_tiles(query: torch.Tensor, value: torch.Tensor) -> list[Tiles]:
    width = sum(widths(query, value))
    return _that_fit(_GRAD_QUERY_TILES, query, value, lambda tiles: (
        (tiles.queries + tiles.stages * tiles.keys) * width + tiles.queries * tiles.keys
    ))  # fmt: skip


def grad_key_tiles(query: torch.Tensor, value: torch.Tensor) -> list[Tiles]:
    width = sum(widths(query, value))
    return _that_fit(_GRAD_KEY_TILES, query, value, lambda tiles: (
        (tiles.keys + tiles.stages * tiles.queries) * width + 2 * tiles.queries * tiles.keys
    ))  # fmt: skip


def _that_fit(
    by_width: dict[int, tuple[Tiles, ...]], query: torch.Tensor, value: torch.Tensor, numbers: Callable[[Tiles], int]
) -> list[Tiles]:
    """Those for which a GPU's shared memory has room for so many numbers."""
    if query.device.type != "cuda":
        return [SMALLEST[0]]
    room = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
    candidates = by_width[max(64, *widths(query, value))]
    return [tiles for tiles in candidates if numbers(tiles) * query.element_size() <= room]


def widths(query: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
    """Of the tiles of queries and keys, and of values: heads of other sizes are filled up with zeros."""
    return tuple(max(16, next_power_of_two(tensor.shape[-1])) for tensor in (query, value))
