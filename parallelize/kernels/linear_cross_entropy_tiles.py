"""How the kernels of `linear_cross_entropy.py` may cut their matrix products; `search.py` finds the fastest.

None has been measured on a GPU yet; `linear_cross_entropy_kernels.py` says what a product's rows and columns are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from parallelize.kernels.language import next_power_of_two


class Tile(NamedTuple):
    """Rows x columns of a product, `inner` numbers of each summed at a time; warps, and stages of the pipeline."""

    rows: int
    columns: int
    inner: int
    warps: int = 8
    stages: int = 3

    @property
    def options(self) -> dict[str, int]:
        """What a kernel is compiled with."""
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "INNER": self.inner, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


_TILES = {
    2: (  # bytes of a number; the first is for Hopper and Ampere, the second for GPUs with less shared memory
        Tile(128, 256, 64), Tile(128, 128, 32), Tile(256, 128, 64), Tile(128, 256, 64, 8, 4), Tile(128, 128, 64),
        Tile(128, 64, 64, 4),
    ),
    # Whole products in fp32, without tensor cores: registers are what is short.
    4: (Tile(64, 64, 32, 4), Tile(64, 64, 16, 4), Tile(128, 64, 16, 8)),
}  # fmt: skip

SMALLEST = (Tile(64, 64, 32, 4, 2), Tile(32, 32, 16, 4, 2))
"""Where a GPU has room for no candidate."""


def product_tiles(like: torch.Tensor, rows: int, columns: int, inner: int) -> list[Tile]:
    """Those for which a GPU's shared memory has room, no larger than a product of these sizes."""
    tiles = _TILES[like.element_size()]
    if like.is_cuda:
        room = torch.cuda.get_device_properties(like.device).shared_memory_per_block_optin
        tiles = [tile for tile in tiles if _bytes(tile, like.element_size()) <= room]
    return [*dict.fromkeys(_cut(tile, rows, columns, inner) for tile in tiles)]


def _bytes(tile: Tile, size: int) -> int:
    return tile.stages * (tile.rows + tile.columns) * tile.inner * size


def _cut(tile: Tile, *sizes: int) -> Tile:
    rows, columns, inner = (
        max(16, min(next_power_of_two(size), most)) for size, most in zip(sizes, tile[:3], strict=True)
    )
    return Tile(rows, columns, inner, tile.warps if rows * columns >= 128 * 128 else min(tile.warps, 4), tile.stages)
