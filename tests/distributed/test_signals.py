"""SIGTERM, SIGINT and SIGUSR1 through the launch script, and the agreement of ranks when only one got the signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.workers import WorkerPool, start_quickly
from tests.jobs import tiny_job
from transformers_backend import launch
from transformers_backend.signals import StopRequest

REPOSITORY = Path(__file__).parents[2]
SECONDS = 120.0


def _children(pid: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid:
            children.append(int(stat.parent.name))
    return sorted(children)


@dataclass
class Run:
    """A launcher with two ranks."""

    pid: int
    status: Callable[[], int | None]  # None: it runs
    kill: Callable[[], None]
    printed: Path


def _start(folder: Path, *, by_script: bool) -> Run:
    """Start a long run: with scripts/train.sh as users do, or the launcher forked, which takes a moment."""
    (folder / "text").mkdir(exist_ok=True)
    for number in range(4):
        (folder / "text" / f"{number}.txt").write_text(f"{number}: some text that is long enough\n" * 20)
    config = tiny_job(folder, "run", training__steps=100_000, training__local_batch_size=1, checkpoint__enable=True)
    config.save(folder / "job.toml")
    printed = folder / "printed.log"
    if not by_script:
        forked = start_quickly(_run_launcher, str(folder / "job.toml"), printed=printed)
        return Run(forked.pid, lambda: forked.exitcode, forked.kill, printed)
    with printed.open("w") as file:
        process = subprocess.Popen(
            [REPOSITORY / "scripts" / "train.sh", folder / "job.toml"],
            env={**os.environ, "PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a signal to the group, as Ctrl-C sends it, does not reach this process
        )
    return Run(process.pid, process.poll, process.kill, printed)


def _run_launcher(config: str) -> int:
    os.environ |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return launch.main(["--standalone", "--nproc-per-node", "2", "-m", launch.TRAINING, config])


def _wait_for_steps(folder: Path, count: int, run: Run) -> None:
    path, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + SECONDS
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert run.status() is None, run.printed.read_text()
        assert time.monotonic() < deadline, "no steps"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("number", "send", "by_script"),
    [
        (signal.SIGUSR1, lambda pid, number: os.kill(pid, number), False),
        (
            signal.SIGINT,
            lambda pid, number: [os.killpg(pid, number), *(os.kill(c, number) for c in _children(pid))],
            True,
        ),
        (signal.SIGTERM, lambda pid, number: os.kill(_children(pid)[-1], number), False),
    ],
    ids=["USR1 to the launcher", "INT to its group and every rank", "TERM to one rank"],
)
def test_a_signal_ends_the_run_after_a_step_with_a_checkpoint(
    tmp_path: Path, number: signal.Signals, send: Callable[[int, int], object], by_script: bool
) -> None:
    run = _start(tmp_path, by_script=by_script)
    try:
        _wait_for_steps(tmp_path, 3, run)
        send(run.pid, number)
        deadline = time.monotonic() + SECONDS
        while run.status() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        run.kill()
    log = run.printed.read_text()
    assert run.status() == 0, log
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    saved = tmp_path / "run" / "checkpoint"
    assert [path.name for path in saved.iterdir()] == [f"step-{last}"], log
    assert (saved / f"step-{last}" / ".metadata").is_file()
    assert f"{number.name}: stopped after step {last} of 100000; saved, the same command goes on from there" in log
    assert "Traceback" not in log


def _steps_until_agreed(signalled_rank: int, at_step: int) -> tuple[int, str]:
    """Steps that this rank makes before it stops; one of the ranks gets SIGUSR1 in one of them."""
    import torch.distributed as dist

    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        for step in range(1, 20):
            if dist.get_rank() == signalled_rank and step == at_step:
                os.kill(os.getpid(), signal.SIGUSR1)
            if (reason := stop.agreed()) is not None:
                break
    assert signal.getsignal(signal.SIGUSR1) == before, "the handlers are those from before"
    return step, reason.name


def test_ranks_stop_at_the_same_step_when_one_is_signalled(two: WorkerPool) -> None:
    for rank in (0, 1):
        assert two.run(_steps_until_agreed, rank, 3) == [(4, "SIGUSR1"), (4, "SIGUSR1")]
