"""What a run writes: metrics.jsonl and validation.jsonl line by line, the log format, TensorBoard."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch

from transformers_backend import metrics
from transformers_backend.metrics import MetricsLogger, peak_memory_gib, setup_logging

PINNED = {"step", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "peak_memory_gib", "time_s"}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock.now += seconds."""

    class Clock:
        now = 100.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


@pytest.fixture
def clean_logging():
    names = ("transformers_backend", "parallelize", "__main__")
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in names}
    root_level, handlers = root.level, list(root.handlers)
    yield
    root.handlers[:] = handlers
    root.setLevel(root_level)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _logger(folder: Path, **changes) -> MetricsLogger:
    options = {
        "is_main": True,
        "device": torch.device("cpu"),
        "flops_per_token": 2e9,
        "peak_flops_per_device": 1e12,
        "world_size": 4,
        "tensorboard_folder": None,
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


def test_lines_reach_the_disk_at_once_and_a_resumed_run_appends(tmp_path):
    killed = _logger(tmp_path)
    killed.log(1, loss=3.0, grad_norm=1.0, lr=0.1, tokens=1)
    assert [line["step"] for line in _lines(tmp_path)] == [1], "before any close"
    with _logger(tmp_path) as resumed:
        resumed.log(2, loss=2.0, grad_norm=1.0, lr=0.1, tokens=1)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]
    killed.close()
    killed.close()


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
        logger.log(10, loss=1.5, grad_norm=0.5, lr=1e-3, tokens=123456)
        logger.log(200, loss=11.25, grad_norm=10.5, lr=1e-3, tokens=1)
        logger.log_validation(200, 2.5, 6000)
    first, second, validation = (record.getMessage() for record in caplog.records)
    assert first.startswith("step      10  loss   1.5000  grad norm    0.500  lr 1.00e-03       123,456 tokens/s")
    assert "TFLOP/s/device  mfu" in first
    assert re.search(r"peak +\d+\.\d\d GiB$", first)
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


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with _logger(tmp_path, tensorboard_folder=tmp_path / "tb", peak_flops_per_device=None) as logger:
        logger.log(10, loss=1.5, grad_norm=0.5, lr=1e-3, tokens=800)
        logger.log_validation(10, 2.5, 600)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("validation/validation_loss")] == [(10, 2.5)]
    assert "train/mfu" not in events.Tags()["scalars"]


def test_missing_tensorboard_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"metrics.enable_tensorboard = true needs.*pip install tensorboard"):
        _logger(tmp_path, tensorboard_folder=tmp_path / "tb")


@pytest.mark.usefixtures("clean_logging")
def test_log_format_and_levels_by_rank(capsys):
    def speak() -> list[str]:
        logging.getLogger("transformers_backend.trainer").info("training starts")
        logging.getLogger("parallelize.fsdp").warning("slow link")
        logging.getLogger("some_library").info("chatter")
        return capsys.readouterr().err.splitlines()

    setup_logging(0)
    setup_logging(0)  # a second call does not double the lines
    lines = speak()
    assert len(lines) == 2
    assert re.fullmatch(r"\[rank0\] \d\d:\d\d:\d\d training starts", lines[0])
    setup_logging(3)
    lines = speak()
    assert len(lines) == 1
    assert re.fullmatch(r"\[rank3\] \d\d:\d\d:\d\d slow link", lines[0])
