"""The list of scripts/slurm.py --status: which state follows from which evidence, and the table.

Lists of jobs that really ran are in test_slurm.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def events(*names: str, **last: Any) -> list[dict[str, Any]]:
    found = [{"event": name, "job_id": "7", "restart": 0, "time": 0} for name in names]
    return [*found[:-1], {**found[-1], **last}]


@pytest.mark.parametrize(
    ("state", "evidence"),
    [
        ("pending", {"slurm_state": "PENDING", "events": events("submitted")}),
        ("pending", {"events": events("submitted")}),
        ("running", {"slurm_state": "RUNNING", "events": events("submitted", "started")}),
        ("running", {"slurm_state": "COMPLETING", "events": events("submitted", "started", "ended", exit_code=0)}),
        ("running", {"events": events("submitted", "started")}),
        ("requeued", {"slurm_state": "PENDING", "events": events("submitted", "started", "ended", "requeued")}),
        ("requeued", {"slurm_state": "REQUEUED", "events": events("submitted", "started")}),  # by Slurm: a lost node
        ("requeued", {"events": events("submitted", "started", "ended", "requeued")}),
        ("done", {"slurm_state": "COMPLETED", "step": 9, "events": events("submitted", "started", "ended")}),
        ("done", {"step": 9, "events": events("submitted", "started", "ended", exit_code=0)}),
        ("done", {"slurm_answered": True, "step": 9, "events": events("submitted", "started", "ended", exit_code=0)}),
        ("stopped", {"slurm_state": "COMPLETED", "step": 5, "events": events("submitted", "started", "ended")}),
        ("stopped", {"step": 5, "events": events("submitted", "started", "ended", exit_code=0)}),
        ("failed", {"slurm_state": "FAILED", "events": events("submitted", "started", "ended", exit_code=1)}),
        ("failed", {"slurm_state": "NODE_FAIL", "events": events("submitted", "started")}),
        ("failed", {"events": events("submitted", "started", "ended", exit_code=1), "log": "KeyError: 'memory'"}),
        ("failed", {"slurm_answered": True, "events": events("submitted", "started")}),
        ("failed", {"events": events("submitted", "started", "ended", "requeued", "requeue_failed")}),
        ("out of memory", {"slurm_state": "OUT_OF_MEMORY", "events": events("submitted", "started")}),
        ("out of memory", {"slurm_state": "FAILED", "events": events("submitted", "started", "ended", exit_code=1),
                           "log": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."}),
        ("out of memory", {"events": events("submitted", "started", "ended", exit_code=137),
                           "log": "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0."}),
        ("out of memory", {"slurm_answered": True, "events": events("submitted", "started"),
                           "log": "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried ..."}),
        ("timed out", {"slurm_state": "TIMEOUT", "events": events("submitted", "started")}),
        ("timed out", {"slurm_state": "CANCELLED", "events": events("submitted", "started"),
                       "log": "error: *** JOB 7 ON n1 CANCELLED AT 2030-01-01T00:00:00 DUE TO TIME LIMIT ***"}),
        ("timed out", {"slurm_answered": True, "events": events("submitted", "started"),
                       "log": "error: *** STEP 7.0 ON n1 CANCELLED AT 2030-01-01T00:00:00 DUE TO TIME LIMIT ***"}),
        ("preempted", {"slurm_state": "PREEMPTED", "events": events("submitted", "started")}),
        ("preempted", {"slurm_answered": True, "events": events("submitted", "started"),
                       "log": "error: *** JOB 7 ON n1 CANCELLED AT 2030-01-01T00:00:00 DUE TO PREEMPTION ***"}),
        ("cancelled", {"slurm_state": "CANCELLED", "events": events("submitted", "started")}),
        ("cancelled", {"slurm_answered": True, "events": events("submitted", "started"),
                       "log": "error: *** JOB 7 ON n1 CANCELLED AT 2030-01-01T00:00:00 ***"}),
        ("cancelled", {"slurm_answered": True, "events": events("submitted")}),
    ],
)  # fmt: skip
def test_a_state_follows_from_the_evidence(state: str, evidence: dict[str, Any], slurm: ModuleType) -> None:
    status = slurm.slurm_status
    assert status.judge(status.Evidence(**{"steps": 9, **evidence})) == state


def make_run(folder: Path, *names: str, log: str = "", metrics: str = "", **last: Any) -> None:
    (folder / "slurm").mkdir(parents=True)
    own = events(*names, **last)
    own[0]["steps"] = 9
    (folder / "slurm" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in own))
    (folder / "slurm" / "job-7.log").write_text(log)
    (folder / "metrics.jsonl").write_text(metrics)


def test_the_list_without_slurm(slurm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """On another machine that sees the folders: what they say counts, also of a log of several starts."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    line = '{"step": 4, "loss": 3.25}\n{"step": 5, "lo'  # the last one is being written
    earlier = "=== job 7 started, restart 0\nCUDA out of memory\n=== job 7 started, restart 1\nKeyError\n"
    make_run(tmp_path / "runs/a", "submitted", "started", "ended", log=earlier, metrics=line, exit_code=1, time=7322)
    make_run(tmp_path / "runs/a/c", "submitted", "started", metrics='{"step": 9, "loss": null}\n')
    assert slurm.main(["--status", "runs"]) == 0
    header, first, second, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["state", "step", "loss", "time", "job", "run"]
    assert first == "failed    4/9  3.2500        02:02:02    7  runs/a"
    assert second.split()[:2] == ["running", "9/9"]
    assert second.endswith("runs/a/c")
    assert total == "2 runs: 1 failed, 1 running"


def test_a_list_of_nothing(slurm: ModuleType, tmp_path: Path, capsys) -> None:
    assert slurm.main(["--status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no run with a submitted job in {tmp_path}\n"
    for words, message in (
        (["--status", str(tmp_path / "no")], f"{tmp_path}/no: no such folder; name the folders of runs, "
         "or one above them."),
        (["--resubmit", "broken"], "--resubmit broken: must be one or more, with commas, of stopped, failed, "
         "out-of-memory, timed-out, preempted, cancelled."),
    ):  # fmt: skip
        assert slurm.main(words) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_the_list_comes_without_torch() -> None:
    """It is asked for often, and on login nodes."""
    command = "import sys, slurm_status; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=SCRIPTS, check=True)
    imports = "import sys; sys.argv = ['slurm.py']; import slurm; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", imports], cwd=SCRIPTS, check=True)
