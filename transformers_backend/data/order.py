"""In which order documents are read, by whom, and how that goes on with another number of data ranks.

A source is one endless sequence of places 0, 1, 2, ...: place v is the document at position v % count of epoch
v // count, and every epoch has a permutation of its own. Data rank r of W reads places r, r + W, ..., so where a rank
is in its source is a single number, and epochs need no special case. A leaf of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np

_ROUNDS = 8


def documents_at(places: np.ndarray, count: int, seed: int | None) -> np.ndarray:
    """The document numbers (int64, below `count`) at `places` of the endless sequence; in order where seed is None."""
    epochs, positions = np.divmod(places, count)
    return positions if seed is None else _permute(positions, count, seed, epochs)


def _permute(positions: np.ndarray, count: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Where the permutation of range(count) that (seed, epoch) choose sends each position; arrays of one shape.

    A permutation of billions is never held: each image is computed, by a Feistel network over rows x columns with
    modular addition, walked along its cycle until it lands below `count` (J. Black and P. Rogaway, "Ciphers with
    Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3). The round function is the finalizer of SplitMix64 (Steele,
    Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014): well mixed, not secret.
    """
    rows = isqrt(count - 1) + 1 if count > 1 else 1
    columns = -(-count // rows)
    keys = _mix(_mix(np.full(positions.shape, seed % 2**64, np.uint64)) + epochs.astype(np.uint64))
    images = positions.astype(np.uint64)
    walking = np.arange(len(images))
    while len(walking):
        images[walking] = _feistel(images[walking], keys[walking], np.uint64(rows), np.uint64(columns))
        walking = walking[images[walking] >= count]
    return images.astype(np.int64)


def _feistel(numbers: np.ndarray, keys: np.ndarray, rows: np.uint64, columns: np.uint64) -> np.ndarray:
    """A permutation of range(rows * columns) for each key; all arrays uint64."""
    row, column = numbers // columns, numbers % columns
    for number in range(_ROUNDS):
        round_keys = keys + np.uint64(number)
        if number % 2 == 0:
            row = (row + _mix(column ^ _mix(round_keys)) % rows) % rows
        else:
            column = (column + _mix(row ^ _mix(round_keys)) % columns) % columns
    return row * columns + column


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass
class Cursor:
    """Where data rank `rank` of `world_size` is in a source: it has taken `taken` of the places that are its own.

    What all ranks together read is the line of places `holes` (ascending; left over from an earlier number of ranks),
    then `next`, `next + 1`, ... without end. Rank r gets the entries r, r + W, ... of that line.
    """

    rank: int
    world_size: int
    holes: tuple[int, ...] = ()
    next: int = 0
    taken: int = 0

    def places(self, first: int, count: int) -> np.ndarray:
        """This rank's places number `first` to `first + count` (counted from where the line starts), int64."""
        entries = self.rank + self.world_size * np.arange(first, first + count, dtype=np.int64)
        places = self.next + entries - len(self.holes)
        inside = entries < len(self.holes)
        if inside.any():
            places[inside] = np.asarray(self.holes, dtype=np.int64)[entries[inside]]
        return places

    def state_dict(self) -> dict[str, Any]:
        return {"holes": list(self.holes), "next": self.next, "taken": self.taken}


def merge_cursors(states: Sequence[dict[str, Any]], rank: int, world_size: int) -> Cursor:
    """The cursor of `rank` where the ranks that saved `states` (all of them, in rank order) have stopped.

    Every place that one of them has taken is behind, every other one is ahead, whatever the numbers of ranks.
    """
    holes, saved_ranks = states[0]["holes"], len(states)
    assert all(state["holes"] == holes and state["next"] == states[0]["next"] for state in states)
    # The entry of the line after the last one that anybody has taken; all before it are taken or a hole.
    frontier = max(
        r + saved_ranks * (state["taken"] - 1) + 1 if state["taken"] else 0 for r, state in enumerate(states)
    )
    line = Cursor(0, 1, tuple(holes), states[0]["next"])
    taken = np.zeros(frontier, dtype=bool)
    for r, state in enumerate(states):
        taken[r : r + saved_ranks * state["taken"] : saved_ranks] = True
    left = line.places(0, max(frontier, len(holes)))
    left = left[~np.pad(taken, (0, len(left) - frontier))]
    following = states[0]["next"] + max(frontier - len(holes), 0)
    return Cursor(rank, world_size, tuple(left.tolist()), following)
