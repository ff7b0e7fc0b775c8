"""What became of the jobs that scripts/slurm.py submitted: the evidence, what it means, and the table of `--status`.

A run folder with a job has `slurm/events.jsonl`, a JSON object a line, which scripts/slurm.py ("submitted") and the
batch script (scripts/clusters/slurm_job.sh: "started", "ended", "requeued") append to, and `slurm/job-N.log`. Slurm
is asked too, where there is one. `judge` makes one word of all this; it reads nothing itself. Only the standard library
is needed here, so that the list comes at once and on a login node.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PENDING, REQUEUED, RUNNING, DONE = "pending", "requeued", "running", "done"
STOPPED, FAILED, OUT_OF_MEMORY, TIMED_OUT = "stopped", "failed", "out of memory", "timed out"
PREEMPTED, CANCELLED = "preempted", "cancelled"
ACTIVE = (PENDING, REQUEUED, RUNNING)
"""States of a job that will still do something; the others are final."""
RESUBMITTABLE = (STOPPED, FAILED, OUT_OF_MEMORY, TIMED_OUT, PREEMPTED, CANCELLED)

# Slurm's job states, by what they mean here. COMPLETED and the FAILED ones need a closer look.
_SLURM_STATES = {
    "PENDING CONFIGURING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT": PENDING,
    "RUNNING COMPLETING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED": RUNNING,
    "OUT_OF_MEMORY": OUT_OF_MEMORY,
    "TIMEOUT DEADLINE": TIMED_OUT,
    "PREEMPTED": PREEMPTED,
    "CANCELLED REVOKED": CANCELLED,
    "COMPLETED": DONE,
    "FAILED BOOT_FAIL LAUNCH_FAILED NODE_FAIL RECONFIG_FAIL": FAILED,
}
_MEANINGS = {name: meaning for names, meaning in _SLURM_STATES.items() for name in names.split()}
_LOG_SIGNS = {
    # PyTorch on a device and on the CPU, Slurm's two ways of saying it, and the kernel's.
    OUT_OF_MEMORY: re.compile(
        r"OutOfMemoryError|CUDA out of memory|DefaultCPUAllocator: (can't|not enough)|oom[-_ ]kill|OUT_OF_MEMORY"
        r"|Exceeded job memory limit|Out of memory: Killed",
        re.IGNORECASE,
    ),
    TIMED_OUT: re.compile(r"DUE TO TIME LIMIT"),
    PREEMPTED: re.compile(r"DUE TO PREEMPTION"),
    CANCELLED: re.compile(r"(JOB|STEP) \S+ ON \S+ CANCELLED"),
}
_LOG_START = re.compile(r"^=== job \S+ started", re.MULTILINE)
_TAIL_BYTES = 256 * 1024


@dataclass(frozen=True)
class Evidence:
    """All that is known of the newest job of one run."""

    events: list[dict[str, Any]] = field(default_factory=list)
    """Of this job, in the order in which they were written."""
    slurm_state: str | None = None
    """Slurm's name of the job's state; None where Slurm does not know the job."""
    slurm_answered: bool = False
    """Whether there is a Slurm, so that a job it does not know is over."""
    log: str = ""
    """The end of the job's log, since it was last started."""
    step: int = 0
    """The last step in metrics.jsonl."""
    steps: int = 0
    """training.steps."""


def judge(evidence: Evidence) -> str:
    """Return the state of a job, one of the constants above.

    Slurm's word counts first; where it has none, the last event does. A failure becomes "out of memory" or "timed out"
    where the log says so, and a job that ended well before its last step is "stopped".
    """
    last = evidence.events[-1]["event"] if evidence.events else None
    meaning = _MEANINGS.get(evidence.slurm_state or "")
    if meaning is None:
        meaning = _judge_by_event(evidence, last)
    if meaning == PENDING:
        return REQUEUED if last not in (None, "submitted") else PENDING
    if meaning == DONE:
        return DONE if evidence.step >= evidence.steps else STOPPED
    if meaning in (FAILED, CANCELLED):  # what ran out of time or memory is often cancelled by that
        return next((state for state, sign in _LOG_SIGNS.items() if sign.search(evidence.log)), meaning)
    return meaning


def _judge_by_event(evidence: Evidence, last: str | None) -> str:
    if last == "ended":
        return DONE if evidence.events[-1].get("exit_code") == 0 else FAILED
    if evidence.slurm_answered and last in ("submitted", "requeued"):  # it left the queue before it started
        return CANCELLED
    if evidence.slurm_answered or last == "requeue_failed":  # it runs nowhere: it ended without a word of its own
        return FAILED
    return {"submitted": PENDING, "started": RUNNING, "requeued": REQUEUED}.get(last or "", FAILED)


# -- from the disk and from Slurm to the evidence ----------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One line of the list."""

    folder: Path
    job_id: str
    state: str
    step: int
    steps: int
    loss: float | None
    seconds: float | None
    """In the queue so far, or of the last start: so far or until it ended."""


def find_run_folders(roots: list[Path]) -> list[Path]:
    """Folders at or below the roots that have a job's events, sorted; checkpoints are not searched."""
    found = []
    for root in roots:
        for folder, children, _ in os.walk(root):
            if (Path(folder) / "slurm" / "events.jsonl").is_file():
                found.append(Path(folder))
            children[:] = [name for name in children if not name.startswith(("slurm", "step-"))]
    return sorted(set(found))


def read_runs(folders: list[Path]) -> list[Run]:
    """The state of the newest job of each run folder; Slurm is asked once for all of them."""
    events = {folder: newest_job_events(folder) for folder in folders}
    ids = [own[-1]["job_id"] for own in events.values() if own]
    answered, states = ask_slurm(ids)
    return [_read_run(folder, own, answered, states) for folder, own in events.items() if own]


def _read_run(folder: Path, events: list[dict[str, Any]], answered: bool, states: dict[str, str]) -> Run:
    job_id = events[-1]["job_id"]
    metrics = last_metrics(folder)
    steps = next((event["steps"] for event in reversed(all_events(folder)) if "steps" in event), 0)
    evidence = Evidence(
        events=events,
        slurm_state=states.get(job_id),
        slurm_answered=answered,
        log=read_log(folder, job_id),
        step=metrics.get("step", 0),
        steps=steps,
    )
    state = judge(evidence)
    return Run(folder, job_id, state, evidence.step, steps, metrics.get("loss"), _seconds(events, state))


def _seconds(events: list[dict[str, Any]], state: str) -> float | None:
    since, until = events[-1]["time"], time.time()
    if state not in (PENDING, REQUEUED):
        started = [event["time"] for event in events if event["event"] == "started"]
        ended = [event["time"] for event in events if event["event"] == "ended"]
        if not started:
            return None
        since = started[-1]
        if state != RUNNING:
            until = next((moment for moment in ended if moment >= since), None)
    return None if until is None else max(until - since, 0.0)


def all_events(folder: Path) -> list[dict[str, Any]]:
    return list(_json_lines((folder / "slurm" / "events.jsonl").read_text(encoding="utf-8").splitlines()))


def newest_job_events(folder: Path) -> list[dict[str, Any]]:
    """The events of the job that was submitted last, "submitted" first: it is noted only once sbatch has answered."""
    events = all_events(folder)
    newest = next((event["job_id"] for event in reversed(events) if event["event"] == "submitted"), None)
    own = [event for event in events if event["job_id"] == newest]
    return sorted(own, key=lambda event: event["event"] != "submitted")


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics.jsonl; empty where there is none."""
    lines = list(_json_lines(_tail(folder / "metrics.jsonl").splitlines()))
    return lines[-1] if lines else {}


def read_log(folder: Path, job_id: str) -> str:
    """What a job logged since it was last started: an earlier start's trouble is over."""
    text = _tail(folder / "slurm" / f"job-{job_id}.log")
    starts = [match.start() for match in _LOG_START.finditer(text)]
    return text[starts[-1] :] if starts else text


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _json_lines(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # the first line of a tail, or one that is being written


def ask_slurm(job_ids: list[str]) -> tuple[bool, dict[str, str]]:
    """Return whether Slurm answered, and {job id: state} of the jobs that it knows."""
    queued = _lines_of("squeue", "--me", "--noheader", "--states=all", "--format=%i|%T")
    ended = None
    if job_ids:
        ended = _lines_of(
            "sacct", f"--jobs={','.join(job_ids)}", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"
        )
    states = {}
    for line in [*(ended or []), *(queued or [])]:  # the queue is newer
        job_id, _, state = line.partition("|")
        states[job_id] = state.split()[0] if state else ""  # "CANCELLED by 1000"
    return queued is not None, {job_id: states[job_id] for job_id in job_ids if states.get(job_id)}


def _lines_of(*command: str) -> list[str] | None:
    """What a command prints; None where it is missing or fails, as sacct does where jobs are not accounted for."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.splitlines() if ran.returncode == 0 else None


# -- the table ---------------------------------------------------------------------------------------------------------


def to_table(runs: list[Run]) -> str:
    """One line a run, and how many there are of each state."""
    rows = [("state", "step", "loss", "time", "job", "run"), *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5)), row[5]]) for row in rows
    ]
    counts = {state: sum(run.state == state for run in runs) for state in dict.fromkeys(run.state for run in runs)}
    noun = "run" if len(runs) == 1 else "runs"
    lines.append(f"{len(runs)} {noun}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(lines)


def _row(run: Run) -> tuple[str, ...]:
    loss = "" if run.loss is None else f"{run.loss:.4f}"
    return (run.state, f"{run.step}/{run.steps}", loss, _duration(run.seconds), run.job_id, str(run.folder))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:{rest:02}"


def event_line(event: str, job_id: str, **more: Any) -> str:
    """A line of events.jsonl."""
    return json.dumps({"event": event, "job_id": job_id, "restart": 0, "time": int(time.time()), **more}) + "\n"
