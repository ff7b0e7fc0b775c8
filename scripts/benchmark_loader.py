"""The loader of a job alone: tokens a second that its data, tokenizer and workers give, without a model.

    python scripts/benchmark_loader.py [CONFIG.toml] [--section.key value ...] [-- --seconds 5]

Prints one JSON object. The data are those of `[training]` on one data rank; `--training.num_workers` and
`--training.prefetch_factor` are what there is to turn. Compare with the tokens/s of a step in the run's log: a loader
that is faster is waited for only in the first step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

from transformers_backend.assemble import find_tokenizer
from transformers_backend.data import build_batches, configured_sources
from transformers_backend.job_config import JobConfig, load_job_config


def measure(config: JobConfig, seconds: float) -> dict[str, float | int | None]:
    """Read batches for `seconds` after the first; returns tokens/s, the first batch's time, and what was measured."""
    training = config.training
    tokenizer = find_tokenizer(config)
    sources, stages = configured_sources(training)
    start = time.perf_counter()
    batches = build_batches(
        sources,
        stages,
        tokenizer=tokenizer,
        vocabulary_size=len(tokenizer),
        seq_len=training.seq_len,
        batch_size=training.local_batch_size,
        data_rank=0,
        data_world_size=1,
        seed=config.debug.seed,
        packing=training.packing,
        num_workers=training.num_workers,
        prefetch_factor=training.prefetch_factor,
    )
    try:
        next(batches)
        first = time.perf_counter() - start
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            next(batches)
            count += 1
    finally:
        batches.close()
    return {
        "tokens_per_second": round(count * training.local_batch_size * training.seq_len / elapsed),
        "first_batch_s": round(first, 3),
        "batches": count,
        "local_batch_size": training.local_batch_size,
        "seq_len": training.seq_len,
        "num_workers": batches.feeds.num_workers,
        "seconds": round(elapsed, 2),
    }


def main() -> None:
    arguments = sys.argv[1:]
    own = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = argparse.ArgumentParser(prog="benchmark_loader.py [CONFIG.toml] [--section.key value ...] --")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure for (default 5)")
    settings = parser.parse_args(own)
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    print(json.dumps(measure(load_job_config(arguments), settings.seconds)))


if __name__ == "__main__":
    main()
