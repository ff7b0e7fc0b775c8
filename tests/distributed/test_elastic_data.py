"""Data through the whole trainer: an epoch that two, then one, then four ranks read, and what a run's workers do."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.workers import WorkerPool
from tests.jobs import tiny_job
from tests.texts import documents_of
from transformers_backend import JobConfig, Trainer


def _train_and_record(config: JobConfig) -> list[int]:
    """Run a job to its end; returns the tokens of this rank's batches."""
    trainer = Trainer(config)
    tokens, original = [], trainer._next_batch

    def recording(data):
        batch = original(data)
        tokens.extend(batch["input_ids"].flatten().tolist())
        return batch

    trainer._next_batch = recording
    trainer.train()
    trainer.close()
    return tokens


def test_two_then_one_then_four_ranks_see_one_epoch(tmp_path: Path) -> None:
    """96 documents of 8 tokens are 24 blocks of 32: each rank's block holds whole documents, so all are recorded."""
    names = [f"doc-{number:03d}" for number in range(96)]
    (tmp_path / "text").mkdir()
    for name in names:
        (tmp_path / "text" / f"{name}.txt").write_text(name)
    config = tiny_job(tmp_path, "elastic", training__local_batch_size=1, checkpoint__enable=True,
                      checkpoint__interval=100, lr_scheduler__total_steps=20)  # fmt: skip
    seen, steps = [], 0
    for ranks, more in ((2, 4), (1, 8), (4, 2)):
        config.training.steps = steps = steps + more
        with WorkerPool(ranks) as pool:
            for tokens in pool.run(_train_and_record, config):
                seen += documents_of(tokens)
    assert sorted(seen) == names
    lines = [json.loads(line) for line in (tmp_path / "elastic" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15))
