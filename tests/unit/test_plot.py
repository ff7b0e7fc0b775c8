"""scripts/plot.py: what it reads of a run, a picture of it, and what it says where there is nothing to draw."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot.py"

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    specification = importlib.util.spec_from_file_location("plot", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "plot", module)  # where its dataclasses look themselves up
        specification.loader.exec_module(module)
    return module


def _line(step: int, **changes) -> dict:
    figures = {"loss": 2 + 4 / step, "tokens_per_second": 1000.0 + step, "peak_memory_gib": 1.5}
    return {"step": step, **figures, **changes}


def _write(folder: Path, lines: list[dict], *, ending: str = "", validation: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + ending)
    if validation is not None:
        (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validation))
    return folder


def _pixels(picture: Path) -> tuple[int, int]:
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


def _colours(picture: Path) -> set[tuple[int, int, int]]:
    from matplotlib.image import imread

    return {tuple(round(float(part) * 255) for part in pixel[:3]) for row in imread(picture)[::3] for pixel in row[::3]}


def test_the_command_draws_several_runs_each_in_its_colour(tmp_path: Path):
    losses = [{"step": step, "validation_loss": 2.5} for step in (10, 20)]
    one = _write(tmp_path / "one", [_line(step) for step in range(1, 40)], validation=losses)
    other = _write(tmp_path / "other", [_line(step, loss=3.0) for step in range(1, 30)])
    picture = tmp_path / "new" / "both.png"
    ran = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, one, other, "--output", picture], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{picture}\n", "")
    assert _pixels(picture) == (1500, 1500)
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= _colours(picture)


def test_what_was_not_recorded_is_left_out(plot, tmp_path: Path, capsys):
    lines = [_line(step, loss=None if step == 3 else 2.0) for step in range(1, 6)]
    for line in lines:
        del line["peak_memory_gib"]
    run = _write(tmp_path / "run", lines)
    assert plot.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'plot.png'}\n"
    assert _pixels(run / "plot.png") == (1500, 1500)
    steps, losses = plot.series(plot.read_run(run, "run").lines, "loss")
    assert (steps[2], math.isnan(losses[2])) == (3, True)


def test_of_a_step_that_occurs_twice_the_last_line_counts(plot, tmp_path: Path, capsys):
    run = _write(tmp_path / "run", [_line(1), _line(2), _line(3, loss=9), _line(2, loss=7), _line(3)], ending='{"st')
    lines = plot.read_run(run, "run").lines
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 6.0), (2, 7), (3, 2 + 4 / 3)]
    assert "metrics.jsonl: 1 damaged lines are left out" in capsys.readouterr().err


def test_smoothing_does_not_lag_and_keeps_gaps(plot):
    assert plot.smoothed([6.0, 3.0, 0.0, 3.0, 6.0], 3, statistics.fmean) == [6.0, 3.0, 2.0, 3.0, 4.5]
    values = plot.smoothed([1.0, math.nan, 3.0, 100.0, 3.0], 3, statistics.median)
    assert math.isnan(values[1])
    assert values[2:] == [51.5, 3.0, 51.5]


def test_names_tell_runs_apart(plot, tmp_path: Path):
    assert plot.names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert plot.names_of([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert plot.names_of([tmp_path / "a", tmp_path / "a"]) == ["a", "a"]


def test_what_cannot_be_drawn_is_said_in_one_line(plot, tmp_path: Path, capsys):
    def refusal(*arguments: object) -> str:
        assert plot.main([str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    _write(tmp_path / "runs" / "mine", [_line(1)])
    empty = _write(tmp_path / "empty", [])
    assert refusal(tmp_path / "none").startswith(f"error: {tmp_path / 'none'}: no such folder. Name the folder that")
    assert "no metrics.jsonl in this folder; there is one in mine." in refusal(tmp_path / "runs")
    (tmp_path / "young").mkdir()
    assert "no metrics.jsonl in this folder; it appears with a run's first" in refusal(tmp_path / "young")
    assert "metrics.jsonl: holds no step yet." in refusal(empty)
    assert "--output a.jpg: must end in .png." in refusal(tmp_path / "runs" / "mine", "--output", "a.jpg")
    mistyped = tmp_path / "pictues" / "deep" / "a.png"
    assert f"there is no folder {tmp_path / 'pictues'}." in refusal(tmp_path / "runs" / "mine", "--output", mistyped)
    assert not (tmp_path / "pictues").exists()
    assert "--smooth 0: must be at least 1" in refusal(tmp_path / "runs" / "mine", "--smooth", 0)


def test_a_missing_matplotlib_is_named(plot, tmp_path: Path, capsys, monkeypatch):
    run = _write(tmp_path / "run", [_line(1)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.main([str(run)]) == 2
    assert "matplotlib package, which is not installed: pip install matplotlib" in capsys.readouterr().err
