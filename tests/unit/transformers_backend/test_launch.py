"""The launcher without processes: the check before the start, and what it makes of failures."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.distributed.workers import start_quickly
from tests.jobs import tiny_job
from transformers_backend import launch
from transformers_backend.signals import STOP_SIGNALS


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
    aborted = _failure(tmp_path, 4, -signal.SIGABRT, timestamp=9, message="another rank did not answer", kind="peer")
    assert "pid 104): another rank did not answer; " in launch.describe(aborted), "it said why before it was aborted"


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


def _starts(folder: Path, status: str, restarts: int) -> tuple[int, int]:
    """A rank that ends with a status each time: the launcher's own status, and how often the rank was started."""
    count = folder / "starts"
    arguments = ["--standalone", "--nproc-per-node", "1", "--max-restarts", str(restarts), "--no-python", "/bin/sh"]
    returned = launch.main([*arguments, "-c", f"echo >> {count}; {status}"])
    return returned, len(count.read_text().splitlines())


@pytest.mark.parametrize(("status", "expected"), [("exit 0", (0, 1)), ("exit 2", (2, 1)), ("exit 3", (1, 3))])
def test_a_rank_is_started_again_unless_that_is_no_use(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, status: str, expected: tuple
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert _starts(tmp_path, status, restarts=2) == expected
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error: ", "restart "))]
    if status == "exit 3":
        assert said[1::2] == ["restart 1 of 2, from the last checkpoint", "restart 2 of 2, from the last checkpoint"]
    assert len(said) == {"exit 0": 0, "exit 2": 1, "exit 3": 5}[status]


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_signal_while_failed_ranks_are_taken_down_makes_no_success_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, restarts: int
) -> None:
    take_down = launch.Agent._stop_workers

    def signalled(agent: launch.Agent, *arguments, **options) -> None:
        if agent.stop_signal is None:
            os.kill(os.getpid(), signal.SIGTERM)
        take_down(agent, *arguments, **options)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch.Agent, "_stop_workers", signalled)
    assert _starts(tmp_path, "exit 3", restarts) == (1, 1)
    said = capfd.readouterr().err.splitlines()
    assert said[-2] == "SIGTERM: not started again"
    assert said[-1].endswith("ended with status 3 and left no message")


def test_torchs_private_names_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = launch.parse_args(["--standalone", "--rdzv-endpoint", "localhost:0", "--no-python", "/bin/true"])
    options.rdzv_backend = "c10d"
    agent = launch._make_agent(*launch.config_from_args(options))
    assert {"_worker_group", "_pcontext", "_rdzv_handler", "_remaining_restarts"} <= vars(agent).keys()
    for name in ("_monitor_workers", "_initialize_workers", "_restart_workers"):
        assert callable(getattr(LocalElasticAgent, name)), name
    agent._rdzv_handler.shutdown()


def test_ranks_that_an_interrupt_ended_in_set_up_have_not_failed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """train.py ends with 130 then, where other signals kill the rank."""
    interrupted = _failure(tmp_path, 0, 130, timestamp=10) | _failure(tmp_path, 1, -signal.SIGINT, timestamp=10)
    agent = SimpleNamespace(stop_signal=signal.SIGINT, failures=interrupted)
    assert launch._end_of_failure(agent) == 0
    assert capsys.readouterr().err == "SIGINT: stopped before the first step; there is nothing to save\n"
    agent.failures |= _failure(tmp_path, 2, 1, timestamp=10)
    assert launch._end_of_failure(agent) == 1


def _run_launcher(arguments: list[str], folder: Path) -> int:
    """The launcher, which makes a file `watches` in the folder once it watches its ranks."""
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    monitor = launch.Agent._monitor_workers

    def watch(*arguments):
        Path("watches").touch()
        return monitor(*arguments)

    launch.Agent._monitor_workers = watch
    launch.SECONDS_BETWEEN_INTERRUPTS = 0.2
    return launch.main(arguments)


def _launch_apart(script: str, folder: Path) -> tuple[int, str]:
    """The launcher in a process of its own, which the rank (a shell script) signals; returns its status and words."""
    waits = "wait_for() { while [ ! -e $1 ]; do sleep 0.05; done; }; "
    arguments = ["--standalone", "--nproc-per-node", "1", "--max-restarts", "2", "--no-python", "/bin/sh", "-c"]
    launcher = start_quickly(_run_launcher, [*arguments, waits + script], folder, printed=folder / "printed.log")
    launcher.join(timeout=240)
    launcher.kill()
    return launcher.exitcode, (folder / "printed.log").read_text()


def test_a_signal_before_the_first_step_ends_the_run_without_an_error(tmp_path: Path) -> None:
    """The launcher passes it on to the rank, which has no handler for it yet."""
    status, said = _launch_apart("wait_for watches; kill -USR1 $PPID; exec sleep 300", tmp_path)
    assert (status, said) == (0, "SIGUSR1: stopped before the first step; there is nothing to save\n")


def test_a_second_interrupt_kills_the_ranks(tmp_path: Path) -> None:
    """The second comes after the launcher has passed the first one on."""
    script = "trap 'touch got' INT; wait_for watches; kill -INT $PPID; wait_for got; sleep 0.5; kill -INT $PPID"
    status, said = _launch_apart(f"{script}; exec sleep 300", tmp_path)
    assert (status, said) == (130, "second Ctrl-C: stopped at once; what was saved before is whole\n")
