"""A schedule of one's own, from a CSV file in torch's compute-only format, checked before a rank runs it.

A row for each pipeline rank, a cell for each action: "0F1" is stage 0, forward, micro-batch 1; B is a backward, I and W
its halves for inputs and weights; an empty cell is a wait, and "(0F1;3B0)OVERLAP_F_B", which torch writes for
DualPipeV, two actions one after the other. `schedule._dump_csv(path, "compute_only")` of a torch schedule writes such a
file. Which rank has which stage, and the number of micro-batches, follow from it.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from pathlib import Path

from parallelize.pipeline_parallel.timeline import Action, simulate

_HALVES = {"backward_input", "backward_weight"}
# Problems that a message lists: one forgotten row makes hundreds.
_SHOWN = 8


def read_schedule_file(path: str, pp: int) -> list[list[Action]]:
    """For each of `pp` ranks its actions in their order, without waits. Raises a ValueError that lists the problems
    found, or an OSError where the file cannot be read."""
    order, found = [], []
    for number, row in enumerate(_rows(path), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        order.append([])
        for action in (part for cell in cells if cell for part in _parts(cell)):
            try:
                order[-1].append(Action.parse(action))
            except ValueError as error:
                found.append(f"line {number}: {error}")
    found = found or _problems(order, pp)
    if found:
        more = [f"and {len(found) - _SHOWN} more of the kind."] if len(found) > _SHOWN else []
        listed = "\n".join(f"      - {problem}" for problem in found[:_SHOWN] + more)
        raise ValueError(f'parallelism.pipeline_parallel_schedule_csv = "{path}": no schedule that can run:\n{listed}')
    return order


def _rows(path: str) -> list[list[str]]:
    try:
        # A spreadsheet begins its file with a byte order mark, which "utf-8-sig" leaves out.
        with Path(path).expanduser().open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f'parallelism.pipeline_parallel_schedule_csv = "{path}": is no CSV file in UTF-8 ({error}); name one with '
            "a row for each pipeline rank."
        ) from None


def _parts(cell: str) -> list[str]:
    match = re.fullmatch(r"\((.*)\)OVERLAP_F_B", cell)
    return [part.strip() for part in match[1].split(";")] if match else [cell]


def _problems(order: list[list[Action]], pp: int) -> list[str]:
    if len(order) != pp:
        return [
            f"it has {len(order)} rows with actions, and parallelism.pipeline_parallel_degree = {pp}: a row is what "
            "one pipeline rank does; make them equal."
        ]
    ranks: dict[int, set[int]] = {}
    for rank, actions in enumerate(order):
        for action in actions:
            ranks.setdefault(action.stage, set()).add(rank)
    found = [
        f"stage {stage} is on the ranks {', '.join(map(str, sorted(on)))}: a stage has one rank; write it on one."
        for stage, on in sorted(ranks.items())
        if len(on) > 1
    ]
    found = found or _missing_or_repeated([action for actions in order for action in actions])
    if not found:
        try:
            simulate(order, [1.0] * len(ranks))
        except ValueError as error:
            found.append(str(error))
    return found or _disordered(order)


def _disordered(order: list[list[Action]]) -> list[str]:
    """The sentence for a last stage whose forwards are not by number: torch 2.13 keeps losses in the order in which it
    computes them and takes them by micro-batch, so that backwards would get the loss of another one, without an error.
    """
    last = max(action.stage for actions in order for action in actions)
    forwards = [a for actions in order for a in actions if a.stage == last and a.kind == "forward"]
    for number, action in enumerate(forwards):
        if action.micro_batch != number:
            return [
                f"the last stage has {action} where {last}F{number} comes next; write its forwards in the order of the "
                "micro-batches. Its backwards, and other stages, may have another order."
            ]
    return []


def _missing_or_repeated(actions: list[Action]) -> list[str]:
    """The sentences for what is not there exactly once: a forward and a backward of every stage and micro-batch."""
    counted = Counter(actions)
    found = [f"{action} is there {count} times; leave it in once." for action, count in counted.items() if count > 1]
    stages = {action.stage for action in actions}
    micro_batches = {action.micro_batch for action in actions}
    for name, numbers in (("stage", stages), ("micro-batch", micro_batches)):
        if max(numbers) >= len(numbers):
            found.append(f"there is a {name} {max(numbers)}, and only {len(numbers)} in all; number them from 0 on.")
    for stage, micro_batch in itertools.product(sorted(stages), sorted(micro_batches)):
        kinds = {kind for kind in ("forward", "backward", *_HALVES) if Action(stage, kind, micro_batch) in counted}
        where = f"stage {stage}, micro-batch {micro_batch}"
        if "forward" not in kinds:
            found.append(f"{where}: no forward; add {stage}F{micro_batch}.")
        if kinds - {"forward"} not in ({"backward"}, _HALVES):
            found.append(
                f"{where}: needs one backward; write {stage}B{micro_batch}, or both {stage}I{micro_batch} and "
                f"{stage}W{micro_batch}."
            )
    return found
