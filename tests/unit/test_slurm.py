"""scripts/slurm.py: what it refuses, the script that it writes, jobs that really run under a stand-in for Slurm
(tests/fake_slurm.py), stops and requeues, and what the listing makes of it all."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests import fake_slurm

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts"
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def slurm() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        specification = importlib.util.spec_from_file_location("slurm", SCRIPTS / "slurm.py")
        module = importlib.util.module_from_spec(specification)
        sys.modules["slurm"] = module  # dataclasses look their module up
        specification.loader.exec_module(module)
    return module


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
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stand-in for Slurm whose commands are on PATH."""
    monkeypatch.setenv("PATH", f"{fake_slurm.install(tmp_path / 'slurm')}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "slurm"


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


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_nodes_train_to_the_end(
    launcher: str, slurm: ModuleType, cluster: Path, config: Path, tmp_path: Path, capsys
) -> None:
    """Real processes, one on each of two nodes that are both this machine."""
    run = tmp_path / "runs" / "one"
    two_nodes = "--nodes 2 --gpus-per-node 1 --launcher".split()
    assert slurm.main([config.name, *two_nodes, launcher, "--training.steps", "2"]) == 0
    state = wait_for_end(cluster)
    log = (run / "slurm" / "job-100.log").read_text()
    assert state == "COMPLETED", log
    assert "2 x cpu, mesh dp_shard 2" in log, "both nodes train together"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert sorted(read_events(run)) == ["ended", "started", "submitted"]
    capsys.readouterr()
    assert slurm.main(["--status", "runs"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["done", "2/2"]
