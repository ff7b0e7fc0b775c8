"""A rank that dies, hangs or fails: the others end, one message says which and why, and a restart goes on."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest

from tests.distributed.workers import start_quickly
from tests.jobs import tiny_job
from transformers_backend import launch

REPOSITORY = Path(__file__).parents[2]
FAULTY = REPOSITORY / "tests" / "distributed" / "faulty.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(4):
        text = "".join(f"{number}: line {line} of some text\n" for line in range(20))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    options = {"training__steps": 8, "training__local_batch_size": 1, "checkpoint__enable": True,
               "checkpoint__interval": 2, "comm__trace_buf_size": 50}  # fmt: skip
    tiny_job(tmp_path, "run", **options).save(tmp_path / "job.toml")
    return tmp_path


def _launch(folder: Path, fault: str, *options: str, restarts: int = 0) -> tuple[int, list[str]]:
    """Two ranks by the launcher, the last with a fault after step 5; returns the exit status and what was written."""
    arguments = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), str(FAULTY), fault, "5",
                 str(folder / "job.toml"), *options]  # fmt: skip
    launcher = start_quickly(_run_launcher, arguments, printed=folder / "printed.log")
    launcher.join(timeout=200)
    launcher.kill()
    return launcher.exitcode, (folder / "printed.log").read_text().splitlines()


def _run_launcher(arguments: list[str]) -> int:
    os.environ |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return launch.main(arguments)


def test_a_killed_rank_is_named_and_the_restart_goes_on(folder: Path) -> None:
    status, log = _launch(folder, "is killed", restarts=1)
    assert status == 0, "\n".join(log)
    killed = (folder / "run" / "fault").read_text()
    message = next(index for index, line in enumerate(log) if line.startswith("error: "))
    assert log[message].startswith("error: rank 1 (")
    assert f"pid {killed}) died by signal 9 (SIGKILL; was the memory full?" in log[message]
    assert log[message + 1] == "restart 1 of 1, from the last checkpoint"
    assert not any("Traceback" in line for line in log)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8], "what was done twice is there once"
    assert any("resumed from" in line and "step-4" in line for line in log)
    seen = [line for line in log if re.search(r"step +5  loss", line)]
    assert len({re.search(r"loss +\S+", line)[0] for line in seen}) == 1, "the repeated step has the same loss"


def test_a_rank_that_hangs_takes_the_others_down_and_leaves_a_record(folder: Path) -> None:
    # Without checkpoints, because a busy disk can hold a rank up for longer than the timeout, too.
    status, log = _launch(folder, "hangs", "--comm.train_timeout_seconds", "5", "--checkpoint.enable", "false")
    assert status == 1, "\n".join(log)
    assert log[-1].startswith("error: rank 0 (")
    assert "another rank did not answer in time (" in log[-1], "\n".join(log)
    assert not any("Traceback" in line for line in log)
    record = pickle.loads((folder / "run" / "comm_traces" / "rank_0").read_bytes())
    assert len(record["entries"]) == 50
    assert record["entries"][-1]["profiling_name"].startswith("gloo:")
