#!/usr/bin/env python3
"""Submit training to Slurm, and list what became of it.

    scripts/slurm.py CONFIG.toml --nodes 2 --gpus-per-node 8 [options] [--section.key value ...]
    scripts/slurm.py --status [FOLDER ...]
    scripts/slurm.py --resubmit failed,timed-out [FOLDER ...]

The config is checked for nodes x GPUs ranks first. Then the resolved config and a batch script are written to
<job.dump_folder>/slurm, where later edits of CONFIG.toml do not reach them, and handed to sbatch. The job goes back
into the queue when it is stopped before its last step. docs/clusters.md explains; scripts/clusters/slurm_job.sh is what
runs in the job; scripts/slurm_status.py finds the states.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

import slurm_status

REPOSITORY = Path(__file__).resolve().parents[1]
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<clock>\d+(?::\d+){0,2}))|(?P<short>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Resources:
    """What is asked of Slurm: the options of the command line, checked."""

    job_name: str
    nodes: int
    gpus_per_node: int
    launcher: str
    cpus_per_gpu: int | None
    partition: str | None
    account: str | None
    time: str | None
    signal_seconds: int
    max_requeues: int
    max_restarts: int
    container: str | None
    container_mounts: str | None
    sbatch_options: tuple[str, ...]

    def problems(self) -> list[str]:
        found = [
            f"--{name} {value}: must be at least {minimum}."
            for name, value, minimum in (
                ("nodes", self.nodes, 1),
                ("gpus-per-node", self.gpus_per_node, 1),
                ("cpus-per-gpu", self.cpus_per_gpu, 1),
                ("signal-seconds", self.signal_seconds, 1),
                ("max-requeues", self.max_requeues, 0),
                ("max-restarts", self.max_restarts, 0),
            )
            if value is not None and value < minimum
        ]
        if self.time is not None:
            found += self._time_problems(self.time)
        if self.max_restarts > 0 and self.launcher != "torchrun":
            found.append("--max-restarts needs --launcher torchrun: srun starts no process a second time.")
        if self.container_mounts is not None and self.container is None:
            found.append("--container-mounts needs --container: without one every path is visible; leave it out.")
        found += [
            f"--sbatch {option!r}: must be one option of sbatch such as --sbatch=--qos=high."
            for option in self.sbatch_options
            if not option.startswith("-") or "\n" in option
        ]
        return found

    def _time_problems(self, limit: str) -> list[str]:
        seconds = parse_time(limit)
        if seconds is None:
            return [f"--time {limit}: must be as Slurm writes it, hours:minutes:seconds or days-hours, say 24:00:00."]
        if seconds <= self.signal_seconds:
            return [
                f"--time {limit}: must be longer than the {self.signal_seconds} seconds before the limit in which "
                "training saves; raise it, or lower --signal-seconds."
            ]
        return []


def parse_time(text: str) -> int | None:
    """The seconds of a time limit in one of Slurm's forms; None if it is in none of them."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    parts = [int(part) for part in (match["clock"] or match["short"]).split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


# -- the batch script --------------------------------------------------------------------------------------------------


def build_script(resources: Resources, run_folder: Path, steps: int) -> str:
    """The text of a job's batch script: its #SBATCH lines and variables, then scripts/clusters/slurm_job.sh."""
    body = (REPOSITORY / "scripts" / "clusters" / "slurm_job.sh").read_text(encoding="utf-8")
    directives = "\n".join(f"#SBATCH {shlex.quote(option)}" for option in directives_of(resources, run_folder))
    variables = {
        "REPOSITORY": str(REPOSITORY),
        "RUN_FOLDER": str(run_folder),
        "STEPS": str(steps),
        "LAUNCHER": resources.launcher,
        "GPUS_PER_NODE": str(resources.gpus_per_node),
        "MAX_REQUEUES": str(resources.max_requeues),
    }
    assignments = "\n".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    srun_options = shlex.join(srun_options_of(resources, run_folder))
    return (
        f"#!/usr/bin/env bash\n{directives}\n\n{assignments}\nSRUN_OPTIONS=({srun_options})\n"
        f"export MAX_RESTARTS={resources.max_restarts}\n\n{body}"
    )


def directives_of(resources: Resources, run_folder: Path) -> list[str]:
    """The options of sbatch that a job carries with it."""
    processes_in_task = resources.gpus_per_node if resources.launcher == "torchrun" else 1
    log = str(run_folder / "slurm" / "job-").replace("%", "%%") + "%j.log"  # %j is the job's id
    options = {
        "job-name": resources.job_name,
        "partition": resources.partition,
        "account": resources.account,
        "time": resources.time,
        "nodes": resources.nodes,
        "ntasks-per-node": resources.gpus_per_node // processes_in_task,
        "gpus-per-node": resources.gpus_per_node,
        "cpus-per-task": resources.cpus_per_gpu and resources.cpus_per_gpu * processes_in_task,
        "output": log,
        "open-mode": "append",  # a requeued job goes on in the same log
        "signal": f"B:USR1@{resources.signal_seconds}",  # B: to the batch script, which passes it on
    }
    requeue = "--requeue" if resources.max_requeues else "--no-requeue"
    return [
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
        requeue,
        *resources.sbatch_options,
    ]


def srun_options_of(resources: Resources, run_folder: Path) -> list[str]:
    options = []
    if resources.cpus_per_gpu is None:
        options.append("--cpu-bind=none")  # or a task, with all its processes, may be tied to a single core
    else:  # srun does not take it over from sbatch (since Slurm 22.05)
        per_task = resources.cpus_per_gpu * (resources.gpus_per_node if resources.launcher == "torchrun" else 1)
        options.append(f"--cpus-per-task={per_task}")
    if resources.container is not None:
        mounts = [f"{REPOSITORY}:{REPOSITORY}", f"{run_folder}:{run_folder}"]
        mounts += [resources.container_mounts] if resources.container_mounts else []
        options += [f"--container-image={resources.container}", f"--container-mounts={','.join(mounts)}"]
    return options


# -- submitting --------------------------------------------------------------------------------------------------------


def submit(options: argparse.Namespace, job_arguments: list[str]) -> int:
    """Check, write and submit one job; returns the exit status."""
    from transformers_backend.job_config import load_job_config, validate  # imports torch: not for --status

    name, words = _config_arguments(options.folders)
    resources = _resources(options, name)
    if problems := resources.problems():
        raise ValueError(" ".join(problems))
    with _working_in(REPOSITORY):  # where relative paths of a config start, as in train.sh
        config = load_job_config([*words, *job_arguments])
        validate(config, world_size=resources.nodes * resources.gpus_per_node)
        run_folder = Path(config.job.dump_folder).expanduser().resolve()
    if config.checkpoint.create_seed_checkpoint:
        raise ValueError(
            "checkpoint.create_seed_checkpoint = true: a seed is written in a moment, by one process, and takes no "
            "step; make it with NPROC=1 scripts/train.sh, then submit without this key."
        )
    script = build_script(resources, run_folder, config.training.steps)
    if resources.max_requeues and not config.checkpoint.enable:
        _warn(
            "checkpoint.enable = false: a job that is stopped and requeued begins again at step 1. Set "
            "--checkpoint.enable, or --max-requeues 0."
        )
    if options.dry_run:
        print(script, end="")
        return 0
    _refuse_a_folder_in_use(run_folder)
    slurm_folder = run_folder / "slurm"
    slurm_folder.mkdir(parents=True, exist_ok=True)
    config.save(slurm_folder / "config.toml")
    (slurm_folder / "job.sh").write_text(script, encoding="utf-8")
    job_id = _sbatch(run_folder, steps=config.training.steps)
    print(f"job {job_id}: {resources.nodes} x {resources.gpus_per_node} GPUs, {config.training.steps} steps")
    print(f"log: {slurm_folder}/job-{job_id}.log")
    print(f"state: {REPOSITORY}/scripts/slurm.py --status {run_folder}")
    return 0


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _config_arguments(positional: list[str]) -> tuple[str, list[str]]:
    """The name of the job and the TOML file, looked up from where the user is, else from the checkout."""
    if len(positional) != 1:
        raise ValueError(f"one CONFIG.toml is needed and {len(positional)} are named; --help shows how.")
    path = Path(positional[0])
    return path.stem, [str(path.resolve() if path.exists() else path)]


def _resources(options: argparse.Namespace, name: str) -> Resources:
    missing = [flag for flag in ("nodes", "gpus_per_node") if getattr(options, flag) is None]
    if missing:
        raise ValueError(f"{', '.join(f'--{flag}'.replace('_', '-') for flag in missing)}: missing; give a number.")
    return Resources(
        job_name=re.sub(r"[^\w.-]", "-", options.job_name or name),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        launcher=options.launcher,
        cpus_per_gpu=options.cpus_per_gpu,
        partition=options.partition,
        account=options.account,
        time=options.time,
        signal_seconds=options.signal_seconds,
        max_requeues=options.max_requeues,
        max_restarts=options.max_restarts,
        container=options.container,
        container_mounts=options.container_mounts,
        sbatch_options=tuple(options.sbatch),
    )


def _refuse_a_folder_in_use(run_folder: Path) -> None:
    if not (run_folder / "slurm" / "events.jsonl").exists():
        return
    for run in slurm_status.read_runs([run_folder]):
        if run.state in slurm_status.ACTIVE:
            raise ValueError(
                f'job.dump_folder = "{run_folder}": job {run.job_id} is {run.state} there, and two jobs would write '
                f"over each other; `scancel {run.job_id}` first, or name another folder."
            )


def _sbatch(run_folder: Path, *, steps: int) -> str:
    """Submit the script in a run folder, note it there, and return the job's id."""
    command = ["sbatch", "--parsable", str(run_folder / "slurm" / "job.sh")]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    except FileNotFoundError:
        raise ValueError(
            "there is no sbatch here: run this on a login node of the cluster, or add --dry-run."
        ) from None
    if ran.returncode != 0:
        raise ValueError(f"sbatch refused the job: {ran.stderr.strip()} (the script is {command[-1]})")
    job_id = ran.stdout.strip().split(";")[0]  # "id" or "id;cluster"
    with (run_folder / "slurm" / "events.jsonl").open("a", encoding="utf-8") as events:
        events.write(slurm_status.event_line("submitted", job_id, steps=steps))
    return job_id


# -- listing -----------------------------------------------------------------------------------------------------------


def show_status(roots: list[str], resubmit: list[str]) -> int:
    """Print the table of all runs at or below the folders; submit those in one of the states again."""
    folders = [Path(root) for root in roots or [os.path.relpath(REPOSITORY / "outputs")]]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise ValueError(f"{', '.join(missing)}: no such folder; name the folders of runs, or one above them.")
    runs = slurm_status.read_runs(slurm_status.find_run_folders(folders))
    if not runs:
        print(f"no run with a submitted job in {', '.join(map(str, folders))}")
        return 0
    print(slurm_status.to_table(runs))
    for run in runs:
        if run.state in resubmit:
            job_id = _sbatch(run.folder.resolve(), steps=run.steps)
            print(f"resubmitted {run.folder} as job {job_id}")
    return 0


def _states_to_resubmit(text: str | None) -> list[str]:
    states = [word.replace("-", " ") for word in text.split(",")] if text else []
    unknown = [state for state in states if state not in slurm_status.RESUBMITTABLE]
    if unknown:
        known = ", ".join(state.replace(" ", "-") for state in slurm_status.RESUBMITTABLE)
        raise ValueError(f"--resubmit {text}: must be one or more, with commas, of {known}.")
    return states


# -- command line ------------------------------------------------------------------------------------------------------


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate this script's arguments from the job's: those named --section.key, and the value after them."""
    own: list[str] = []
    job: list[str] = []
    target = own
    for argument in arguments:
        if argument.startswith("--"):
            target = job if "." in argument.partition("=")[0] else own
        target.append(argument)
    return own, job


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/slurm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("folders", nargs="*", metavar="CONFIG.toml | FOLDER", help="with --status: default outputs")
    add("--nodes", type=int, help="number of nodes")
    add("--gpus-per-node", type=int, help="GPUs, and with them processes, on each node")
    add("--launcher", choices=("torchrun", "srun"), default="torchrun", help="who starts processes; %(default)s")
    add("--job-name", help="default: the name of CONFIG.toml")
    add("--partition", help="as in sbatch; so are the next two")
    add("--account")
    add("--time", help="limit of one start, such as 24:00:00 or 2-00; default: the cluster's")
    add("--cpus-per-gpu", type=int, help="CPU cores for each process; default: the cluster's, and none is tied to any")
    add("--sbatch", action="append", default=[], metavar="=OPTION", help="another option, as in --sbatch=--qos=high")
    add("--signal-seconds", type=int, default=120, help="before the limit, for saving; default %(default)s")
    add("--max-requeues", type=int, default=50, help="how often a stopped job comes back; default %(default)s")
    add("--max-restarts", type=int, default=0, help="of processes that failed, by torchrun; default %(default)s")
    add("--container", metavar="IMAGE", help="run in this image (needs the Pyxis plugin of Slurm)")
    add("--container-mounts", metavar="FROM:TO,...", help="beside the checkout and the run's folder")
    add("--dry-run", action="store_true", help="print the batch script; write and submit nothing")
    add("--status", action="store_true", help="list the runs in FOLDERs with their jobs' states")
    add("--resubmit", metavar="STATE,...", help="list, and submit those again that are failed, timed-out, ...")
    return parser.parse_args(arguments)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(arguments: list[str]) -> int:
    own, job_arguments = split_arguments(arguments)
    options = parse(own)
    try:
        if options.status or options.resubmit:
            return show_status(options.folders, _states_to_resubmit(options.resubmit))
        return submit(options, job_arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
