"""Where a run starts from: its own checkpoint, else another run's or a Hugging Face folder, else the beginning."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

from parallelize.distributed import first_rank_first
from transformers_backend.checkpoint.checkpointer import Checkpointer
from transformers_backend.checkpoint.places import is_remote, open_storage
from transformers_backend.model import HFTransformerModel
from transformers_backend.weights import load_hf_weights, resolve_folder

logger = logging.getLogger(__name__)


def start(
    checkpointer: Checkpointer,
    model: HFTransformerModel,
    *,
    load_step: int,
    exclude: Collection[str],
    initial_load_path: str | None,
    initial_load_in_hf: bool,
    initial_load_model_only: bool,
) -> int:
    """Restore what the keys of [checkpoint] say, on every rank, and return the number of steps done."""
    step = checkpointer.load(load_step, exclude=exclude)
    if step is not None:
        if initial_load_path:
            logger.info("checkpoint.initial_load_path is not read: this run has checkpoints of its own.")
        return step
    if not initial_load_path:
        return 0
    if initial_load_in_hf:
        with first_rank_first():
            folder = resolve_folder(os.path.expanduser(initial_load_path), None)  # downloads a hub id
        load_hf_weights(model.hf_model, model.blueprint, str(folder))
        logger.info("started from %s", folder)
        return 0
    if not is_remote(initial_load_path):
        initial_load_path = str(Path(initial_load_path).expanduser())
    parent, _, name = initial_load_path.rstrip("/").rpartition("/")
    storage = open_storage(parent or ".", Path.cwd(), key="checkpoint.initial_load_path")
    return checkpointer.load_initial(storage, name, model_only=initial_load_model_only, exclude=exclude)
