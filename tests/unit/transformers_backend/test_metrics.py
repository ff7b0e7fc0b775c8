"""What a run writes: metrics.jsonl and validation.jsonl line by line, also after a resume, and the human line."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from transformers_backend.metrics import MetricsLogger, logger, peak_memory_gib

PINNED = {"step", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "peak_memory_gib", "time_s"}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock.now += seconds."""

    class Clock:
        now = 100.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(logger, "time", clock)
    return clock


def _logger(folder: Path, **changes) -> MetricsLogger:
    options = {
        "is_main": True,
        "device": torch.device("cpu"),
        "flops_per_token": 2e9,
        "peak_flops_per_device": 1e12,
        "world_size": 4,
        "steps_done": 0,
        "total_steps": 200,
    }
    return MetricsLogger(folder, **(options | changes))


def _lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / name).read_text().splitlines()]


def test_rates_are_worked_out_from_the_interval(tmp_path, clock):
    with _logger(tmp_path / "new" / "run") as logger:
        clock.now += 2.0
        logger.log(10, loss=1.5, grad_norm=0.5, lr=1e-3, tokens=800)
        clock.now += 5.0
        logger.log(20, loss=1.25, grad_norm=0.25, lr=2e-3, tokens=800, extra={"data_s": 0.5})
    first, second = _lines(tmp_path / "new" / "run")
    assert set(first) >= PINNED
    assert [first[key] for key in ("step", "loss", "grad_norm", "lr")] == [10, 1.5, 0.5, 1e-3]
    # 800 tokens in 2 s are 400 tokens/s, 100 on each of 4 devices; times 2e9 is 0.2 TFLOP/s: a fifth of the peak.
    assert first["tokens_per_second"] == pytest.approx(400)
    assert first["tokens_per_second_per_device"] == pytest.approx(100)
    assert first["tflops_per_device"] == pytest.approx(0.2)
    assert first["mfu"] == pytest.approx(0.2)
    assert second["tokens_per_second"] == pytest.approx(160)
    assert (first["time_s"], second["time_s"]) == (pytest.approx(2.0), pytest.approx(7.0))
    assert second["data_s"] == 0.5
    assert "data_s" not in first
    assert 0.01 < first["peak_memory_gib"] < 1000


def test_unknown_peak_and_non_finite_numbers_are_null(tmp_path):
    with _logger(tmp_path, peak_flops_per_device=None) as logger:
        logger.log(1, loss=float("nan"), grad_norm=float("inf"), lr=0.1, tokens=1)
    (line,) = _lines(tmp_path)
    assert (line["mfu"], line["loss"], line["grad_norm"], line["lr"]) == (None, None, None, 0.1)


def test_waiting_for_data_is_a_share_of_the_interval(tmp_path, clock):
    with _logger(tmp_path) as logger:
        clock.now += 2.0
        logger.log(10, loss=1.5, grad_norm=0.5, lr=1e-3, tokens=800, data_wait_seconds=0.5)
        logger.log_validation(10, 2.5, 600, seconds=0.0)
        clock.now += 4.0
        logger.log(20, loss=1.5, grad_norm=0.5, lr=1e-3, tokens=800, data_wait_seconds=0.1)
        logger.log(30, loss=1.5, grad_norm=0.5, lr=1e-3, tokens=800)
    assert [line["data_wait_share"] for line in _lines(tmp_path)] == [0.25, 0.025, None]


def test_seconds_of_compiling_stand_in_lines_of_intervals_that_had_some(tmp_path, caplog: pytest.LogCaptureFixture):
    with _logger(tmp_path) as logger, caplog.at_level(logging.INFO):
        for step, seconds in ((1, 12.34), (2, 0.0), (3, None)):
            logger.log(step, loss=1.5, grad_norm=0.5, lr=1e-3, tokens=800, compile_seconds=seconds)
    assert [line["compile_s"] for line in _lines(tmp_path)] == [12.34, 0.0, None]
    assert ["compiling 12.3 s" in line for line in caplog.messages] == [True, False, False]
    assert "compiling" not in "".join(caplog.messages[1:])


def test_lines_reach_the_disk_at_once(tmp_path):
    killed = _logger(tmp_path)
    killed.log(1, loss=3.0, grad_norm=1.0, lr=0.1, tokens=1)
    assert [line["step"] for line in _lines(tmp_path)] == [1], "before any close"
    killed.close()
    killed.close()


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path, caplog):
    with _logger(tmp_path) as killed:
        for step in (1, 2, 3, 4):
            killed.log(step, loss=step, grad_norm=1.0, lr=0.1, tokens=1)
        for step in (2, 4):
            killed.log_validation(step, step, 10)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')  # cut short by the kill
    with caplog.at_level(logging.INFO), _logger(tmp_path, steps_done=2) as resumed:
        assert [line["step"] for line in _lines(tmp_path)] == [1, 2]
        resumed.log(3, loss=30, grad_norm=1.0, lr=0.1, tokens=1)
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [(1, 1), (2, 2), (3, 30)]
    assert [line["step"] for line in _lines(tmp_path, "validation.jsonl")] == [2]
    assert "metrics.jsonl: 3 lines after step 2 are dropped" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "validation.jsonl"}


def test_a_resume_leaves_a_file_that_ends_with_its_checkpoint_alone(tmp_path):
    with _logger(tmp_path) as first:
        first.log(2, loss=3.0, grad_norm=1.0, lr=0.1, tokens=1)
    path = tmp_path / "metrics.jsonl"
    before = path.stat()
    _logger(tmp_path, steps_done=2).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_new_run_keeps_the_earlier_ones_files_under_another_name(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        for loss in (1.0, 2.0, 3.0):
            with _logger(tmp_path) as run:
                run.log(1, loss=loss, grad_norm=1.0, lr=0.1, tokens=1)
    losses = {path.name: json.loads(path.read_text())["loss"] for path in tmp_path.iterdir()}
    assert losses == {"metrics.jsonl.1": 1.0, "metrics.jsonl.2": 2.0, "metrics.jsonl": 3.0}
    assert "metrics.jsonl is of an earlier run and kept as metrics.jsonl.2" in caplog.text


def test_no_file_without_a_line(tmp_path):
    with _logger(tmp_path) as logger:
        logger.log(1, loss=3.0, grad_norm=1.0, lr=0.1, tokens=1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO), _logger(tmp_path / "run", is_main=False) as logger:
        logger.log(1, loss=3.0, grad_norm=1.0, lr=0.1, tokens=1)
        logger.log_validation(1, 3.0, 10)
    assert not (tmp_path / "run").exists()
    assert caplog.records == []


def test_validation_goes_to_its_own_file_and_not_into_the_throughput(tmp_path, clock):
    with _logger(tmp_path) as logger:
        clock.now += 1.0 + 3.0
        logger.log_validation(10, 2.5, 600, seconds=3.0)
        clock.now += 1.0
        logger.log(10, loss=1.5, grad_norm=0.5, lr=1e-3, tokens=800)
        logger.log_validation(20, float("nan"), 600)
    timed, untimed = _lines(tmp_path, "validation.jsonl")
    assert timed == {"step": 10, "validation_loss": 2.5, "tokens": 600, "tokens_per_second": 200.0, "time_s": 4.0}
    assert (untimed["validation_loss"], untimed["tokens_per_second"]) == (None, None)
    (line,) = _lines(tmp_path)
    assert line["tokens_per_second"] == pytest.approx(400), "800 tokens in the 2 s that were not validation"
    assert line["time_s"] == pytest.approx(5.0)


def test_human_line(tmp_path, clock, caplog):
    with caplog.at_level(logging.INFO), _logger(tmp_path) as logger:
        clock.now += 1.0
        logger.log(10, loss=1.5, grad_norm=0.5, lr=1e-3, tokens=123456, data_wait_seconds=0.015)
        logger.log(200, loss=11.25, grad_norm=10.5, lr=1e-3, tokens=1)
        logger.log_validation(200, 2.5, 6000)
    first, second, validation = (record.getMessage() for record in caplog.records)
    assert first.startswith("step      10  loss   1.5000  grad norm    0.500  lr 1.00e-03       123,456 tokens/s")
    assert "TFLOP/s/device  mfu" in first
    # 10 steps took 1 s, so the 190 that are left take 19 s.
    assert re.search(r"  peak +\d+\.\d\d GiB  data wait   1\.5%  left 0:00:19$", first)
    assert re.search(r"GiB  left 0:00:00$", second), "the last step, and a wait that nobody measured"
    assert first.index("lr") == second.index("lr"), "columns are aligned"
    assert validation == "step     200  validation loss   2.5000  over 6,000 tokens"


def test_human_line_without_a_known_peak(tmp_path, caplog):
    with caplog.at_level(logging.INFO), _logger(tmp_path, peak_flops_per_device=None) as logger:
        logger.log(1, loss=float("nan"), grad_norm=float("inf"), lr=1e-3, tokens=5)
    assert "mfu" not in caplog.records[0].getMessage()
    assert "loss      nan" in caplog.records[0].getMessage()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with Linux's own figure")
def test_peak_memory_on_the_cpu_is_the_peak_resident_set():
    block = torch.ones(2**26)  # 256 MiB of float32, freed before asking
    assert block.nbytes == 2**28
    del block
    status = Path("/proc/self/status").read_text()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(kib / 2**20, rel=0.02)
