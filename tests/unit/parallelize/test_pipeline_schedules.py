"""Pipeline schedules by name: places, rules and orders as torch's own classes have them, and the time that is idle."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from parallelize.config import PIPELINE_SCHEDULES
from parallelize.pipeline_parallel.schedules import (
    batch_problems,
    bubble_share,
    build_schedule,
    canonical_name,
    compute_order,
    is_zero_bubble,
    micro_batch_problems,
    rank_of_stage,
    single_stage,
    stage_count,
    stage_count_problems,
    stages_of_rank,
    timeline,
)
from parallelize.pipeline_parallel.timeline import Action, Slot, peak_in_flight

V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
HALVES = ("backward_input", "backward_weight")


def stage_of(index: int, stages: int, pp: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(
        stage_index=index, num_stages=stages, group_size=pp, group_rank=rank, submod=None,
        is_first=index == 0, is_last=index == stages - 1,
    )  # fmt: skip


def usual_stages(name: str, pp: int) -> int:
    return stage_count(name, pp, layers=100)


# --- names and places


def test_names_are_torchs_in_any_case():
    for name in PIPELINE_SCHEDULES:
        assert canonical_name(name.upper()) == canonical_name(name.lower()) == name
        assert torch_schedules.get_schedule_class(name).__name__ == f"Schedule{name}"
        torch_single = issubclass(torch_schedules.get_schedule_class(name), torch_schedules.PipelineScheduleSingle)
        assert single_stage(name) == torch_single


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_stages_are_where_torch_has_them(name: str, pp: int):
    several = [pp] if single_stage(name) else [2 * pp] if name in V_SHAPED else [2 * pp, 3 * pp]
    for stages in several:
        wanted = generate_stage_to_rank_mapping(pp, stages, style="v" if name in V_SHAPED else "loop")
        assert {stage: rank_of_stage(name, stage, pp, stages) for stage in range(stages)} == wanted
        on_ranks = [stages_of_rank(name, rank, pp, stages) for rank in range(pp)]
        assert all(wanted[stage] == rank for rank, on in enumerate(on_ranks) for stage in on)
        assert sorted(itertools.chain(*on_ranks)) == list(range(stages))


def test_v_has_the_first_and_the_last_stage_on_the_first_rank():
    assert [stages_of_rank("dualpipev", rank, 3, 6) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert [stages_of_rank("LoopedBFS", rank, 3, 6) for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]


@pytest.mark.parametrize(
    ("name", "layers", "layers_per_stage", "less_layers", "stages"),
    [
        ("1F1B", 2, 0, 0, 2),
        ("GPipe", 9, 0, 0, 2),
        ("Interleaved1F1B", 9, 0, 0, 4),
        ("ZBVZeroBubble", 4, 0, 0, 4),
        ("1f1b", 8, 4, 0, 2),
        ("1F1B", 7, 4, 0, 2),
        ("1F1B", 6, 4, 2, 2),
        ("LoopedBFS", 12, 2, 0, 6),
        ("LoopedBFS", 10, 2, 2, 6),
        ("DualPipeV", 12, 3, 0, 4),
    ],
)
def test_the_number_of_stages_on_two_ranks(name: str, layers: int, layers_per_stage: int, less_layers: int, stages):
    assert stage_count(name, 2, layers, layers_per_stage, less_layers=less_layers) == stages


@pytest.mark.parametrize(
    ("name", "layers", "layers_per_stage", "message"),
    [
        (
            "1F1B",
            1,
            0,
            r'schedule = "1F1B": makes 2 stages on pipeline_parallel_degree = 2 ranks, and the model has 1 ',
        ),
        ("Interleaved1F1B", 3, 0, r"makes 4 stages .* the model has 3 layers; .* or choose 1F1B or GPipe"),
        ("1F1B", 8, 2, r"layers_per_stage = 2: makes 4 stages of 8 layers.* must be exactly 2, one for each rank"),
        ("LoopedBFS", 8, 4, r"makes 2 stages of 8 layers.* must be a multiple of 2, two or more for each rank"),
        ("LoopedBFS", 10, 2, r"makes 5 stages of 10 layers.* must be a multiple of 2"),
        ("DualPipeV", 12, 2, r"makes 6 stages of 12 layers.* must be exactly 4, two for each rank"),
    ],
)
def test_stages_that_cannot_be_are_refused(name: str, layers: int, layers_per_stage: int, message: str):
    with pytest.raises(ValueError, match=message):
        stage_count(name, 2, layers, layers_per_stage)


def test_a_number_of_stages_that_a_schedule_has_is_no_problem():
    for name in PIPELINE_SCHEDULES:
        assert stage_count_problems(name, 4, usual_stages(name, 4)) == []
    (problem,) = stage_count_problems("zbvzerobubble", 4, 4)
    assert problem == (
        'parallelism.pipeline_parallel_schedule = "ZBVZeroBubble" with pipeline_parallel_degree = 4: the number of '
        "stages is 4, and must be exactly 8, two for each rank; change it or the schedule."
    )


# --- micro-batches


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
def test_the_rules_are_torchs(name: str):
    """torch's constructor refuses exactly what is refused here, and what is let through has an order that ends."""
    for pp, micro_batches in itertools.product((2, 3, 4), range(1, 15)):
        stages = usual_stages(name, pp)
        own = [stage_of(stage, stages, pp, 0) for stage in stages_of_rank(name, 0, pp, stages)]
        torch_class = torch_schedules.get_schedule_class(name)
        try:
            torch_class(own[0] if single_stage(name) else own, micro_batches, loss_fn=None)
            refused = False
        except ValueError:
            refused = True
        assert bool(micro_batch_problems(name, pp, micro_batches)) == refused, (pp, micro_batches)
        if refused:
            with pytest.raises(ValueError, match="the number of micro-batches is"):
                build_schedule(name, "", own, micro_batches, loss_fn=None)
        else:
            slots = timeline(name, pp=pp, stages=stages, micro_batches=micro_batches)
            done = {(slot.stage, slot.micro_batch) for rank in slots for slot in rank if slot.kind == "forward"}
            assert len(done) == stages * micro_batches


@pytest.mark.parametrize(
    ("name", "micro_batches", "rule"),
    [
        ("1F1B", 3, "at least 4, one for each rank"),
        ("dualpipev", 7, "at least 8, one for each stage"),
        ("Interleaved1F1B", 10, None),
        ("Interleaved1F1B", 9, r"divisible by 2 .* the nearest that are right are 8 and 10, and every multiple of 4"),
        ("InterleavedZeroBubble", 13, r"divisible by 3 .* the nearest that are right are 12 and 15"),
        ("LoopedBFS", 1, None),
        ("GPipe", 1, None),
    ],
)
def test_the_right_number_is_told(name: str, micro_batches: int, rule: str | None):
    problems = micro_batch_problems(name, 4, micro_batches)
    assert len(problems) == (rule is not None)
    for problem in problems:
        assert f'"{canonical_name(name)}" with pipeline_parallel_degree = 4: ' in problem
        with pytest.raises(ValueError, match=f"the number of micro-batches is {micro_batches}, and must be {rule}"):
            raise ValueError(problem)


def test_a_batch_is_whole_micro_batches():
    sizes = {"training.local_batch_size": 12, "validation.local_batch_size": 2}
    assert batch_problems(sizes, microbatch_size=1, schedule="1F1B", pp=2) == []
    (problem,) = batch_problems(sizes, microbatch_size=1, schedule="1F1B", pp=4)
    assert problem.startswith("validation.local_batch_size = 2 in micro-batches of 1: parallelism.pipeline_parallel_sc")
    assert problem.endswith("Change the batch size, parallelism.pipeline_parallel_microbatch_size, or the schedule.")
    (problem,) = batch_problems({"training.local_batch_size": 12}, microbatch_size=5, schedule="1F1B", pp=2)
    assert problem == (
        "training.local_batch_size = 12: must be divisible by parallelism.pipeline_parallel_microbatch_size = 5; "
        "change it, or set that to one of 1, 2, 3, 4, 6, 12."
    )


# --- orders


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
def test_every_micro_batch_goes_through_every_stage_once_each_way(name: str):
    pp, micro_batches = 3, 6
    stages = usual_stages(name, pp)
    order = compute_order(name, pp, stages, micro_batches)
    assert len(order) == pp
    actions = list(itertools.chain(*order))
    assert len(actions) == len(set(actions))
    for stage, micro_batch in itertools.product(range(stages), range(micro_batches)):
        kinds = {action.kind for action in actions if (action.stage, action.micro_batch) == (stage, micro_batch)}
        assert kinds in ({"forward", "backward"}, {"forward", *HALVES})
    assert any(action.kind in HALVES for action in actions) == is_zero_bubble(name)
    for rank, on_rank in enumerate(order):
        assert {action.stage for action in on_rank} == set(stages_of_rank(name, rank, pp, stages))


@pytest.mark.parametrize(("rank", "micro_batches"), [(0, 4), (0, 7), (2, 5), (3, 4), (3, 6)])
@pytest.mark.parametrize("name", ["1F1B", "GPipe"])
def test_an_order_is_what_torch_runs(name: str, rank: int, micro_batches: int):
    stage = MagicMock(stage_index=rank, num_stages=4, group_size=4, group_rank=rank)
    for communication in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, communication).return_value = []
    schedule = build_schedule(name, "", [stage], micro_batches, loss_fn=MagicMock())
    schedule._initialize_stage = schedule._maybe_compute_loss = schedule._maybe_get_loss = MagicMock()
    schedule._update_losses = MagicMock()
    schedule._step_microbatches([()] * micro_batches, [{}] * micro_batches)
    kinds = {"forward_one_chunk": "forward", "backward_one_chunk": "backward"}
    ran = [Action(rank, kinds[call], args[0]) for call, args, _ in stage.method_calls if call in kinds]
    assert ran == compute_order(name, 4, 4, micro_batches)[rank]


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
def test_torchs_object_never_scales_gradients_and_knows_the_places(name: str):
    stages = usual_stages(name, 2)
    own = [stage_of(stage, stages, 2, 1) for stage in stages_of_rank(name, 1, 2, stages)]
    schedule = build_schedule(name.lower(), "", own, 6, loss_fn=print)
    assert type(schedule) is torch_schedules.get_schedule_class(name)
    assert (schedule.scale_grads, schedule._n_microbatches, schedule._loss_fn) == (False, 6, print)
    if not single_stage(name):
        places = {stage: rank_of_stage(name, stage, 2, stages) for stage in range(stages)}
        assert schedule.stage_index_to_group_rank == places


# --- time


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 2), (2, 8), (4, 4), (4, 32), (8, 16)])
@pytest.mark.parametrize("name", ["1F1B", "GPipe"])
def test_the_bubble_of_one_stage_a_rank(name: str, pp: int, micro_batches: int):
    """(p - 1) / (m + p - 1), of which 1F1B saves nothing but memory (https://arxiv.org/abs/2104.04473, section 2.2)."""
    slots = timeline(name, pp=pp, stages=pp, micro_batches=micro_batches)
    assert bubble_share(slots) == pytest.approx((pp - 1) / (micro_batches + pp - 1))


@pytest.mark.parametrize(("pp", "per_rank", "micro_batches"), [(2, 2, 8), (4, 2, 8), (4, 3, 16)])
@pytest.mark.parametrize("name", ["Interleaved1F1B", "LoopedBFS"])
def test_the_bubble_of_several_stages_a_rank(name: str, pp: int, per_rank: int, micro_batches: int):
    """v stages a rank make the bubble v times shorter: idle / work = (p - 1) / (v m), of the same paper."""
    share = bubble_share(timeline(name, pp=pp, stages=pp * per_rank, micro_batches=micro_batches))
    assert share / (1 - share) == pytest.approx((pp - 1) / (per_rank * micro_batches))


@pytest.mark.parametrize("name", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_a_backward_in_halves_leaves_less_idle(name: str):
    interleaved = bubble_share(timeline("Interleaved1F1B", pp=4, stages=8, micro_batches=12))
    assert 0 < bubble_share(timeline(name, pp=4, stages=8, micro_batches=12)) < 0.5 * interleaved


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
def test_nothing_starts_before_what_it_needs(name: str):
    pp, micro_batches = 2, 6
    stages = usual_stages(name, pp)
    costs = [1.0 + 0.5 * (stage % 3) for stage in range(stages)]
    slots = timeline(name, pp=pp, stages=stages, micro_batches=micro_batches, forward_costs=costs)
    at = {(slot.stage, slot.micro_batch, slot.kind): slot for rank in slots for slot in rank}
    for (stage, micro_batch, kind), slot in at.items():
        parts = 2 if kind == "backward" else 1
        assert slot.end - slot.start == pytest.approx(parts * costs[stage])
        needed = [("forward", stage - 1)] if kind == "forward" else [("forward", stage), (kind, stage + 1)]
        if kind == "backward_weight":
            needed = [("backward_input", stage)]
        for other, of_stage in needed:
            backwards = [other] if other == "forward" else ["backward", "backward_input"]
            ends = [at[of_stage, micro_batch, one].end for one in backwards if (of_stage, micro_batch, one) in at]
            assert ends or of_stage in (-1, stages)
            assert all(end <= slot.start for end in ends)
    for rank in slots:
        assert all(one.end <= other.start for one, other in itertools.pairwise(rank))


def test_an_uneven_stage_costs_everyone():
    even = timeline("1F1B", pp=2, stages=2, micro_batches=4, forward_costs=[2.0, 2.0])
    uneven = timeline("1F1B", pp=2, stages=2, micro_batches=4, forward_costs=[1.0, 3.0])
    assert bubble_share(even) == pytest.approx(1 / 5)
    # The second rank works 4 x 9 without a pause, after the first's 1 and before its last 2: 39. Work is 4 x 12.
    assert bubble_share(uneven) == pytest.approx(1 - 48 / (2 * 39))


@pytest.mark.parametrize(
    ("name", "stages", "micro_batches", "expected"),
    [
        ("1F1B", 4, 8, [4, 3, 2, 1]),
        ("1F1B", 4, 4, [4, 3, 2, 1]),
        ("GPipe", 4, 8, [8, 8, 8, 8]),
        ("LoopedBFS", 8, 4, [8, 8, 8, 8]),
        # Warm-up of Interleaved1F1B (https://arxiv.org/abs/2104.04473), and the forward that follows it:
        # 2 x (ranks - rank - 1) + (stages a rank - 1) x ranks + 1.
        ("Interleaved1F1B", 8, 8, [11, 9, 7, 5]),
    ],
)
def test_what_a_rank_keeps_at_one_time(name: str, stages: int, micro_batches: int, expected: list[int]):
    slots = timeline(name, pp=4, stages=stages, micro_batches=micro_batches)
    assert [peak_in_flight(of_rank, dict.fromkeys(range(stages), 1.0)) for of_rank in slots] == expected


def test_a_micro_batch_is_kept_until_both_halves_of_its_backward_are_over():
    kinds = ["forward", "forward", "backward_input", "forward", "backward_weight", "backward", "backward"]
    slots = [Slot(3, 0, kind, time, time + 1) for time, kind in enumerate(kinds)]
    assert peak_in_flight(slots, {3: 2.0}) == 6.0
    assert peak_in_flight([slots[place] for place in (0, 1, 2, 4, 3, 5, 6)], {3: 2.0}) == 4.0
