"""scripts/gpu_check.sh with stand-ins for Python, torch and what it runs: parts, limits, and what it writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
LIMIT = 480  # seconds

# Stands for the environment's Python: answers questions, and writes what benchmarks write.
PYTHON = """#!{python}
import os, pathlib, sys
arguments = sys.argv[1:]
if arguments[0] == "-":
    os.environ["PYTHONPATH"] = "{modules}"
    os.execv("{python}", ["{python}", *arguments])
if arguments[0] == "-c":
    sys.exit(int("cuda" in arguments[1] and not {has_device}))
if arguments[0] == "scripts/{failing}":
    print("CUDA error: out of luck")
    sys.exit(1)
for flag, text in (("--json", '{{"ratios": {{}}}}'), ("--markdown", "| measured |"), ("--plot", "PNG")):
    if flag in arguments:
        pathlib.Path(arguments[arguments.index(flag) + 1]).write_text(text)
"""
TORCH = """
__version__ = "2.13.0+cu130"
class cuda:
    get_device_name = staticmethod(lambda: "NVIDIA H200")
    device_count = staticmethod(lambda: 1)
class version:
    cuda = "13.0"
"""
TRAIN = """#!/usr/bin/env bash
mkdir -p "${@: -1}"
echo '{"step": 1, "loss": 11.5, "tokens_per_second": 9.0, "peak_memory_gib": 2.0}' >"${@: -1}/metrics.jsonl"
"""


def check(folder: Path, *, failing: str = "nothing", has_device: bool = True) -> subprocess.CompletedProcess[str]:
    scripts, modules = folder / "checkout" / "scripts", folder / "modules"
    scripts.mkdir(parents=True)
    modules.mkdir()
    shutil.copy(SCRIPT, scripts)
    (modules / "torch.py").write_text(TORCH)
    python = folder / "python"
    python.write_text(PYTHON.format(python=sys.executable, modules=modules, failing=failing, has_device=has_device))
    (scripts / "setup_environment.sh").write_text(
        f'REPOSITORY="{scripts.parent}" PYTHON="{python}"\nsetup_environment() {{ :; }}\n'
    )
    (scripts / "train.sh").write_text(TRAIN)
    for program in (python, scripts / "train.sh"):
        program.chmod(0o755)
    return subprocess.run(
        ["bash", scripts / "gpu_check.sh", folder / "results"], capture_output=True, text=True, timeout=60, check=False
    )


def test_results_are_named_by_date_device_and_version(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 0, done.stderr
    names = sorted(file.name for file in (tmp_path / "results").iterdir())
    assert [name[11:] for name in names] == [f"nvidia-h200_torch2.13.0.{ending}" for ending in ("json", "md", "png")]
    results = json.loads((tmp_path / "results" / names[0]).read_text())
    assert list(results["parts"]) == ["tests", "benchmark_1b", "benchmark_3b", "kernels", "default_job"]
    assert all(part["passed"] for part in results["parts"].values())
    assert results["benchmark_3b"] == {"ratios": {}}
    table = (tmp_path / "results" / names[1]).read_text()
    assert table.count("| measured |") == 3
    assert f"]({names[2]})" in table
    assert "Loss 11.500 at step 1" in table


def test_a_part_that_fails_is_told_and_the_others_still_run(tmp_path: Path) -> None:
    done = check(tmp_path, failing="benchmark_kernels.py")
    assert done.returncode == 1
    table = next((tmp_path / "results").glob("*.md")).read_text()
    assert "| kernels | failed (status 1) |" in table
    assert "## Kernels\n\nUnmeasured." in table
    assert "CUDA error: out of luck" in table
    assert "| default_job | passed |" in table


def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    done = check(tmp_path, has_device=False)
    assert done.returncode == 2
    assert "torch finds no CUDA device here" in done.stderr
    assert not (tmp_path / "results").exists()


def test_limits_add_up_to_less_than_eight_minutes() -> None:
    limits = {name: int(seconds) for name, seconds in re.findall(r"run_part (\w+) (\d+) ", SCRIPT.read_text())}
    assert list(limits) == ["tests", "benchmark_1b", "benchmark_3b", "kernels", "default_job"]
    assert sum(limits.values()) < LIMIT
    inner = dict(re.findall(r"run_part (\w+) \d+ .*--limit (\d+)", SCRIPT.read_text()))
    assert inner.keys() == {"benchmark_1b", "benchmark_3b"}
    for name, seconds in inner.items():
        assert int(seconds) <= limits[name] - 15, "time to say what was measured"


@pytest.mark.parametrize("script", ["benchmark.py", "benchmark_kernels.py"])
def test_the_commands_that_it_runs_are_understood(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = __import__(Path(script).stem)
    text = SCRIPT.read_text().replace("\\\n", " ").replace('"${plot[@]}"', "")
    commands = re.findall(rf"scripts/{re.escape(script)} (.*)", text)
    assert commands
    for command in commands:
        assert module.parse_arguments(command.replace('"', "").split())
