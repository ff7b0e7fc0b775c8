"""Pipeline schedules by name or from a file: where stages are, what rules hold, when ranks are idle, torch's object.

The schedules are torch.distributed.pipelining's, and so are their rules; here they are told before a process starts.

    name                     stages a rank   placed   micro-batches                         backward
    GPipe                    1               loop     any number                            whole
    1F1B                     1               loop     at least as many as ranks             whole
    Interleaved1F1B          2 or more       loop     n // ranks must divide n, if > 0      whole
    LoopedBFS                2 or more       loop     any number                            whole
    InterleavedZeroBubble    2 or more       loop     n // ranks must divide n, if > 0      in halves
    ZBVZeroBubble            2               v        any number                            in halves
    DualPipeV                2               v        at least as many as stages            in halves

Placed "loop", stage s is on rank s % ranks; placed "v", rank r has the stages r and 2 ranks - 1 - r. A file
(`schedule_file.py`) says all of this itself. Sources: GPipe (https://arxiv.org/abs/1811.06965), 1F1B
(https://arxiv.org/abs/1806.03377), Interleaved1F1B (https://arxiv.org/abs/2104.04473), LoopedBFS
(https://arxiv.org/abs/2211.05953), the zero-bubble ones (https://arxiv.org/abs/2401.10241) and DualPipeV
(https://arxiv.org/abs/2412.19437).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from parallelize.config import PIPELINE_SCHEDULES, ZERO_BUBBLE_SCHEDULES, check
from parallelize.pipeline_parallel.schedule_file import read_schedule_file
from parallelize.pipeline_parallel.timeline import LETTERS, Action, Slot, bubble_share, simulate

if TYPE_CHECKING:  # half a second, which a config is checked without
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _PipelineSchedule

__all__ = [
    "batch_problems", "bubble_share", "build_schedule", "canonical_name", "compute_order", "is_zero_bubble",
    "micro_batch_problems", "model_part_problems", "rank_of_stage", "single_stage", "stage_count",
    "stage_count_problems", "stages_of_rank", "timeline",
]  # fmt: skip

_V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
_IN_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")


def canonical_name(schedule: str) -> str:
    """The name as in `PIPELINE_SCHEDULES` of one in any case."""
    return next(name for name in PIPELINE_SCHEDULES if name.lower() == schedule.lower())


def is_zero_bubble(schedule: str) -> bool:
    """Whether its backward comes in two halves, for inputs and for weights."""
    return canonical_name(schedule) in ZERO_BUBBLE_SCHEDULES


def single_stage(schedule: str) -> bool:
    """Whether every rank has one stage."""
    return canonical_name(schedule) in ("GPipe", "1F1B")


# --- stages


def stage_count(
    schedule: str,
    pp: int,
    layers: int,
    layers_per_stage: int = 0,
    *,
    less_layers: int = 0,
    parts: int = 0,
    csv: str = "",
) -> int:
    """The number of stages of `layers` layers on `pp` ranks.

    layers_per_stage: as many as a stage may have; 0: by the schedule. less_layers: how many layers the embedding and
    the head stand for together, which count there as in torchtitan. parts: how many are named by
    module_fqns_per_model_part, which goes before both; 0: none. csv: a file that goes before the schedule, and says the
    number itself. Raises a ValueError where the schedule cannot have as many, or there are more stages than layers.
    """
    if csv:
        stages = _stages_of(read_schedule_file(csv, pp))
        found, setting = [], f'pipeline_parallel_schedule_csv = "{csv}"'
    elif parts:
        check(model_part_problems(schedule, pp, parts))
        return parts
    elif layers_per_stage:
        stages = math.ceil((layers + less_layers) / layers_per_stage)
        found = stage_count_problems(schedule, pp, stages)
        setting = f"pipeline_parallel_layers_per_stage = {layers_per_stage}"
    else:
        stages = pp if single_stage(schedule) else 2 * pp
        found, setting = [], f'pipeline_parallel_schedule = "{canonical_name(schedule)}"'
    if found:
        raise ValueError(
            f"parallelism.{setting}: makes {stages} stages of {layers} layers. {' '.join(found)} The number of stages "
            "is (layers + less_layers) / layers_per_stage, rounded up; 0 takes the schedule's."
        )
    if stages > layers:
        raise ValueError(
            f"parallelism.{setting}: makes {stages} stages on pipeline_parallel_degree = {pp} ranks, and the model has "
            f"{layers} layers; every stage needs one. Lower the degree"
            + ("." if csv or single_stage(schedule) else ", or choose 1F1B or GPipe, which give a rank one stage.")
        )
    return stages


def model_part_problems(schedule: str, pp: int, parts: int) -> list[str]:
    """The sentence for a number of parts in module_fqns_per_model_part that a schedule cannot have."""
    problems = stage_count_problems(schedule, pp, parts)
    return [f"parallelism.module_fqns_per_model_part has {parts} parts. {problem}" for problem in problems]


def stage_count_problems(schedule: str, pp: int, stages: int) -> list[str]:
    """The sentence for a number of stages that a schedule cannot have."""
    name = canonical_name(schedule)
    if single_stage(name):
        rule = None if stages == pp else f"exactly {pp}, one for each rank"
    elif name in _V_SHAPED:
        rule = None if stages == 2 * pp else f"exactly {2 * pp}, two for each rank"
    else:
        rule = None if stages % pp == 0 and stages >= 2 * pp else f"a multiple of {pp}, two or more for each rank"
    if rule is None:
        return []
    return [
        f'parallelism.pipeline_parallel_schedule = "{name}" with pipeline_parallel_degree = {pp}: the number of stages '
        f"is {stages}, and must be {rule}; change it or the schedule."
    ]


def stages_of_rank(schedule: str, rank: int, pp: int, stages: int, *, csv: str = "") -> tuple[int, ...]:
    """The stages on a rank, ascending."""
    return tuple(stage for stage in range(stages) if rank_of_stage(schedule, stage, pp, stages, csv=csv) == rank)


def rank_of_stage(schedule: str, stage: int, pp: int, stages: int, *, csv: str = "") -> int:
    """The pipeline rank on which a stage is."""
    if csv:
        order = read_schedule_file(csv, pp)
        return next(rank for rank in range(pp) if any(action.stage == stage for action in order[rank]))
    if canonical_name(schedule) in _V_SHAPED:
        return min(stage, stages - 1 - stage)
    return stage % pp


def _stages_of(order: Sequence[Sequence[Action]]) -> int:
    return 1 + max(action.stage for actions in order for action in actions)


def _micro_batches_of(order: Sequence[Sequence[Action]]) -> int:
    return 1 + max(action.micro_batch for actions in order for action in actions)


# --- micro-batches


def micro_batch_problems(schedule: str, pp: int, micro_batches: int, *, csv: str = "") -> list[str]:
    """The sentence for a number of micro-batches that a schedule cannot run, with those that it can."""
    if csv:
        in_file = _micro_batches_of(read_schedule_file(csv, pp))
        rule = None if micro_batches == in_file else f"exactly {in_file}, as the file has them"
        setting = f'pipeline_parallel_schedule_csv = "{csv}"'
    else:
        name = canonical_name(schedule)
        rule = _micro_batch_rule(name, pp, micro_batches)
        setting = f'pipeline_parallel_schedule = "{name}" with pipeline_parallel_degree = {pp}'
    if rule is None:
        return []
    return [f"parallelism.{setting}: the number of micro-batches is {micro_batches}, and must be {rule}."]


def _micro_batch_rule(name: str, pp: int, micro_batches: int) -> str | None:
    """What the number would have to be; None where it is right."""
    if name == "1F1B" and micro_batches < pp:
        return f"at least {pp}, one for each rank"
    if name == "DualPipeV" and micro_batches < 2 * pp:
        return f"at least {2 * pp}, one for each stage"
    if name in _IN_ROUNDS and not _fills_rounds(pp, micro_batches):
        below = next(n for n in range(micro_batches, 0, -1) if _fills_rounds(pp, n))
        above = next(n for n in range(micro_batches, micro_batches + pp + 1) if _fills_rounds(pp, n))
        return (
            f"divisible by {micro_batches // pp} (micro-batches // ranks, its number of rounds); the nearest that are "
            f"right are {below} and {above}, and every multiple of {pp} is"
        )
    return None


def _fills_rounds(pp: int, micro_batches: int) -> bool:
    return micro_batches % max(1, micro_batches // pp) == 0


def batch_problems(
    batch_sizes: Mapping[str, int], *, microbatch_size: int, schedule: str, pp: int, csv: str = ""
) -> list[str]:
    """The sentences for batches that cannot go through the pipeline: {"training.local_batch_size": 8, ...}."""
    found = []
    for key, size in batch_sizes.items():
        if size % microbatch_size:
            divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            found.append(
                f"{key} = {size}: must be divisible by parallelism.pipeline_parallel_microbatch_size = "
                f"{microbatch_size}; change it, or set that to one of {divisors}."
            )
            continue
        problems = micro_batch_problems(schedule, pp, size // microbatch_size, csv=csv)
        remedy = "Change the batch size, parallelism.pipeline_parallel_microbatch_size, or the schedule."
        found += [f"{key} = {size} in micro-batches of {microbatch_size}: {problem} {remedy}" for problem in problems]
    return found


# --- time


def timeline(
    schedule: str,
    *,
    pp: int,
    stages: int,
    micro_batches: int,
    forward_costs: Sequence[float] | None = None,
    csv: str = "",
) -> list[list[Slot]]:
    """For each pipeline rank what it computes when, in the unit of `forward_costs` (of one micro-batch through each
    stage; None: 1 for each). See `timeline.py` for what it leaves out, and `bubble_share` for the idle share."""
    order = read_schedule_file(csv, pp) if csv else compute_order(schedule, pp, stages, micro_batches)
    return simulate(order, forward_costs or [1.0] * stages)


@dataclass
class _StandIn:
    """As much of torch's PipelineStage as a schedule needs to find its order: no module and no process group."""

    stage_index: int
    num_stages: int
    group_size: int
    group_rank: int = 0
    submod: None = None

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1


def compute_order(schedule: str, pp: int, stages: int, micro_batches: int) -> list[list[Action]]:
    """For each rank the actions of a schedule in their order, without waits, as torch's class has them."""
    name = canonical_name(schedule)
    if name == "1F1B":
        return [_one_forward_one_backward(rank, stages, micro_batches) for rank in range(pp)]
    stand_ins = [_StandIn(stage, stages, pp) for stage in stages_of_rank(name, 0, pp, stages)]
    built = build_schedule(name, "", stand_ins, micro_batches, loss_fn=None)
    return [list(_computations(built.pipeline_order[rank])) for rank in range(pp)]


def _one_forward_one_backward(rank: int, stages: int, micro_batches: int) -> list[Action]:
    """What `Schedule1F1B` runs; its own `pipeline_order` (torch 2.13) counts the last rank's micro-batches from 1."""
    warm_up = min(micro_batches, stages - rank)
    forwards = [Action(rank, "forward", number) for number in range(micro_batches)]
    backwards = [Action(rank, "backward", number) for number in range(micro_batches)]
    steady = [action for pair in zip(backwards, forwards[warm_up:], strict=False) for action in pair]
    return [*forwards[:warm_up], *steady, *backwards[micro_batches - warm_up :]]


def _computations(actions: Iterable[Any]) -> Iterable[Action]:
    """Of torch's actions those that compute; of two that may overlap the first comes first, as torch runs them."""
    for action in actions:
        if action is None:
            continue
        if action.sub_actions is not None:
            yield from _computations(action.sub_actions)
        elif action.computation_type.value in LETTERS:
            yield Action(action.stage_index, LETTERS[action.computation_type.value], action.microbatch_index)


# --- torch's object


def build_schedule(
    schedule: str, csv: str, stages: Sequence[PipelineStage], micro_batches: int, loss_fn: Callable[..., Tensor] | None
) -> _PipelineSchedule:
    """torch's schedule over this rank's stages (ascending); gradients are summed over micro-batches, never scaled.

    csv: a file that goes before the schedule, or "". loss_fn: as torch's; None makes one that runs forward only. A
    wrong number of micro-batches raises a ValueError.
    """
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime, get_schedule_class

    pp = stages[0].group_size
    problems = micro_batch_problems(schedule, pp, micro_batches, csv=csv)
    if problems:
        raise ValueError(" ".join(problems))
    if csv:
        order = read_schedule_file(csv, pp)
        assert stages[0].num_stages == _stages_of(order), "stage_count and the file disagree"
        assert [stage.stage_index for stage in stages] == sorted({a.stage for a in order[stages[0].group_rank]})
        built = _PipelineScheduleRuntime(list(stages), micro_batches, loss_fn=loss_fn, scale_grads=False)
        built.pipeline_order = {rank: list(map(_torch_action, actions)) for rank, actions in enumerate(order)}
        built._prepare_schedule_with_comms(built.pipeline_order)
        return built
    name = canonical_name(schedule)
    if single_stage(name):
        (stages,) = stages
    else:
        stages = list(stages)
    return get_schedule_class(name)(stages, micro_batches, loss_fn=loss_fn, scale_grads=False)


def _torch_action(action: Action) -> Any:
    from torch.distributed.pipelining.schedules import _Action

    return _Action.from_str(str(action))
