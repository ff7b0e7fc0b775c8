"""The tiny job that trainer tests start from: a Llama of two layers on the text in `folder`/text, in fp32."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from transformers_backend import JobConfig

SEQUENCE = 32


def tiny_job(folder: str | Path, name: str, **changes) -> JobConfig:
    """A deterministic job that writes to `folder`/`name`; changes are named section__key."""
    config = JobConfig()
    config.job.dump_folder = f"{folder}/{name}"
    config.model.hf_assets_path = "byt5"
    config.hf_transformers.model_type = "llama"
    config.hf_transformers.config_overrides = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config.training.dataset_path = f"{folder}/text"
    config.training.seq_len = SEQUENCE
    config.training.local_batch_size = 2
    config.training.steps = 6
    config.training.mixed_precision_param = "float32"
    config.optimizer.lr = 1e-2
    config.lr_scheduler.warmup_steps = 2
    config.metrics.log_freq = 1
    config.debug.deterministic = True
    for key, value in changes.items():
        section, field = key.split("__")
        setattr(getattr(config, section), field, value)
    return config


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    """Undo what a trainer sets up for its process: log handlers and levels, deterministic algorithms."""
    names = [None, "transformers_backend", "parallelize", "__main__", "torch.distributed.tensor._redistribute"]
    levels, handlers = [logging.getLogger(name).level for name in names], list(logging.getLogger().handlers)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        logging.getLogger().handlers[:] = handlers
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
