"""What two ranks report: placements, one voice, and traces of the chosen ranks only."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from tests.distributed.workers import Messages, WorkerPool
from tests.jobs import tiny_job
from transformers_backend import JobConfig, Trainer
from transformers_backend.run_summary import estimate_run_memory, parameter_table


def _train(config: JobConfig) -> tuple[list[str], str]:
    """Run a job; returns what this rank's loggers said, and what came to its stderr."""
    printed = io.StringIO()
    with Messages("transformers_backend") as messages, contextlib.redirect_stderr(printed):
        trainer = Trainer(config)
        trainer.train()
        trainer.close()
    return messages.texts, printed.getvalue()


def test_two_ranks_speak_with_one_voice_of_their_shards(two: WorkerPool, folder: str):
    config = tiny_job(folder, "run", training__steps=3, lr_scheduler__warmup_steps=9, metrics__log_freq=3)
    (said, printed), (_, printed_by_other) = two.run(_train, config)
    (table,) = [text for text in said if text.startswith("the run:\n")]
    rows = [line.split() for line in table.splitlines()]
    assert ["parameters", "kind", "dp_shard", "dtype", "tensors", "numbers", "MiB", "a", "rank"] in rows
    assert ["attention", "Shard(0)", "float32", "8", "6,144", "0.01"] in rows, "half of 0.02 MiB"
    assert "mesh        2 x cpu, mesh dp_shard 2; weights kept in float32, computation in float32" in table
    assert printed.count("lr_scheduler.warmup_steps = 9") == 1
    assert printed.count("  loss ") == 2, "the first and the last step"
    assert printed_by_other == ""


def _measured_and_estimated_peak(config: JobConfig) -> tuple[float, float]:
    """Bytes that the second step of a job allocates at most on this rank, and the estimate of that."""
    trainer = Trainer(config)
    trainer.train_step()  # which makes the optimizer's state
    tracker = MemTracker()
    tracker.track_external(trainer.model.hf_model, *trainer.optimizers)
    with tracker:
        trainer.train_step()
    estimate = estimate_run_memory(
        config, trainer.model, optimizers=trainer.optimizers,
        computes_in=getattr(torch, config.training.mixed_precision_param), accumulates=False,
    )  # fmt: skip
    trainer.close()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], estimate.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_expected_memory_is_what_a_sharded_step_allocates(two: WorkerPool, folder: str, dtype: str):
    config = tiny_job(folder, "run", training__seq_len=64, training__mixed_precision_param=dtype)
    config.hf_transformers.config_overrides |= {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
    for measured, estimate in two.run(_measured_and_estimated_peak, config):
        assert estimate == pytest.approx(measured, rel=0.2)


def _table(config: JobConfig) -> list[str]:
    trainer = Trainer(config)
    table = parameter_table(trainer.model)
    trainer.close()
    return table


def test_replicas_of_shards_have_a_column_for_each_mesh_dimension(two: WorkerPool, folder: str):
    config = tiny_job(folder, "run", parallelism__data_parallel_replicate_degree=2)
    header, first, *_ = (line.split() for line in two.run(_table, config)[0])
    assert header[:4] == ["kind", "dp_replicate", "dp_shard", "dtype"]
    assert first == ["embedding", "Replicate", "Shard(0)", "float32", "1", "12,288", "0.05"], "a replica has it all"


@pytest.mark.parametrize(("max_ranks", "ranks"), [(1, {"rank0"}), (-1, {"rank0", "rank1"})])
def test_traces_are_of_the_first_ranks_only(two: WorkerPool, folder: str, max_ranks: int, ranks: set[str]):
    config = tiny_job(
        folder, "run", training__steps=2, profiling__enable_profiling=True, profiling__profile_freq=2,
        profiling__profiler_warmup=1, profiling__max_ranks=max_ranks,
    )  # fmt: skip
    two.run(_train, config)
    traces = (Path(config.job.dump_folder) / "profile_traces").iterdir()
    assert {path.name for path in traces} == {f"{rank}_step2.json.gz" for rank in ranks}
