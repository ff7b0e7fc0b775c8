"""scripts/benchmark_loader.py: what it prints, and that the loader is no bottleneck of the default run, measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts import benchmark_loader
from tests.jobs import restored_process
from tests.texts import write_text_files
from transformers_backend import Trainer, load_job_config

DEFAULT_RUN = Path(__file__).parents[2] / "train_configs" / "default.toml"


def training_speed(dump_folder: Path) -> float:
    """Tokens/s of the default run's fastest step of a few, on this machine as it is now."""
    options = {
        "job.dump_folder": str(dump_folder), "job.sample_prompt": "", "training.steps": "3", "metrics.log_freq": "1",
        "lr_scheduler.warmup_steps": "1", "checkpoint.enable": "false",
    }  # fmt: skip
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    with restored_process():
        trainer = Trainer(load_job_config([str(DEFAULT_RUN), *arguments]))
        try:
            trainer.train()
        finally:
            trainer.close()
    lines = (dump_folder / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line)["tokens_per_second"] for line in lines)


@pytest.mark.alone
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is asked is about training on a CPU")
def test_the_default_runs_data_come_twenty_times_as_fast_as_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = training_speed(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark_loader.py", "--", "--seconds", "0.5"])
    for _ in range(20):  # the best of several short looks, as other work may share the cores
        capsys.readouterr()
        benchmark_loader.main()
        report = json.loads(capsys.readouterr().out)
        if report["tokens_per_second"] >= 20 * speed:
            break
    assert report["tokens_per_second"] >= 20 * speed
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
