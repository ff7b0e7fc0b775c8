"""A schedule from a CSV file: torch's own files are read back, and one that cannot run says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parallelize.config import PIPELINE_SCHEDULES
from parallelize.pipeline_parallel.schedule_file import read_schedule_file
from parallelize.pipeline_parallel.schedules import (
    build_schedule,
    compute_order,
    micro_batch_problems,
    rank_of_stage,
    stage_count,
    stages_of_rank,
    timeline,
)
from tests.unit.parallelize.test_pipeline_schedules import stage_of

GPIPE = "0F0,0F1,,,0B0,0B1\n,1F0,1F1,1B0,1B1,\n"


@pytest.fixture
def write(tmp_path: Path):
    def write_text(text: str) -> str:
        path = tmp_path / "schedule.csv"
        path.write_text(text)
        return str(path)

    return write_text


@pytest.mark.parametrize("name", [name for name in PIPELINE_SCHEDULES if name not in ("GPipe", "1F1B")])
def test_what_torch_writes_is_read_back_and_built(name: str, tmp_path: Path):
    own = [stage_of(stage, 4, 2, 0) for stage in stages_of_rank(name, 0, 2, 4)]
    path = str(tmp_path / "schedule.csv")
    written = build_schedule(name, "", own, 6, loss_fn=None)
    written._dump_csv(path, "compute_only")
    assert read_schedule_file(path, 2) == compute_order(name, 2, 4, 6)
    built = build_schedule("1F1B", path, own, 6, loss_fn=print)
    assert (built.scale_grads, built._n_microbatches, built._loss_fn) == (False, 6, print)
    assert built.stage_index_to_group_rank == written.stage_index_to_group_rank
    if name != "DualPipeV":  # whose overlapping actions come one after the other here
        assert built.pipeline_order_with_comms == written.pipeline_order_with_comms


def test_the_file_goes_before_the_schedule(write):
    path = write("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n\n")
    assert stage_count("1F1B", 2, 4, 1, csv=path) == 4
    assert [stages_of_rank("1F1B", rank, 2, 4, csv=path) for rank in range(2)] == [(0, 3), (1, 2)]
    assert [rank_of_stage("1F1B", stage, 2, 4, csv=path) for stage in range(4)] == [0, 1, 1, 0]
    assert micro_batch_problems("1F1B", 2, 1, csv=path) == []
    (problem,) = micro_batch_problems("1F1B", 2, 8, csv=path)
    assert problem.endswith("the number of micro-batches is 8, and must be exactly 1, as the file has them.")
    assert [len(slots) for slots in timeline("1F1B", pp=2, stages=4, micro_batches=1, csv=path)] == [4, 4]
    with pytest.raises(ValueError, match=r"makes 4 stages .* the model has 3 layers"):
        stage_count("1F1B", 2, 3, csv=path)
    with pytest.raises(ValueError, match="must be exactly 1, as the file has them"):
        build_schedule("1F1B", path, [stage_of(0, 4, 2, 0), stage_of(3, 4, 2, 0)], 2, loss_fn=None)


def test_a_sound_file_is_read(write):
    order = read_schedule_file(write(GPIPE), 2)
    assert [" ".join(map(str, actions)) for actions in order] == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]


def test_the_file_in_the_documentation_is_sound(write):
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    (text,) = re.findall(r"^```text\n(.*0F0.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert read_schedule_file(write(text), 2) == compute_order("1F1B", 2, 2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GPIPE.replace("1F1", "1FF1"), r'line 2: "1FF1" is no action: write stage, F, B, I or W, and micro-batch'),
        (GPIPE.replace("0F1", "0F1x"), r'line 1: "0F1x" is no action'),
        (GPIPE.replace("0F1", "0SEND_F1"), r'line 1: "0SEND_F1" is no action'),
        (GPIPE + "2F0,2B0\n", r"it has 3 rows with actions, and parallelism.pipeline_parallel_degree = 2"),
        ("", r"it has 0 rows with actions"),
        (GPIPE.replace(",1B1", ",0B1"), r"stage 0 is on the ranks 0, 1: a stage has one rank"),
        (GPIPE.replace("1F1", ""), r"stage 1, micro-batch 1: no forward; add 1F1"),
        (GPIPE.replace("1B1", ""), r"stage 1, micro-batch 1: needs one backward; write 1B1, or both 1I1 and 1W1"),
        (GPIPE.replace("1B1", "1I1"), r"stage 1, micro-batch 1: needs one backward"),
        (GPIPE.replace("1B1", "1B1,1I1,1W1"), r"stage 1, micro-batch 1: needs one backward"),
        (GPIPE.replace("1B1", "1B1,1B1"), r"1B1 is there 2 times; leave it in once"),
        (GPIPE.replace("1F", "2F").replace("1B", "2B"), r"there is a stage 2, and only 2 in all; number them from 0"),
        (GPIPE.replace("F1", "F7").replace("B1", "B7"), r"there is a micro-batch 7, and only 2 in all"),
        (GPIPE.replace("1F0,1F1", "1F1,1F0"), r"the last stage has 1F1 where 1F0 comes next; write its forwards in"),
        (GPIPE.replace("1F0,1F1,1B0", "1B0,1F0,1F1"), r"wait without end: rank 0 for what 0B0 needs, rank 1 .* 1B0"),
    ],
)
def test_a_file_that_cannot_run_is_refused(write, text: str, message: str):
    path = write(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_schedule_file(path, 2)
    assert str(caught.value).startswith(f'parallelism.pipeline_parallel_schedule_csv = "{path}": no schedule that can')


@pytest.mark.parametrize(
    "changed", ["0F1,0F0,,,0B0,0B1\n,1F0,1F1,1B0,1B1,\n", "0F0,0F1,,,0B1,0B0\n,1F0,1F1,1B1,1B0,\n"]
)
def test_other_orders_are_left_to_the_user(write, changed: str):
    order = read_schedule_file(write(changed), 2)
    assert [",".join(map(str, actions)) for actions in order] == [
        ",".join(filter(None, line.split(","))) for line in changed.splitlines()
    ]


@pytest.mark.parametrize("content", [b"\xff\xfe0\x00F\x000\x00", "0F0,0B0 \u00e9".encode("latin-1")])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "schedule.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'schedule_csv = ".*schedule.csv": is no CSV file in UTF-8 .* name one with'):
        read_schedule_file(str(path), 2)


def test_the_file_of_a_spreadsheet_is_read(write):
    assert read_schedule_file(write("\ufeff" + GPIPE), 2) == read_schedule_file(write(GPIPE), 2)


def test_a_long_list_of_mistakes_is_cut(write):
    with pytest.raises(ValueError, match="and 12 more of the kind") as caught:
        read_schedule_file(
            write(",".join(f"0F{n}" for n in range(10)) + "\n" + ",".join(f"1F{n}" for n in range(10))), 2
        )
    assert str(caught.value).count("needs one backward") == 8
