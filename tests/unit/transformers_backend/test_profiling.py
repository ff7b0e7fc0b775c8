"""Profiler traces of the right steps in the right files, and memory snapshots that refuse gently without CUDA."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
import torch

from transformers_backend.profiling import maybe_profile, maybe_record_memory


def test_traces_are_written_once_a_cycle_and_hold_the_operators(tmp_path):
    folder = tmp_path / "traces"
    with maybe_profile(enabled=True, folder=folder, freq=3, active=1, warmup=1, rank=2, first_step=10) as profiler:
        for _ in range(7):
            torch.ones(4, 4) @ torch.ones(4, 4)
            profiler.step()
    assert sorted(path.name for path in folder.iterdir()) == ["rank2_step13.json.gz", "rank2_step16.json.gz"]
    with gzip.open(folder / "rank2_step13.json.gz", "rt") as trace:
        events = json.load(trace)["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == 1, "one active step with one product"


def test_disabled_profiler_does_nothing(tmp_path):
    with maybe_profile(enabled=False, folder=tmp_path / "traces", freq=0, active=0, warmup=0, rank=0) as profiler:
        profiler.step()
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize(("freq", "active", "warmup"), [(3, 2, 2), (3, 0, 1), (3, 1, -1)])
def test_a_cycle_that_does_not_fit_is_refused(tmp_path, freq, active, warmup):
    with (
        pytest.raises(ValueError, match=r"profiling.profile_freq = 3: must be at least profiler_warmup .*raise"),
        maybe_profile(enabled=True, folder=tmp_path, freq=freq, active=active, warmup=warmup, rank=0),
    ):
        pass


def test_memory_snapshots_need_cuda(tmp_path, caplog):
    options = {"folder": tmp_path / "snapshots", "freq": 1, "rank": 0, "device": torch.device("cpu")}
    with caplog.at_level(logging.WARNING), maybe_record_memory(enabled=True, **options) as recorder:
        recorder.step()
    assert "enable_memory_snapshot works on CUDA devices only, not on cpu" in caplog.text
    caplog.clear()
    with maybe_record_memory(enabled=False, **options) as recorder:
        recorder.step()
    assert caplog.records == []
    assert not (tmp_path / "snapshots").exists()
