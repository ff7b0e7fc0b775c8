"""How the kernels of attention blocks cut their work: see `attention_block.py`.

Candidates are by head size, in bf16, best first. Compiled for compute capabilities 8.0 and 9.0 they keep (nearly)
everything in registers and load ahead; none has been measured on a GPU yet. There is no search at run time: results
would then depend on what happened to be the fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from parallelize.kernels.language import OutOfResources, next_power_of_two


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work: tokens of a tile (powers of two from 16 on), and warps and stages of the pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 1


_SMALLEST = (Tiles(32, 32, 4, 1), Tiles(16, 16, 4, 1))
_FORWARD_TILES = {
    64: (Tiles(128, 128, 8, 2), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2)),
    128: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
    256: (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)),
    512: (Tiles(32, 32, 8, 1),),
}
_GRAD_QUERY_TILES = {
    64: (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
    128: (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
    256: (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    512: (Tiles(32, 32, 8, 1),),
}
_GRAD_KEY_TILES = {
    64: (Tiles(64, 128, 8, 2), Tiles(32, 64, 8, 2)),
    128: (Tiles(32, 128, 8, 2), Tiles(32, 64, 8, 2)),
    256: (Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 2)),
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
    """Those for which a GPU's shared memory has room for so many numbers, and the smallest."""
    if query.device.type != "cuda":
        return [_SMALLEST[0]]
    room = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
    candidates = by_width[max(64, *widths(query, value))]
    return [*(tiles for tiles in candidates if numbers(tiles) * query.element_size() <= room), *_SMALLEST]


def launch_with(candidates: list[Tiles], launch: Callable[[Tiles], None]) -> None:
    """With the first that the GPU has room for: how much a kernel needs is known exactly once it is compiled."""
    for tiles in candidates[:-1]:
        try:
            return launch(tiles)
        except OutOfResources:
            continue
    return launch(candidates[-1])


def widths(query: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
    """Of the tiles of queries and keys, and of values: heads of other sizes are filled up with zeros."""
    return tuple(max(16, next_power_of_two(tensor.shape[-1])) for tensor in (query, value))
