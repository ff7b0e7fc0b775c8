"""The SkyPilot task and the TorchX component: what can be checked of them without a cluster, and with TorchX where it
is installed. Their commands are really run, with a stand-in for Python that records how training is started."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from transformers_backend import load_job_config

REPOSITORY = Path(__file__).parents[2]
CLUSTERS = REPOSITORY / "scripts" / "clusters"
STARTED = (
    r"-m \S+ --nproc-per-node 8 --nnodes 2 --max-restarts (\d+) --rdzv-backend c10d "
    r"--rdzv-endpoint (\S+) --rdzv-id (\S+) -m transformers_backend.train (.*)"
)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stand-in for Python that has everything installed and prints how a module is started."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/usr/bin/env bash\nif [[ "$1" == -m ]]; then printf "%q " "$@"; fi\n')
    stand_in.chmod(0o755)
    return stand_in


def run(command: list[str], python: Path, **variables: str) -> tuple[str, ...]:
    """Run a node's command in the checkout; returns restarts, meeting point, id of the run, and train's arguments."""
    ran = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    started = re.fullmatch(STARTED, ran.stdout.strip())
    assert started, ran.stdout
    return started.groups()


# --- SkyPilot


def test_skypilot_starts_training_on_every_node(python: Path) -> None:
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert task["workdir"] == "."
    assert re.fullmatch(r"\w+:8", task["resources"]["accelerators"])
    # What SkyPilot documents that it sets on each node.
    variables = {
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "sky-managed-1", "SKYPILOT_NODE_RANK": "1",
    }  # fmt: skip
    environment = {**task["envs"], **variables, "ARGUMENTS": "--training.steps 1000"}
    _, endpoint, run_id, arguments = run(["bash", "-euc", task["run"]], python, **environment)
    assert (endpoint, run_id) == ("10.0.0.7:29500", "sky-managed-1")
    words = shlex.split(arguments)
    assert words[1:3] == ["--job.dump_folder", "/outputs/qwen3_8b"]
    config = load_job_config([str(REPOSITORY / words[0]), *words[1:]])
    assert (config.checkpoint.enable, config.training.steps) == (True, 1000)
    (volume,) = task["volumes"]
    assert config.job.dump_folder.startswith(f"{volume}/"), "all nodes see the results"
    assert task["envs"]["HF_HOME"].startswith(f"{volume}/")


def test_skypilot_sets_up_every_node(python: Path) -> None:
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    ran = subprocess.run(
        ["bash", "-euc", task["setup"]], cwd=REPOSITORY, env={"PATH": os.environ["PATH"], "PYTHON": str(python)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert f"set-up: {python}" in ran.stderr


# --- TorchX


def stand_in_for_torchx() -> dict[str, ModuleType]:
    """The few names that the component uses, as TorchX 0.7 defines them."""

    def record(**fields: Any) -> SimpleNamespace:
        return SimpleNamespace(**fields)

    specs = ModuleType("torchx.specs")
    specs.AppDef = specs.Role = specs.Resource = record
    specs.RetryPolicy = SimpleNamespace(APPLICATION="APPLICATION")
    specs.macros = SimpleNamespace(rank0_env="${rank0_env}", app_id="${app_id}")
    specs.parse_mounts = list
    torchx = ModuleType("torchx")
    torchx.specs = specs
    return {"torchx": torchx, "torchx.specs": specs}


@pytest.fixture(params=["stand-in", "torchx"])
def component(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "torchx":
        pytest.importorskip("torchx", reason="torchx is not installed")
    else:
        for name, module in stand_in_for_torchx().items():
            monkeypatch.setitem(sys.modules, name, module)
    specification = importlib.util.spec_from_file_location("torchx_job", CLUSTERS / "torchx_job.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.train


def test_torchx_starts_training_on_every_node(component: Any, python: Path) -> None:
    arguments = ["--job.dump_folder", "/outputs/a b", "--checkpoint.enable"]
    app = component(
        *arguments, config="train_configs/qwen3_8b.toml", image="trainer:1", nodes=2, checkout=str(REPOSITORY),
        env={"HF_HUB_OFFLINE": "1"}, max_restarts=3,
    )  # fmt: skip
    (role,) = app.roles
    assert (role.num_replicas, role.resource.gpu, role.entrypoint) == (2, 8, "bash")
    assert role.env["HF_HUB_OFFLINE"] == "1"
    for macro in ("TORCHX_RANK0_HOST", "VC_TRAINER_0_HOSTS"):  # on the first node of Kubernetes, and on the others
        values = {"rank0_env": macro, "app_id": "trainer-xyz"}
        variables = {key: string.Template(value).safe_substitute(values) for key, value in role.env.items()}
        command = [role.entrypoint, *(string.Template(word).safe_substitute(values) for word in role.args)]
        restarts, endpoint, run_id, words = run(command, python, **variables, **{macro: "first-node"})
        assert (restarts, endpoint, run_id) == ("3", "first-node:29500", "trainer-xyz")
        assert shlex.split(words) == [str(REPOSITORY / "train_configs/qwen3_8b.toml"), *arguments]


def test_torchx_understands_the_signature() -> None:
    """Its own checker (0.7) reads the source: names, Optional, Dict and List as types, all arguments described."""
    tree = ast.parse((CLUSTERS / "torchx_job.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    arguments = [*function.args.kwonlyargs, function.args.vararg]
    described = re.findall(r"^    (\w+): ", ast.get_docstring(function).partition("Args:\n")[2], re.MULTILINE)
    assert sorted(argument.arg for argument in arguments) == sorted(described)
    for argument in arguments:
        assert re.fullmatch(r"\w+|Optional\[(List|Dict)\[[\w, ]+\]\]", ast.unparse(argument.annotation)), argument.arg
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)


def test_torchx_itself_accepts_the_component() -> None:
    linter = pytest.importorskip("torchx.specs.file_linter", reason="torchx is not installed")
    assert linter.validate(str(CLUSTERS / "torchx_job.py"), "train") == []
