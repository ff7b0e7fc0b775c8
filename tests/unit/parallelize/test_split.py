"""Splitting layers over a pipeline's stages: against every possible split, and what is refused."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest

from parallelize.pipeline_parallel.split import (
    StageShare,
    first_and_last_cost,
    split_by_names,
    split_layers,
    stage_costs,
    stage_shares,
)

LAYERS = [f"model.layers.{number}" for number in range(4)]
PLACES = {"model.embed_tokens": "first", "model.norm": "last", "lm_head": "last", "model.rotary_emb": "any"}


def _every_split(layers: int, stages: int, forbidden_cuts=()) -> list[list[range]]:
    allowed = [cut for cut in range(1, layers) if cut not in forbidden_cuts]
    return [
        [range(begin, end) for begin, end in zip((0, *cuts), (*cuts, layers), strict=True)]
        for cuts in itertools.combinations(allowed, stages - 1)
    ]


def _sizes(split: list[range]) -> list[int]:
    return [len(layers) for layers in split]


@pytest.mark.parametrize("seed", range(40))
def test_no_other_split_is_better(seed: int):
    draw = random.Random(seed)
    count = draw.randint(1, 9)
    costs = [draw.randint(0, 9) for _ in range(count)]
    ends = {"first_cost": draw.choice([0, 3, 20]), "last_cost": draw.choice([0, 5, 30])}
    forbidden = [cut for cut in range(-1, count + 2) if draw.random() < 0.2]

    def quality(split: list[range]) -> tuple[float, float]:
        by_stage = stage_costs(split, costs, **ends)
        return max(by_stage), sum(cost**2 for cost in by_stage)

    for stages in range(1, count - len([cut for cut in forbidden if 0 < cut < count]) + 1):
        ours = split_layers(costs, **ends, stages=stages, forbidden_cuts=forbidden)
        others = _every_split(count, stages, forbidden)
        assert ours in others
        assert quality(ours) == min(map(quality, others))


def test_equal_layers_are_counted():
    assert _sizes(split_layers([1.0] * 32, first_cost=0, last_cost=0, stages=4)) == [8, 8, 8, 8]
    assert _sizes(split_layers([1.0] * 30, first_cost=1, last_cost=1, stages=4)) == [7, 8, 8, 7]
    assert _sizes(split_layers([1.0] * 10, first_cost=0, last_cost=0, stages=4)) == [2, 2, 3, 3]
    assert _sizes(split_layers([1e13 / 3] * 10, first_cost=0, last_cost=0, stages=4)) == [2, 2, 3, 3]


def test_an_expensive_head_leaves_the_last_stage_one_layer():
    assert _sizes(split_layers([1.0] * 10, first_cost=0, last_cost=50, stages=3)) == [4, 5, 1]


def test_a_model_without_cost_is_split_evenly_enough():
    assert len(split_layers([0.0] * 4, first_cost=0, last_cost=0, stages=2)) == 2


def test_layers_that_share_stay_together():
    forbidden = range(15, 35)  # gemma3n: the last reuse keys and values of layers 13 and 14
    split = split_layers([1.0] * 35, first_cost=0, last_cost=0, stages=4, forbidden_cuts=forbidden)
    assert _sizes(split) == [4, 5, 5, 21]


def test_many_layers_and_stages_are_fast():
    begin = time.perf_counter()
    split = split_layers([1.0 + n % 7 for n in range(200)], first_cost=3.0, last_cost=9.0, stages=64)
    assert time.perf_counter() - begin < 5, "seconds; it takes a few hundredths"
    assert [layer for layers in split for layer in layers] == list(range(200))


def test_more_stages_than_layers():
    with pytest.raises(ValueError, match=r"pipeline_parallel_degree: gives 5 stages for 4 layers.*at most 4\."):
        split_layers([1.0] * 4, first_cost=0, last_cost=0, stages=5)


def test_more_stages_than_allowed_cuts():
    with pytest.raises(ValueError, match=r"gives 3 stages, but these 4 layers can only be cut into 2.*at most 2\."):
        split_layers([1.0] * 4, first_cost=0, last_cost=0, stages=3, forbidden_cuts=[0, 2, 3, 4])


def test_less_layers_as_torchtitan_counts_them():
    costs = {"first_cost": 5.0, "last_cost": 7.0}
    assert first_and_last_cost([2.0, 4.0], **costs) == (5.0, 7.0)
    assert first_and_last_cost([2.0, 4.0], **costs, first_stage_less_layers=0) == (0.0, 7.0)
    assert first_and_last_cost([2.0, 4.0], **costs, first_stage_less_layers=1, last_stage_less_layers=2) == (3.0, 6.0)
    first, last = first_and_last_cost([1.0] * 30, **costs, first_stage_less_layers=1, last_stage_less_layers=1)
    assert _sizes(split_layers([1.0] * 30, first_cost=first, last_cost=last, stages=4)) == [7, 8, 8, 7]


def test_split_by_names():
    parts = [["model.embed_tokens", *LAYERS[:1], "model.rotary_emb"],
             ["model.rotary_emb", *LAYERS[1:], "model.norm", "lm_head"]]  # fmt: skip
    assert split_by_names(parts, LAYERS, places=PLACES, stages=2) == [range(0, 1), range(1, 4)]
    assert split_by_names([LAYERS[:2], LAYERS[2:]], LAYERS) == [range(0, 2), range(2, 4)], "other names are not needed"
    assert split_by_names([LAYERS], LAYERS, forbidden_cuts=[0, 1]) == [range(0, 4)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([LAYERS[:2], LAYERS[3:]], "part 1 names model.layers.3 where model.layers.2 comes next"),
        ([LAYERS[:2], LAYERS[1:]], "part 1 names model.layers.1 where model.layers.2 comes next"),
        ([LAYERS[2:], LAYERS[:2]], "part 0 names model.layers.2 where model.layers.0 comes next"),
        ([LAYERS, LAYERS[3:]], "part 1 names model.layers.3 where no layer comes next"),
        ([LAYERS[:2], LAYERS[2:3]], "no part names model.layers.3"),
        ([LAYERS, ["lm_head"]], "part 1 has no layer"),
        (
            [LAYERS[:2], ["model.embed_tokens", *LAYERS[2:]]],
            'part 1 names "model.embed_tokens", which runs in the first',
        ),
        ([[*LAYERS[:2], "lm_head"], LAYERS[2:]], 'part 0 names "lm_head", which runs in the last part'),
        ([LAYERS[:2], [*LAYERS[2:], "output"]], 'part 1 names "output", which is no layer'),
        ([LAYERS[:3], LAYERS[3:]], "part 1 begins with model.layers.3, which must stay with the layer before it"),
        ([LAYERS], "has 1 parts, but the schedule runs 2 stages"),
    ],
)
def test_names_that_cannot_be(parts: list[list[str]], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        split_by_names(parts, LAYERS, places=PLACES, stages=2, forbidden_cuts=[3])
    assert str(error.value).startswith("parallelism.module_fqns_per_model_part: ")


def test_all_that_is_wrong_with_names_is_said_at_once():
    with pytest.raises(ValueError, match=r"output.*model.embed_tokens.*no part names model.layers.3"):
        split_by_names([[*LAYERS[:2], "output"], [LAYERS[2], "model.embed_tokens"]], LAYERS, places=PLACES)


def test_the_tables_rows():
    split = [range(0, 1), range(1, 3)]
    rows = stage_shares(split, [2.0, 3.0, 4.0], first_cost=1.0, last_cost=6.0, parameters=[10, 20])
    assert rows == [StageShare(0, range(0, 1), 10, 3.0, 3 / 16), StageShare(1, range(1, 3), 20, 13.0, 13 / 16)]
    assert stage_costs([range(0, 3)], [2.0, 3.0, 4.0], first_cost=1.0, last_cost=6.0) == [16.0]
