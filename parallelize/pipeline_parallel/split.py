"""Which layers each stage of a pipeline gets: balanced by what they cost, or as the user names them. Pure arithmetic.

The caller counts what every layer costs (`transformers_backend/flops.py`) and finds out where the model must not be
cut (`transformers_backend/stage_proof.py`); `stages.py` builds the stages from the ranges of layers that come out here.

A pipeline is as fast as its slowest stage, so `split_layers` makes the most expensive stage as cheap as possible. What
runs before the first layer and after the last (the head, above all) is part of the first and the last stage. This is
the linear partition problem, solved exactly by dynamic programming (S. Skiena, The Algorithm Design Manual, 8.5), where
counting layers, as torchtitan does, is the special case of equal costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# Costs are counted in whole numbers, so that equal splits are equal in whatever order they are added up.
_UNITS = 2**40


def split_layers(
    layer_costs: Sequence[float],
    *,
    first_cost: float,
    last_cost: float,
    stages: int,
    forbidden_cuts: Collection[int] = (),
) -> list[range]:
    """Contiguous ranges of layers, one for each stage, so that the most expensive stage is as cheap as possible.

    Every stage gets at least one layer. Among equally good splits the one with the smallest sum of squared costs is
    taken, and among those the one whose earlier stages have fewer layers: they keep more micro-batches' activations.

    layer_costs: one for each layer, in any unit, e.g. FLOPs a token. first_cost, last_cost: of what stage 0 and the
    last stage run beside layers, in that unit. stages: of the whole pipeline, all ranks together. forbidden_cuts:
    layers that must not begin a stage, because they use something of an earlier layer that does not travel.

    Raises ValueError where there are more stages than the layers, or the allowed cuts, give.
    """
    count = len(layer_costs)
    _check_cuts(count, stages, forbidden_cuts)
    costs = list(layer_costs)
    costs[0] += first_cost
    costs[-1] += last_cost
    begins = [layer for layer in range(count) if layer == 0 or layer not in forbidden_cuts]  # of inseparable blocks
    unit = (sum(costs) or 1.0) / _UNITS
    units = [round(cost / unit) for cost in costs]
    blocks = [sum(units[begin:end]) for begin, end in itertools.pairwise([*begins, count])]
    highest = _lowest_maximum(blocks, stages) + count  # each rounding is half a unit at most
    cuts = [begins[block] for block in _cuts_of_least_squares(blocks, stages, highest)]
    return [range(begin, end) for begin, end in itertools.pairwise([0, *cuts, count])]


def _lowest_maximum(blocks: Sequence[int], stages: int) -> int:
    """The cost of the most expensive stage where it is cheapest: by bisection, filling one stage after the other."""
    low, high = max(blocks), sum(blocks)
    while low < high:
        middle = (low + high) // 2
        used, filled = 1, 0
        for block in blocks:
            filled += block
            if filled > middle:
                used, filled = used + 1, block
        low, high = (low, middle) if used <= stages else (middle + 1, high)
    return low


def _cuts_of_least_squares(blocks: Sequence[int], stages: int, highest: int) -> list[int]:
    """Where the stages but the first begin, so that none costs more than `highest` and their squares sum to the least.

    Few blocks fit under `highest` at a time, so the work is about the square of the number of blocks.
    """
    best: dict[int, int] = {0: 0}  # least sum of squares of the stages so far, by the number of blocks they hold
    begins: list[dict[int, int]] = []  # for each stage where it begins, by where it ends
    for stage in range(stages):
        following: dict[int, int] = {}
        begins.append({})
        for end in range(stage + 1, len(blocks) - (stages - 1 - stage) + 1):
            cost = 0
            for begin in range(end - 1, stage - 1, -1):
                cost += blocks[begin]
                if cost > highest:
                    break
                if begin in best and (end not in following or best[begin] + cost**2 <= following[end]):
                    following[end], begins[stage][end] = best[begin] + cost**2, begin
        best = following
    cuts, end = [], len(blocks)
    for by_end in reversed(begins):
        end = by_end[end]
        cuts.insert(0, end)
    return cuts[1:]


def _check_cuts(layers: int, stages: int, forbidden_cuts: Collection[int]) -> None:
    if stages > layers:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree: gives {stages} stages for {layers} layers, and every stage needs a "
            f"layer. Set the degree, or a schedule with fewer stages a rank, so that there are at most {layers}."
        )
    possible = layers - len({cut for cut in forbidden_cuts if 0 < cut < layers})
    if stages > possible:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree: gives {stages} stages, but these {layers} layers can only be cut "
            f"into {possible}, because some must stay with the layer before them (they reuse its keys and values, for "
            f"example). Set the degree, or a schedule with fewer stages a rank, so that there are at most {possible}."
        )


def first_and_last_cost(
    layer_costs: Sequence[float],
    *,
    first_cost: float,
    last_cost: float,
    first_stage_less_layers: int = -1,
    last_stage_less_layers: int = -1,
    stages: int = 1,
) -> tuple[float, float]:
    """What the first and the last stage run beside layers, as torchtitan's two keys state it where they are given.

    first_cost and last_cost, in the unit of layer_costs, count where a key is -1. 0 or more stands for so many layers
    of mean cost: the stage gets about that many layers less than the others. Raises a ValueError where they are more
    than each of `stages` stages has (torchtitan's rule), so that it could not have so many less.
    """
    given = {"first": max(0, first_stage_less_layers), "last": max(0, last_stage_less_layers)}
    mean_layers = (len(layer_costs) + sum(given.values())) / stages
    for stage, less in given.items():
        if less > mean_layers:
            raise ValueError(
                f"parallelism.pipeline_parallel_{stage}_stage_less_layers = {less}: must be at most what each of the "
                f"{stages} stages has, ({len(layer_costs)} layers + {sum(given.values())}) / {stages} = "
                f"{mean_layers:g}; lower it, or set -1 to go by the cost."
            )
    mean = sum(layer_costs) / len(layer_costs)
    return (
        first_cost if first_stage_less_layers < 0 else first_stage_less_layers * mean,
        last_cost if last_stage_less_layers < 0 else last_stage_less_layers * mean,
    )


def split_by_names(
    module_names_per_part: Sequence[Sequence[str]],
    layer_names: Sequence[str],
    *,
    places: Mapping[str, Literal["first", "last", "any"]] | None = None,
    stages: int | None = None,
    forbidden_cuts: Collection[int] = (),
) -> list[range]:
    """The ranges of layers that `parallelism.module_fqns_per_model_part` states, one for each stage.

    layer_names: of all layers in order, e.g. "model.layers.0". places: where modules that are no layers may be named,
    e.g. {"model.embed_tokens": "first", "lm_head": "last", "model.rotary_emb": "any"}; naming them is not needed.
    stages: how many parts the schedule needs; None does not check. forbidden_cuts: see `split_layers`.

    Raises one ValueError that lists every part and name that is wrong.
    """
    problems = []
    if stages not in (None, len(module_names_per_part)):
        parts = len(module_names_per_part)
        problems.append(f"has {parts} parts, but the schedule runs {stages} stages; state a part for each")
    problems += _misplaced_names(module_names_per_part, layer_names, places or {})
    layers_of_parts = [[name for name in names if name in set(layer_names)] for names in module_names_per_part]
    problems += [
        f"part {part} has no layer; give it at least one" for part, names in enumerate(layers_of_parts) if not names
    ]
    problems += _first_out_of_order(layers_of_parts, layer_names)
    if not problems:
        ends = list(itertools.accumulate(map(len, layers_of_parts)))
        ranges = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        problems = [
            f"part {part} begins with {layer_names[layers.start]}, which must stay with the layer before it (it reuses "
            "something that does not travel from stage to stage); begin the part elsewhere"
            for part, layers in enumerate(ranges)
            if part > 0 and layers.start in forbidden_cuts
        ]
    if problems:
        raise ValueError(f"parallelism.module_fqns_per_model_part: {'; '.join(problems)}.")
    return ranges


def _misplaced_names(
    parts: Sequence[Sequence[str]], layer_names: Sequence[str], places: Mapping[str, str]
) -> Iterator[str]:
    """A sentence for every name that is no layer and does not belong where it stands."""
    for part, name in ((part, name) for part, names in enumerate(parts) for name in names if name not in layer_names):
        place = places.get(name)
        if place is None:
            yield (
                f'part {part} names "{name}", which is no layer and nothing that runs beside them; allowed are '
                f"{', '.join([layer_names[0], '...', layer_names[-1], *places])}"
            )
        elif (place == "first" and part > 0) or (place == "last" and part < len(parts) - 1):
            yield f'part {part} names "{name}", which runs in the {place} part; name it there or leave it out'


def _first_out_of_order(layers_of_parts: Sequence[Sequence[str]], layer_names: Sequence[str]) -> list[str]:
    """A sentence for the first layer that is not the one that comes next, or for those that are missing at the end."""
    named = [(part, name) for part, names in enumerate(layers_of_parts) for name in names]
    rule = "every layer must be named once, in order"
    for number, (part, name) in enumerate(named):
        expected = layer_names[number] if number < len(layer_names) else "no layer"
        if name != expected:
            return [f"part {part} names {name} where {expected} comes next; {rule}"]
    if len(named) < len(layer_names):
        return [f"no part names {layer_names[len(named)]}; {rule}"]
    return []


@dataclass(frozen=True)
class StageShare:
    """One stage of a pipeline, for the table that is printed at the start."""

    stage: int
    layers: range
    parameters: int
    """That the stage's rank holds for it, before any sharding."""
    cost: float
    """In the unit of the layers' costs."""
    share: float
    """Of the cost of the whole model, from 0 to 1."""


def stage_costs(
    split: Sequence[range], layer_costs: Sequence[float], *, first_cost: float, last_cost: float
) -> list[float]:
    """What each stage costs, in the unit of layer_costs."""
    return [
        sum(layer_costs[layer] for layer in layers) + _extra(stage, len(split), first_cost, last_cost)
        for stage, layers in enumerate(split)
    ]


def stage_shares(
    split: Sequence[range],
    layer_costs: Sequence[float],
    *,
    first_cost: float,
    last_cost: float,
    parameters: Sequence[int],
) -> list[StageShare]:
    """The table's rows. parameters: that each stage holds; a tied embedding counts on every stage that has a copy."""
    costs = stage_costs(split, layer_costs, first_cost=first_cost, last_cost=last_cost)
    rows = enumerate(zip(split, parameters, costs, strict=True))
    return [StageShare(stage, layers, held, cost, cost / sum(costs)) for stage, (layers, held, cost) in rows]


def _extra(stage: int, stages: int, first_cost: float, last_cost: float) -> float:
    return first_cost * (stage == 0) + last_cost * (stage == stages - 1)
