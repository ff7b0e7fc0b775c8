"""What two ranks report: placements, one voice, and traces of the chosen ranks only."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.workers import Messages, WorkerPool
from tests.jobs import tiny_job
from transformers_backend import JobConfig, Trainer


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "text").mkdir()
    for number in range(8):
        text = "".join(f"{number}: line {line} of some text\n" for line in range(12))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    return str(tmp_path)


def _train(config: JobConfig) -> tuple[list[str], str]:
    """Run a job; returns what this rank's loggers said, and what came to its stderr."""
    printed = io.StringIO()
    with Messages("transformers_backend") as messages, contextlib.redirect_stderr(printed):
        trainer = Trainer(config)
        trainer.train()
        trainer.close()
    return messages.texts, printed.getvalue()


def test_two_ranks_speak_with_one_voice_of_their_shards(two: WorkerPool, folder: str):
    config = tiny_job(folder, "run", training__steps=3, lr_scheduler__warmup_steps=9, metrics__log_freq=3)
    (said, printed), (_, printed_by_other) = two.run(_train, config)
    (table,) = [text for text in said if text.startswith("the run:\n")]
    rows = [line.split() for line in table.splitlines()]
    assert ["attention", "dp_shard:", "Shard(0)", "float32", "8", "6,144", "0.01"] in rows, "half of 0.02 MiB"
    assert "mesh        2 x cpu, mesh dp_shard 2; weights kept in float32, computation in float32" in table
    assert printed.count("lr_scheduler.warmup_steps = 9") == 1
    assert printed.count("  loss ") == 2, "the first and the last step"
    assert printed_by_other == ""


@pytest.mark.parametrize(("max_ranks", "ranks"), [(1, {"rank0"}), (-1, {"rank0", "rank1"})])
def test_traces_are_of_the_first_ranks_only(two: WorkerPool, folder: str, max_ranks: int, ranks: set[str]):
    config = tiny_job(
        folder, "run", training__steps=2, profiling__enable_profiling=True, profiling__profile_freq=2,
        profiling__profiler_warmup=1, profiling__max_ranks=max_ranks,
    )  # fmt: skip
    two.run(_train, config)
    traces = (Path(config.job.dump_folder) / "profile_traces").iterdir()
    assert {path.name for path in traces} == {f"{rank}_step2.json.gz" for rank in ranks}
