"""A Slurm of one machine for tests: `sbatch` really runs the script, and `srun` really starts the tasks of all nodes.

`install(folder)` makes sbatch, srun, scontrol, squeue, sacct and scancel, each of which runs this file. What they
know lies in the folder: `job-N.state` (Slurm's name of it), `job-N.pid` (the batch script), `job-N.requeue` (while
that is asked for), `job-N.tasks` (the running tasks); scripts and tasks begin when their process ids lie there. Signals
go where Slurm sends them: srun passes USR1 on to the tasks and answers TERM by killing them. Every node is called
localhost.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "sacct", "scancel")


def install(folder: Path) -> Path:
    """Make the commands in `folder`/bin, which belongs in front of PATH, and return that."""
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{folder}" {name} "$@"\n')
        command.chmod(0o755)
    return folder / "bin"


def sbatch(slurm: Path, arguments: list[str]) -> int:
    script = Path(arguments[-1])
    job_id = str(100 + len(list(slurm.glob("job-*.sh"))))
    shutil.copy(script, slurm / f"job-{job_id}.sh")  # as Slurm does: later edits do not count
    set_state(slurm, job_id, "PENDING")
    subprocess.Popen(
        [sys.executable, __file__, str(slurm), "run-job", job_id], start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    print(job_id)
    return 0


def run_job(slurm: Path, arguments: list[str]) -> int:
    (job_id,) = arguments
    options = directives(slurm / f"job-{job_id}.sh")
    environment = {
        **os.environ, "SLURM_JOB_ID": job_id, "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_JOB_NODELIST": f"node[1-{options['nodes']}]", "SLURM_NTASKS": options["ntasks-per-node"],
        "SLURM_PROCID": "0",
    }  # fmt: skip
    requeue = slurm / f"job-{job_id}.requeue"
    log = Path(options["output"].replace("%j", job_id).replace("%%", "%"))
    for restart in range(10):
        environment |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        set_state(slurm, job_id, "RUNNING")
        with log.open("a") as output:
            begin = ["bash", "-c", 'echo $$ >"$0"; exec bash "$1"', slurm / f"job-{job_id}.pid"]
            status = subprocess.run(
                [*begin, slurm / f"job-{job_id}.sh"], env=environment, stdout=output, stderr=subprocess.STDOUT,
                check=False,
            ).returncode  # fmt: skip
        if not requeue.exists():
            break
        requeue.unlink()
        set_state(slurm, job_id, "PENDING")
    if get_state(slurm, job_id) == "RUNNING":
        set_state(slurm, job_id, "FAILED" if status else "COMPLETED")
    return 0


def directives(script: Path) -> dict[str, str]:
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    words = [word for line in lines for word in shlex.split(line)[1:]]
    return {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)}


def srun(slurm: Path, arguments: list[str]) -> int:
    options = {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).removeprefix("--").partition("=")
        options[name] = value
    nodes, tasks_per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    common = {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
        "SLURM_STEP_NUM_TASKS": str(nodes * tasks_per_node),
    }  # fmt: skip
    tasks: list[subprocess.Popen] = []

    def send(number: int) -> None:
        for task in tasks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(task.pid, number)

    signal.signal(signal.SIGUSR1, lambda *_: send(signal.SIGUSR1))
    signal.signal(signal.SIGTERM, lambda *_: send(signal.SIGKILL))
    begun = slurm / f"job-{os.environ['SLURM_JOB_ID']}.tasks"
    begun.unlink(missing_ok=True)
    begin = ["bash", "-c", 'while [[ ! -e "$0" ]]; do sleep 0.02; done; exec "$@"', begun]
    for rank in range(nodes * tasks_per_node):
        node, local = divmod(rank, tasks_per_node)
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        tasks.append(
            subprocess.Popen([*begin, *arguments], env={**os.environ, **common, **own}, start_new_session=True)
        )
    replace(begun, " ".join(str(task.pid) for task in tasks))
    worst = 0
    for task in tasks:
        status = task.wait()
        worst = max(worst, 128 - status if status < 0 else status)
        if worst and "kill-on-bad-exit" in options:
            send(signal.SIGKILL)
    return worst


def scontrol(slurm: Path, arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("localhost\n" * int(arguments[2].removesuffix("]").rpartition("-")[2]), end="")
        return 0
    assert arguments[0] == "requeue", arguments
    (slurm / f"job-{arguments[1]}.requeue").touch()
    return 0


def squeue(slurm: Path, arguments: list[str]) -> int:
    options = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    for job_id, state in states(slurm).items():
        queued = state in ("PENDING", "RUNNING") or "states" in options  # and those that ended a moment ago
        if options.get("jobs", job_id) == job_id and queued:
            print(options["format"].replace("%i", job_id).replace("%T", state))
    return 0


def sacct(slurm: Path, arguments: list[str]) -> int:
    for job_id, state in states(slurm).items():
        print(f"{job_id}|{state}")
    return 0


def scancel(slurm: Path, arguments: list[str]) -> int:
    (job_id,) = arguments
    set_state(slurm, job_id, "CANCELLED")
    for pid in read_tasks(slurm, job_id):
        os.killpg(pid, signal.SIGTERM)
    return 0


def end_all_jobs(slurm: Path) -> None:
    """Kill what still runs."""
    for job_id in [job_id for job_id, state in states(slurm).items() if state == "RUNNING"]:
        set_state(slurm, job_id, "CANCELLED")
        for pid in read_tasks(slurm, job_id):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def read_tasks(slurm: Path, job_id: str) -> list[int]:
    path = slurm / f"job-{job_id}.tasks"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def states(slurm: Path) -> dict[str, str]:
    return {path.stem.removeprefix("job-"): path.read_text() for path in sorted(slurm.glob("job-*.state"))}


def get_state(slurm: Path, job_id: str) -> str:
    return states(slurm)[job_id]


def set_state(slurm: Path, job_id: str, state: str) -> None:
    replace(slurm / f"job-{job_id}.state", state)


def replace(path: Path, text: str) -> None:
    """Write a file in one step: others read it at any time, and some write the same one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    folder, command, *rest = sys.argv[1:]
    sys.exit(globals()[command.replace("-", "_")](Path(folder), rest))
