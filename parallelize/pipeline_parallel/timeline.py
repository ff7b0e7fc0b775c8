"""When each rank of a pipeline computes what: a simulation of an order of actions, and the idle share of it.

A leaf below `schedules.py`, which makes the orders. Communication takes no time here, and a rank waits where it must:
a lower bound of the idle time that a run will have, and what the papers draw.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]

LETTERS: dict[str, Kind] = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}
"""torch's one-letter names of what a rank computes; B is I and W in one."""

RELATIVE_COST: dict[Kind, int] = {"forward": 1, "backward": 2, "backward_input": 1, "backward_weight": 1}
"""Of a stage's forward: a backward has a product for the inputs and one for the weights where a forward has one."""


@dataclass(frozen=True)
class Action:
    """What a rank computes at a time."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        letter = next(letter for letter, kind in LETTERS.items() if kind == self.kind)
        return f"{self.stage}{letter}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read torch's notation, such as "0F1": stage 0, forward, micro-batch 1. Raises a ValueError."""
        match = re.fullmatch(r"(\d+)([FBIW])(\d+)", text)
        if match is None:
            raise ValueError(
                f'"{text}" is no action: write stage, F, B, I or W, and micro-batch, as in 0F1, and nothing where the '
                "rank waits."
            )
        return cls(int(match[1]), LETTERS[match[2]], int(match[3]))


@dataclass(frozen=True)
class Slot:
    """An action in time; start and end are in the unit of the costs."""

    stage: int
    micro_batch: int
    kind: Kind
    start: float
    end: float


def simulate(order: Sequence[Sequence[Action]], forward_costs: Sequence[float]) -> list[list[Slot]]:
    """For each rank the slots of its actions, in its order, each as early as the rank and what it needs are there.

    order: for each rank what it computes. forward_costs: of one micro-batch through each stage; `RELATIVE_COST` gives
    those of the backward. Raises a ValueError where ranks would wait for each other without end.
    """
    ended: dict[Action, float] = {}
    slots: list[list[Slot]] = [[] for _ in order]
    free = [0.0] * len(order)
    remaining = sum(map(len, order))
    while remaining:
        before = remaining
        for rank, actions in enumerate(order):
            for action in actions[len(slots[rank]) :]:
                ready = _ready_at(action, ended, len(forward_costs) - 1)
                if ready is None:
                    break
                start = max(ready, free[rank])
                free[rank] = ended[action] = start + RELATIVE_COST[action.kind] * forward_costs[action.stage]
                slots[rank].append(Slot(action.stage, action.micro_batch, action.kind, start, free[rank]))
                remaining -= 1
        if remaining == before:
            raise ValueError(_deadlock(order, [len(done) for done in slots]))
    return slots


def _ready_at(action: Action, ended: dict[Action, float], last_stage: int) -> float | None:
    """When the results are there that an action needs; None where one of them is not computed yet."""

    def end_of(stage: int, *kinds: Kind) -> float | None:
        ends = (ended.get(Action(stage, kind, action.micro_batch)) for kind in kinds)
        return next((end for end in ends if end is not None), None)

    stage = action.stage
    if action.kind == "forward":
        return 0.0 if stage == 0 else end_of(stage - 1, "forward")
    if action.kind == "backward_weight":
        return end_of(stage, "backward_input")
    own = end_of(stage, "forward")
    later = 0.0 if stage == last_stage else end_of(stage + 1, "backward", "backward_input")
    return None if own is None or later is None else max(own, later)


def _deadlock(order: Sequence[Sequence[Action]], done: Sequence[int]) -> str:
    waiting = [
        f"rank {rank} for what {actions[count]} needs"
        for rank, (actions, count) in enumerate(zip(order, done, strict=True))
        if count < len(actions)
    ]
    return f"the ranks would wait without end: {', '.join(waiting)}; change the order of the actions."


def peak_in_flight(slots: Sequence[Slot], sizes: Mapping[int, float]) -> float:
    """The most that a rank keeps at one time for backwards that are to come.

    slots: of the rank. sizes: what a micro-batch keeps of its forward through each of its stages, until its backward is
    over, or both halves of it.
    """
    kept, peak = 0.0, 0.0
    for slot in slots:
        if slot.kind == "forward":
            kept += sizes[slot.stage]
        elif slot.kind != "backward_input":
            kept -= sizes[slot.stage]
        peak = max(peak, kept)
    return peak


def bubble_share(timeline: Sequence[Sequence[Slot]]) -> float:
    """The share of all ranks' time, from the first start to the last end of any, in which they have nothing to do."""
    end = max(slot.end for slots in timeline for slot in slots)
    busy = sum(slot.end - slot.start for slots in timeline for slot in slots)
    return 1 - busy / (len(timeline) * end)
