"""scripts/benchmark_loader.py: what it prints, and that the loader is no bottleneck of the default run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import benchmark_loader
from tests.texts import write_text_files

# What the default run trains at on a CPU (README), in tokens/s.
DEFAULT_RUN = 9_300


def test_the_default_runs_data_come_twenty_times_as_fast_as_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_loader.py", "--", "--seconds", "0.5"])
    benchmark_loader.main()
    report = json.loads(capsys.readouterr().out)
    assert report["tokens_per_second"] >= 20 * DEFAULT_RUN
    assert (report["local_batch_size"], report["seq_len"], report["num_workers"]) == (8, 256, 0)


def test_options_are_those_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_text_files(tmp_path / "text", ["some text " * 100] * 9)
    options = ["--training.dataset_path", str(path), "--training.num_workers", "1", "--training.seq_len", "64"]
    monkeypatch.setattr(sys, "argv", ["benchmark_loader.py", *options, "--", "--seconds", "0.1"])
    benchmark_loader.main()
    report = json.loads(capsys.readouterr().out)
    assert (report["seq_len"], report["num_workers"]) == (64, 1)
    assert report["batches"] > 0
