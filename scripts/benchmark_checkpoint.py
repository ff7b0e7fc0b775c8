"""How long a save holds training: held until written, and beside training.

    python scripts/benchmark_checkpoint.py [--hidden_size 896] [--folder /tmp] [--saves 3]

Trains a Llama of 8 layers (104 million parameters by default, so checkpoints of 1.2 GB) on one process and times three
things: a step, the call of `save`, and the wait before the optimizer step for the copy of the state to be complete. The
last two together are the stall; the bar is 10 % of what a held save takes. Steps beside a write are slower where they
share cores, memory bandwidth or a disk with it: that is shown too.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

from transformers_backend import JobConfig, Trainer


def make_job(folder: str, hidden_size: int, mode: str) -> JobConfig:
    config = JobConfig()
    config.job.dump_folder = f"{folder}/{mode}"
    config.model.hf_assets_path = "byt5"
    config.hf_transformers.model_type = "llama"
    config.hf_transformers.config_overrides = {
        "vocab_size": 384, "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    config.training.local_batch_size, config.training.seq_len = 2, 128
    config.checkpoint.enable = True
    config.checkpoint.keep_latest_k = 2
    config.checkpoint.async_mode = mode
    return config


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(config: JobConfig, saves: int) -> dict[str, float]:
    """Median seconds of a step alone, of the stall by a save, of a step beside a write, and of the whole write."""
    trainer = Trainer(config)
    logging.getLogger("transformers_backend").setLevel(logging.WARNING)
    trainer.train_step()
    alone, stalls, beside, writes = [], [], [], []
    wait_until_staged = trainer.checkpointer.wait_until_staged
    waits: list[float] = []
    trainer.checkpointer.wait_until_staged = lambda: waits.append(timed(wait_until_staged))
    trainer.checkpointer.save(trainer.step)  # the first one allocates the copy
    trainer.checkpointer.wait()
    for _ in range(saves):
        alone += [timed(trainer.train_step) for _ in range(3)]
        start, before = time.perf_counter(), len(waits)
        call = timed(lambda: trainer.checkpointer.save(trainer.step))
        step = timed(trainer.train_step)
        stalls.append(call + waits[before])
        if config.checkpoint.async_mode != "disabled":
            beside.append(step - waits[before])
        trainer.checkpointer.wait()
        writes.append(time.perf_counter() - start if beside else call)
    trainer.close()
    numbers = {"step_alone": alone, "stall": stalls, "step_beside_a_write": beside or alone, "write": writes}
    return {name: statistics.median(values) for name, values in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=896)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where checkpoints go for the time being")
    parser.add_argument("--saves", type=int, default=3)
    options = parser.parse_args()
    results = {}
    for mode in ("disabled", "async"):
        with tempfile.TemporaryDirectory(dir=Path(options.folder)) as folder:
            results[mode] = measure(make_job(folder, options.hidden_size, mode), options.saves)
        print(mode, {name: round(value, 3) for name, value in results[mode].items()}, "seconds", flush=True)
    share = results["async"]["stall"] / results["disabled"]["stall"]
    print(f"a save beside training stalls for {share:.1%} of a held one")


if __name__ == "__main__":
    main()
