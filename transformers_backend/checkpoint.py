"""Checkpoints to resume from: model, optimizers, schedulers, data position, random state and step.

Written with torch.distributed.checkpoint, every rank its own shards, into `<folder>/step-N.tmp`, which is renamed to
`<folder>/step-N` when all ranks are done: a folder under its final name is whole. For a folder that Transformers
loads, see `weights/export.py`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from parallelize.distributed import from_first_rank
from transformers_backend.data import PackedBatches
from transformers_backend.folders import replace_folder
from transformers_backend.model import HFTransformerModel
from transformers_backend.weights import named_tensors

logger = logging.getLogger(__name__)

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_STEP_FOLDER = re.compile(r"step-(\d+)")


class Checkpointer:
    """Saves and restores one run; every rank calls every method."""

    def __init__(
        self,
        folder: Path,
        *,
        model: HFTransformerModel,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[torch.optim.lr_scheduler.LambdaLR],
        data: PackedBatches,
        data_rank: int,
        keep_latest_k: int,
    ) -> None:
        self.folder = folder
        self.keep_latest_k = keep_latest_k
        self._model, self._data, self._data_rank = model, data, data_rank
        self._optimizers, self._schedulers = list(optimizers), list(schedulers)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` (optimizer steps done), then delete older ones beyond `keep_latest_k`."""
        self._write(self._state(step), self.folder / f"step-{step}")
        if dist.get_rank() == 0:
            self._delete_old()

    def save_model(self, step: int) -> None:
        """Write the weights alone, to `step-N-model`, which no run resumes from."""
        self._write({"model": self._model_state()}, self.folder / f"step-{step}-model")

    def _write(self, state: dict[str, Any], final: Path) -> None:
        temporary = final.with_name(f"{final.name}.tmp")
        if dist.get_rank() == 0:
            for leftover in self.folder.glob("step-*.tmp"):  # of a run that was killed while it saved
                shutil.rmtree(leftover)
        dist.barrier()
        dcp.save(state, checkpoint_id=temporary)
        if dist.get_rank() == 0:
            replace_folder(final, temporary)
        dist.barrier()
        logger.info("checkpoint saved: %s", final)

    def load(self, load_step: int) -> int:
        """Restore the checkpoint of `load_step` (-1: the latest) and return its step; 0 where there is none yet."""
        steps = from_first_rank(self.steps())
        if load_step == -1 and not steps:
            return 0
        step = steps[-1] if load_step == -1 else load_step
        if step not in steps:
            raise ValueError(
                f"checkpoint.load_step = {load_step}: {self.folder} holds no such step; there are "
                f"{', '.join(map(str, steps)) or 'none'}. -1 means the latest."
            )
        saved = dcp.FileSystemReader(self.folder / f"step-{step}").read_metadata().state_dict_metadata
        data_keys = [f"data_rank_{rank}" for rank in range(sum(key.startswith("data_rank_") for key in saved))]
        state = self._state(step) | dict.fromkeys(data_keys, "")
        state = {key: value for key, value in state.items() if not key.startswith("data_rank_") or key in data_keys}
        if not any(key.startswith(f"{self._random_key}.") for key in saved):  # a rank that was not there
            del state[self._random_key]
        self._read(state, self.folder / f"step-{step}")
        chosen = [_hyperparameters(optimizer) for optimizer in self._optimizers]
        set_optimizer_state_dict(
            self._model.hf_model, self._optimizers, optim_state_dict=state["optimizer"], options=_OPTIONS
        )
        for optimizer, groups in zip(self._optimizers, chosen, strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)  # this job's learning rate, weight decay ..., not those of the run that saved
        for scheduler, saved in zip(self._schedulers, json.loads(state["schedulers"]), strict=True):
            _move_to(scheduler, saved["last_epoch"])
        self._data.load_state_dict([json.loads(state[key]) for key in data_keys])
        if self._random_key in state:
            _set_random_state(state[self._random_key])
        self._abandon(later := [other for other in steps if other > step])
        if later:
            logger.warning("later checkpoints are set aside as step-N.abandoned: %s", later)
        logger.info("resumed from %s", self.folder / f"step-{step}")
        return step

    def _abandon(self, steps: list[int]) -> None:
        """Rename checkpoints of a branch that this run leaves, or the next resume would take the newest of them."""
        if dist.get_rank() == 0:
            for step in steps:
                replace_folder(self.folder / f"step-{step}.abandoned", self.folder / f"step-{step}")
        dist.barrier()

    @staticmethod
    def _read(state: dict[str, Any], folder: Path) -> None:
        try:
            dcp.load(state, checkpoint_id=folder)
        except (CheckpointException, RuntimeError, ValueError, EOFError) as error:
            raise ValueError(
                f"{folder} cannot be resumed from ({str(error).strip().splitlines()[0]}): it was saved by another "
                "model or optimizer, or is damaged. Give the settings that it was saved with, another "
                "checkpoint.load_step, or another job.dump_folder."
            ) from error

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints in the folder, ascending."""
        found = [_STEP_FOLDER.fullmatch(path.name) for path in self.folder.glob("step-*")]
        return sorted(
            int(match.group(1)) for match in found if match and (self.folder / match.group() / ".metadata").is_file()
        )

    def _model_state(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers by name; tied ones are stored once, under the first of their names."""
        first_names: dict[int, str] = {}
        tensors = named_tensors(self._model.hf_model)
        return {name: tensor for name, tensor in tensors.items() if first_names.setdefault(id(tensor), name) == name}

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "model": self._model_state(),
            "optimizer": get_optimizer_state_dict(self._model.hf_model, self._optimizers, options=_OPTIONS),
            "schedulers": json.dumps([scheduler.state_dict() for scheduler in self._schedulers]),
            "step": step,
            self._data_key: json.dumps(self._data.state_dict()),
            self._random_key: _get_random_state(),
        }

    @property
    def _data_key(self) -> str:
        return f"data_rank_{self._data_rank}"

    @property
    def _random_key(self) -> str:
        return f"random_rank_{dist.get_rank()}"

    def _delete_old(self) -> None:
        if self.keep_latest_k > 0:
            for step in self.steps()[: -self.keep_latest_k]:
                shutil.rmtree(self.folder / f"step-{step}")


def _get_random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _move_to(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Put this job's schedule at `step`; its learning rates are what the schedule says there."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
