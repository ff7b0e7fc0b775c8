"""The launcher without processes: the check before the start, and what it makes of failures."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.jobs import tiny_job
from transformers_backend import launch


def _failure(folder: Path, rank: int, exitcode: int, *, timestamp: int, message: str = "", kind: str = "") -> dict:
    """What torch's agent knows of a failed rank, from its exit code and the error file that errors.py writes."""
    error_file = folder / f"error-{rank}.json"
    if kind:
        extra = {"py_callstack": f"Traceback: {message}\n", "timestamp": str(timestamp), "kind": kind}
        error_file.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    failure = ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=exitcode, error_file=str(error_file))
    failure.timestamp = timestamp
    return {rank: failure}


def test_the_rank_that_failed_by_itself_is_named(tmp_path: Path) -> None:
    lost = _failure(tmp_path, 0, 1, timestamp=10, message="the connection to another rank broke (reset)", kind="peer")
    stopped = _failure(tmp_path, 1, -signal.SIGTERM, timestamp=10)
    broken = _failure(tmp_path, 2, 1, timestamp=11, message="KeyError: 3", kind="defect")
    died = _failure(tmp_path, 3, -signal.SIGKILL, timestamp=11)
    assert "error: rank 2 (" in launch.describe(lost | stopped | broken)
    assert launch.describe(lost | stopped | broken).startswith("Traceback: KeyError: 3\nerror: ")
    assert "pid 103) died by signal 9 (SIGKILL; was the memory full? see dmesg)" in launch.describe(lost | died)
    assert "no rank of this node failed by itself: see the message of the other nodes" in launch.describe(lost)
    assert launch.exit_status(lost | died) == 1


def test_a_rank_that_the_agent_had_to_kill_hung(tmp_path: Path) -> None:
    lost = _failure(tmp_path, 0, 1, timestamp=10, message="another rank did not answer in time (late)", kind="peer")
    hung = _failure(tmp_path, 1, -signal.SIGKILL, timestamp=40)
    text = launch.describe(lost | hung)
    assert text.endswith(
        "pid 100): another rank did not answer in time (late); rank 1 (pid 101) hung and was killed; see "
        "comm.train_timeout_seconds"
    )


def test_an_error_for_the_user_is_the_message_alone(tmp_path: Path) -> None:
    failures = _failure(tmp_path, 0, 2, timestamp=10, message="training.seq_len = 9: too long.", kind="user")
    assert launch.describe(failures) == "error: training.seq_len = 9: too long."
    assert launch.exit_status(failures) == 2
    silent = _failure(tmp_path, 1, 3, timestamp=10)
    assert launch.describe(silent).endswith("pid 101) ended with status 3 and left no message")


@pytest.mark.parametrize(
    ("processes", "changes", "message"),
    [
        (2, {"training__steps": 0}, "training.steps = 0: must be at least 1."),
        (3, {"parallelism__data_parallel_replicate_degree": 2}, "must divide the number of ranks, 3"),
    ],
)
def test_a_wrong_config_starts_no_process(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, processes, changes, message
) -> None:
    (tmp_path / "text").mkdir()
    tiny_job(tmp_path, "run", **changes).save(tmp_path / "job.toml")
    monkeypatch.setattr(launch, "_run", lambda *arguments: pytest.fail("started"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--standalone", "--nproc-per-node", str(processes), "-m", launch.TRAINING, str(tmp_path / "job.toml")]
    assert launch.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
