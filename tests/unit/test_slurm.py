"""scripts/slurm.py: jobs that really run under a stand-in for Slurm (tests/fake_slurm.py), stops and requeues, what is
refused, and the batch script that it writes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests import fake_slurm

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts"
PATIENCE_SECONDS = 240


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A TOML file of a job that trains four steps in a moment."""
    (tmp_path / "text").mkdir()
    for name in "abcd":
        (tmp_path / "text" / f"{name}.txt").write_text("some text of no interest\n" * 50)
    path = tmp_path / "my job.toml"
    path.write_text(
        f"""
[job]
dump_folder = "{tmp_path}/runs/one"
[model]
hf_assets_path = "byt5"
[hf_transformers]
model_type = "llama"
config_overrides = {{ vocab_size = 384, hidden_size = 32, intermediate_size = 48, num_hidden_layers = 1,
    num_attention_heads = 2, num_key_value_heads = 2 }}
[training]
dataset_path = "{tmp_path}/text"
seq_len = 32
local_batch_size = 1
steps = 4
[lr_scheduler]
warmup_steps = 1
[checkpoint]
enable = true
[metrics]
log_freq = 1
""".replace(",\n    ", ", ")
    )
    return path


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a stand-in for Slurm whose commands are on PATH; jobs that a failed test leaves behind end."""
    monkeypatch.setenv("PATH", f"{fake_slurm.install(tmp_path / 'slurm')}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "slurm"
    fake_slurm.end_all_jobs(tmp_path / "slurm")


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def wait_for_end(cluster: Path, job_id: str = "100") -> str:
    over = ("COMPLETED", "FAILED", "CANCELLED")
    wait_for(lambda: fake_slurm.get_state(cluster, job_id) in over, "the end of the job")
    return fake_slurm.get_state(cluster, job_id)


def read_events(run: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run / "slurm" / "events.jsonl").read_text().splitlines()]


# --- jobs that really train


def test_two_nodes_train_to_the_end(slurm: ModuleType, cluster: Path, config: Path, tmp_path: Path, capsys) -> None:
    """Real processes, one on each of two nodes that are both this machine; the torchrun form is in the next test."""
    run = tmp_path / "runs" / "one"
    two_nodes = "--nodes 2 --gpus-per-node 1 --launcher srun --training.steps 2".split()
    assert slurm.main([config.name, *two_nodes]) == 0
    state = wait_for_end(cluster)
    log = (run / "slurm" / "job-100.log").read_text()
    assert state == "COMPLETED", log
    assert "2 x cpu, mesh dp_shard 2" in log, "both nodes train together"
    assert read_steps(run) == [1, 2]
    assert sorted(read_events(run)) == ["ended", "started", "submitted"]
    capsys.readouterr()
    assert slurm.main(["--status", "runs"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["done", "2/2"]


def test_training_stopped_before_its_limit_goes_on(
    slurm: ModuleType, cluster: Path, config: Path, tmp_path: Path
) -> None:
    """As Slurm does it: USR1 to the batch script, srun to both nodes, and the same job starts once more."""
    run = tmp_path / "runs" / "one"
    two_nodes = (
        "--nodes 2 --gpus-per-node 1 --launcher torchrun --training.steps 100 --checkpoint.interval 1000".split()
    )
    assert slurm.main([config.name, *two_nodes]) == 0
    wait_for(lambda: read_steps(run)[3:], "a few steps")
    signal_batch_script(cluster, signal.SIGUSR1)
    state = wait_for_end(cluster)
    log = (run / "slurm" / "job-100.log").read_text()
    assert state == "COMPLETED", log
    assert "=== requeued: it goes on from its last checkpoint" in log
    assert "resumed from" in log
    assert read_steps(run) == list(range(1, 101)), "no step is lost, none trained twice"


def read_steps(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line)["step"] for line in lines]


# --- stops and requeues, with a stand-in for training

TRAINING = r"""#!/usr/bin/env bash
# Trains a step in each run, says so, and then waits: for USR1 or TERM, after which it exits as a stopped run does.
# The run that finds one step fewer than wanted does the rest and ends by itself.
done_before="$(grep -c . "$RUN/metrics.jsonl" 2>/dev/null)"
echo "{\"step\": $((done_before + 1)), \"loss\": 2.5}" >>"$RUN/metrics.jsonl"
trap 'echo task got USR1; exit "${STOPPED_STATUS:-0}"' USR1
trap 'echo task got TERM; exit 0' TERM
if [[ -n "${FAILS:-}" ]]; then echo "torch.OutOfMemoryError: $FAILS"; exit 1; fi
if ((done_before + 1 >= 3)); then exit 0; fi
touch "$RUN/waiting"
for ((tenths = 0; tenths < 3000; tenths++)); do sleep 0.1; done
exit 1
"""


@pytest.fixture
def checkout(slurm: ModuleType, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose train.sh is the stand-in; returns the run's folder, of 3 steps."""
    scripts = tmp_path / "checkout" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "clusters").symlink_to(SCRIPTS / "clusters")
    (scripts / "setup_environment.sh").symlink_to(SCRIPTS / "setup_environment.sh")
    (scripts / "train.sh").write_text(TRAINING)
    (scripts / "train.sh").chmod(0o755)
    monkeypatch.setattr(slurm, "REPOSITORY", tmp_path / "checkout")
    monkeypatch.setenv("RUN", str(tmp_path / "runs" / "one"))
    return tmp_path / "runs" / "one"


def submit_stand_in(slurm: ModuleType, config: Path, *options: str) -> None:
    one_process = "--nodes 1 --gpus-per-node 1 --training.steps 3".split()
    assert slurm.main([str(config), *one_process, *options]) == 0


def wait_for_training(run: Path) -> None:
    wait_for((run / "waiting").exists, "training to run")
    (run / "waiting").unlink()


def signal_batch_script(cluster: Path, number: int) -> None:
    """What Slurm does so many seconds before the time limit, because of --signal=B:USR1@..."""
    os.kill(int((cluster / "job-100.pid").read_text()), number)


def test_a_job_comes_back_until_it_is_done(
    slurm: ModuleType, cluster: Path, config: Path, checkout: Path, capsys: pytest.CaptureFixture
) -> None:
    """Stopped once by the signal before the limit, and once by a preemption, of which only the tasks learn."""
    submit_stand_in(slurm, config)
    wait_for_training(checkout)
    signal_batch_script(cluster, signal.SIGUSR1)
    wait_for_training(checkout)
    (task,) = (cluster / "job-100.tasks").read_text().split()
    os.killpg(int(task), signal.SIGTERM)
    assert wait_for_end(cluster) == "COMPLETED"
    log = (checkout / "slurm" / "job-100.log").read_text()
    assert "=== USR1: training is asked to finish its step, save and exit" in log
    assert "=== stopped by USR1 at step 1 of 3, exit status 0" in log
    assert "=== stopped at step 2 of 3, exit status 0" in log
    assert log.count("=== requeued: it goes on from its last checkpoint") == 2
    assert "restart 2" in log
    assert read_events(checkout)[1:] == [
        "started",
        "ended",
        "requeued",
        "started",
        "ended",
        "requeued",
        "started",
        "ended",
    ]
    capsys.readouterr()
    assert slurm.main(["--status", str(checkout.parent)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["done", "3/3", "2.5000"]


def test_a_job_that_could_not_save_in_time_comes_back_too(
    slurm: ModuleType, cluster: Path, config: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOPPED_STATUS", "9")
    submit_stand_in(slurm, config, "--max-requeues", "1")
    for _ in range(2):
        wait_for_training(checkout)
        signal_batch_script(cluster, signal.SIGTERM)
    assert wait_for_end(cluster) == "FAILED"
    log = (checkout / "slurm" / "job-100.log").read_text()
    assert "task got USR1" in log, "srun kills its tasks on TERM: they must be asked in another way"
    assert "=== not requeued: it has been 1 times, and --max-requeues is 1" in log


def test_an_earlier_runs_metrics_do_not_make_a_stopped_job_finished(
    slurm: ModuleType, cluster: Path, config: Path, checkout: Path
) -> None:
    """The first start is stopped before its first step, in a folder where a run of 50 steps has been."""
    checkout.mkdir(parents=True)
    (checkout / "metrics.jsonl").write_text('{"step": 50, "loss": 1.0}\n')
    set_up = 'if [[ ! -e "$RUN/waited" ]]; then trap "exit 0" USR1; touch "$RUN/waited" "$RUN/waiting"; while :; do '
    set_up += 'sleep 0.1; done; fi\necho \'{"step": 3, "loss": 2.0}\' >"$RUN/metrics.jsonl"\n'
    (checkout.parents[1] / "checkout" / "scripts" / "train.sh").write_text(f"#!/usr/bin/env bash\n{set_up}")
    submit_stand_in(slurm, config)
    wait_for_training(checkout)
    signal_batch_script(cluster, signal.SIGUSR1)
    assert wait_for_end(cluster) == "COMPLETED"
    assert read_events(checkout) == ["submitted", "started", "ended", "requeued", "started", "ended"]


def test_a_start_that_had_nothing_to_do_is_not_requeued(
    slurm: ModuleType, cluster: Path, config: Path, checkout: Path
) -> None:
    (checkout.parents[1] / "checkout" / "scripts" / "train.sh").write_text("#!/usr/bin/env bash\nexit 0\n")
    submit_stand_in(slurm, config)
    assert wait_for_end(cluster) == "COMPLETED"
    assert "requeued" not in (checkout / "slurm" / "job-100.log").read_text()


def test_a_cancelled_job_stays_away(
    slurm: ModuleType, cluster: Path, config: Path, checkout: Path, capsys: pytest.CaptureFixture
) -> None:
    submit_stand_in(slurm, config)
    wait_for_training(checkout)
    subprocess.run(["scancel", "100"], check=True)
    wait_for(lambda: read_events(checkout)[-1] == "ended", "the end of the job")
    wait_for(lambda: "not requeued" in (checkout / "slurm" / "job-100.log").read_text(), "the job's last word")
    assert "=== not requeued: Slurm says CANCELLED of this job" in (checkout / "slurm" / "job-100.log").read_text()
    capsys.readouterr()
    assert slurm.main(["--status", str(checkout)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("cancelled")


def test_a_failed_job_is_listed_with_its_reason_and_resubmitted(
    slurm: ModuleType,
    cluster: Path,
    config: Path,
    checkout: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAILS", "CUDA out of memory. Tried to allocate 2.00 GiB")
    submit_stand_in(slurm, config)
    assert wait_for_end(cluster) == "FAILED"
    assert "=== training failed with exit status 1" in (checkout / "slurm" / "job-100.log").read_text()
    monkeypatch.delenv("FAILS")
    capsys.readouterr()
    assert slurm.main(["--resubmit", "failed,out-of-memory", str(checkout)]) == 0
    _, row, total, resubmitted = capsys.readouterr().out.splitlines()
    assert re.match(r"out of memory   1/3  2\.5000  00:0\d:\d\d", row), row
    assert total == "1 run: 1 out of memory"
    assert resubmitted == f"resubmitted {checkout} as job 101"
    wait_for_training(checkout)
    assert slurm.main(["--status", str(checkout)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["running", "2/3"]
    subprocess.run(["scancel", "101"], check=True)
    assert wait_for_end(cluster, "101") == "CANCELLED"


# --- what is refused before anything is submitted


def refuse(slurm: ModuleType, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line that a command line is refused with."""
    assert slurm.main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    return printed.err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nodes 0 --gpus-per-node 8", "--nodes 0: must be at least 1."),
        ("--nodes 1 --gpus-per-node 0", "--gpus-per-node 0: must be at least 1."),
        ("--nodes 1", "--gpus-per-node: missing; give a number."),
        ("--nodes 1 --gpus-per-node 1 --max-requeues -1", "--max-requeues -1: must be at least 0."),
        ("--nodes 1 --gpus-per-node 1 --time tomorrow", "--time tomorrow: must be as Slurm writes it, hours:minutes:"
         "seconds or days-hours, say 24:00:00."),
        ("--nodes 1 --gpus-per-node 1 --time 2", "--time 2: must be longer than the 120 seconds before the limit in "
         "which training saves; raise it, or lower --signal-seconds."),
        ("--nodes 1 --gpus-per-node 1 --max-restarts 1 --launcher srun", "--max-restarts needs --launcher torchrun: "
         "srun starts no process a second time."),
        ("--nodes 1 --gpus-per-node 1 --container-mounts /a:/b", "--container-mounts needs --container: without one "
         "every path is visible; leave it out."),
        ("--nodes 1 --gpus-per-node 1 --sbatch qos=high", "--sbatch 'qos=high': must be one option of sbatch such as "
         "--sbatch=--qos=high."),
    ],
)  # fmt: skip
def test_options_that_cannot_work(options: str, message: str, slurm: ModuleType, config: Path, capsys) -> None:
    assert refuse(slurm, capsys, str(config), *options.split()) == message


ONE_NODE = "--nodes 1 --gpus-per-node 4".split()


def test_a_config_is_checked_for_all_ranks(slurm: ModuleType, config: Path, cluster: Path, capsys) -> None:
    batch = ["--training.global_batch_size", "6"]
    message = refuse(slurm, capsys, str(config), *ONE_NODE, *batch)
    assert (
        "training.global_batch_size = 6: must be a multiple of local_batch_size x data-parallel ranks = 1 x 4"
        in message
    )
    assert "training.stepz" in refuse(slurm, capsys, str(config), *ONE_NODE, "--training.stepz", "6")
    assert not list(cluster.glob("job-*")), "nothing was submitted"
    assert not (config.parent / "runs").exists(), "nothing was written"


def test_a_seed_is_not_made_by_a_job(slurm: ModuleType, config: Path, cluster: Path, capsys) -> None:
    seed = "--nodes 1 --gpus-per-node 1 --checkpoint.create_seed_checkpoint".split()
    assert "make it with NPROC=1 scripts/train.sh" in refuse(slurm, capsys, str(config), *seed)
    assert not (config.parent / "runs").exists(), "nothing was written"


def test_a_config_that_is_not_there(slurm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no.toml: cannot be read" in refuse(slurm, capsys, "no.toml", *ONE_NODE)
    assert refuse(slurm, capsys, *ONE_NODE) == "one CONFIG.toml is needed and 0 are named; --help shows how."
    assert Path.cwd() == tmp_path


def test_without_slurm(
    slurm: ModuleType, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refuse(slurm, capsys, str(config), *ONE_NODE) == (
        "there is no sbatch here: run this on a login node of the cluster, or add --dry-run."
    )


def test_what_sbatch_says_is_passed_on(slurm: ModuleType, config: Path, cluster: Path, capsys) -> None:
    (cluster / "bin" / "sbatch").write_text("#!/bin/sh\necho invalid partition specified >&2\nexit 1\n")
    message = refuse(slurm, capsys, str(config), *ONE_NODE)
    assert message.startswith("sbatch refused the job: invalid partition specified (the script is ")


def test_two_jobs_in_one_folder(slurm: ModuleType, config: Path, checkout: Path, cluster: Path, capsys) -> None:
    submit_stand_in(slurm, config)
    wait_for_training(checkout)
    capsys.readouterr()
    assert refuse(slurm, capsys, str(config), *ONE_NODE) == (
        f'job.dump_folder = "{checkout}": job 100 is running there, and two jobs would write over each other; '
        "`scancel 100` first, or name another folder."
    )
    subprocess.run(["scancel", "100"], check=True)
    assert wait_for_end(cluster) == "CANCELLED"


def test_requeues_without_checkpoints_are_warned_about(slurm: ModuleType, config: Path, capsys) -> None:
    command = [str(config), *ONE_NODE, "--dry-run", "--checkpoint.enable", "false"]
    assert slurm.main(command) == 0
    assert "warning: checkpoint.enable = false: a job that is stopped and requeued begins again at step 1." in (
        capsys.readouterr().err
    )
    assert slurm.main([*command, "--max-requeues", "0"]) == 0
    assert capsys.readouterr().err == ""


# --- the batch script


def write_script(slurm: ModuleType, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[dict[str, str], str]:
    """The #SBATCH options and the whole text of the script that --dry-run prints."""
    assert slurm.main([*arguments, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    path = Path(arguments[0]).parent / "job.sh"
    path.write_text(script)
    return fake_slurm.directives(path), script


def test_the_script_asks_for_what_was_said(slurm: ModuleType, config: Path, tmp_path: Path, capsys) -> None:
    dump_folder = tmp_path / "100% new"
    options, script = write_script(
        slurm, capsys, str(config), *"--nodes 2 --gpus-per-node 8 --time 1-12 --partition gpu --account team".split(),
        *"--cpus-per-gpu 12 --signal-seconds 300 --sbatch=--qos=high --max-restarts 2".split(),
        "--job.dump_folder", str(dump_folder), "--training.steps=7",
    )  # fmt: skip
    assert options == {
        "job-name": "my-job", "partition": "gpu", "account": "team", "time": "1-12", "nodes": "2",
        "ntasks-per-node": "1", "gpus-per-node": "8", "cpus-per-task": "96", "open-mode": "append", "requeue": "",
        "output": f"{tmp_path}/100%% new/slurm/job-%j.log", "signal": "B:USR1@300", "qos": "high",
    }  # fmt: skip
    assert script.startswith("#!/usr/bin/env bash\n#SBATCH ")
    for line in (
        "STEPS=7",
        f"RUN_FOLDER='{dump_folder}'",
        "SRUN_OPTIONS=(--cpus-per-task=96)",
        "export MAX_RESTARTS=2",
    ):
        assert f"\n{line}\n" in script
    assert not dump_folder.exists(), "--dry-run writes nothing"


def test_the_script_of_the_srun_form_in_a_container(slurm: ModuleType, config: Path, tmp_path: Path, capsys) -> None:
    options, script = write_script(
        slurm, capsys, str(config), *"--nodes 2 --gpus-per-node 8 --launcher srun --max-requeues 0".split(),
        *"--container nvcr.io#nvidia/pytorch:25.09-py3 --container-mounts /data:/data --job-name other".split(),
    )  # fmt: skip
    assert (options["ntasks-per-node"], options["job-name"]) == ("8", "other")
    assert "no-requeue" in options
    assert "cpus-per-task" not in options
    run = tmp_path / "runs" / "one"
    assert f"--container-mounts={REPOSITORY}:{REPOSITORY},{run}:{run},/data:/data" in script
    assert "SRUN_OPTIONS=(--cpu-bind=none '--container-image=nvcr.io#nvidia/pytorch:25.09-py3'" in script


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("2:30", 150), ("24:00:00", 86400), ("2-00", 172800), ("1-12:30", 131400), ("1-0:0:5", 86405),
     ("1-", None), ("1:2:3:4", None), ("-5", None)],
)  # fmt: skip
def test_time_limits_as_slurm_writes_them(text: str, seconds: int | None, slurm: ModuleType) -> None:
    assert slurm.parse_time(text) == seconds


# --- the page about it


def test_the_documented_commands_are_understood(
    slurm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    page = (REPOSITORY / "docs" / "clusters.md").read_text().replace("/shared", str(tmp_path)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("python scripts/slurm.py")]
    assert len(commands) == 3
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PATH", str(tmp_path))
    for _, _, *arguments in commands:
        submits = "--nodes" in arguments
        assert slurm.main([*arguments, *(["--dry-run"] if submits else [])]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        assert ("#SBATCH --nodes=2" if submits else "no run with a submitted job") in printed.out


def test_the_documented_states_are_those_that_there_are(slurm: ModuleType) -> None:
    page = (REPOSITORY / "docs" / "clusters.md").read_text()
    rows = page.partition("| state | means |\n| --- | --- |\n")[2].partition("\n\n")[0].splitlines()
    named = {state for row in rows for state in row.split("|")[1].strip().split(", ")}
    status = slurm.slurm_status
    assert named == {*status.ACTIVE, *status.RESUBMITTABLE, status.DONE}
