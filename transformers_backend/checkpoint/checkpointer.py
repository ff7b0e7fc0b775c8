"""Checkpointer: saves and restores one run. The trainer's only door to this package."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from parallelize.distributed import same_outcome
from transformers_backend.checkpoint.reading import (
    CONFIG_FILE,
    DamagedCheckpoint,
    check_fits,
    find_changes,
    find_new_batch_size,
    find_ranks,
    is_same_job,
    read_config,
    read_metadata,
    read_on_first_rank,
    read_state,
)
from transformers_backend.checkpoint.state import (
    DATA_KEY,
    RANDOM_KEY,
    blank_optimizer_state,
    find_packings,
    get_model_state,
    get_optimizer_state,
    get_random_state,
    get_schedulers_state,
    get_whole_model_state,
    random_key,
    random_keys,
    set_optimizer_state,
    set_random_state,
    set_schedulers_state,
    without_live_buffers,
)
from transformers_backend.checkpoint.storage import Found, Storage, step_of
from transformers_backend.checkpoint.writing import SaveError, Writer
from transformers_backend.data import PackedBatches
from transformers_backend.job_config import CHECKPOINT_PARTS
from transformers_backend.model import HFTransformerModel

logger = logging.getLogger(__name__)

_ALL_PARTS = frozenset(CHECKPOINT_PARTS)


class Checkpointer:
    """Saves and restores one run; every rank calls every method, `steps` apart."""

    def __init__(
        self,
        storage: Storage,
        *,
        model: HFTransformerModel,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[torch.optim.lr_scheduler.LambdaLR],
        data: PackedBatches,
        data_rank: int,
        config_text: str,
        keep_latest_k: int = 0,
        async_mode: str = "disabled",
        on_save_error: str = "stop",
        load_only: bool = False,
    ) -> None:
        """config_text: the job as TOML, kept in every checkpoint. The rest: see the section [checkpoint]."""
        self.storage = storage
        self.keep_latest_k = keep_latest_k
        self._model, self._data, self._data_rank = model, data, data_rank
        self._optimizers, self._schedulers = list(optimizers), list(schedulers)
        self._config_text = config_text
        self._is_async = async_mode != "disabled"
        self._load_only = load_only
        self._goes_on_without = on_save_error == "continue"
        self._writer = Writer(storage, beside_training=self._is_async, pinned=async_mode == "async_with_pinned_mem")
        self._saved_step: int | None = None  # the newest that was written, or is being written
        self._left_behind: int | None = None  # step of what this run started from as its own step 0, until it saves

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` (optimizer steps done), then delete older ones beyond `keep_latest_k`.

        Beside training it waits for the last write only, and the caller for `wait_until_staged` before the next
        optimizer step. A write that failed raises SaveError here, or at the next call, or is a warning
        (`on_save_error`).
        """
        self.wait()
        self._write(f"step-{step}", self._state(step))
        self._saved_step = step
        if not self._is_async:
            self.wait()

    def save_last(self, step: int) -> bool:
        """Have `step` on the storage when this returns, or raise SaveError: nothing is left to go on with.

        Returns whether it is there: not with `load_only`.
        """
        if self._load_only:
            return False
        try:
            self._writer.wait()
        except SaveError as error:  # of an earlier step, or of this one beside training: it has one more chance
            self._saved_step = None
            logger.warning("%s Step %d is written all the same.", error, step)
        if self._saved_step != step:
            self._write(f"step-{step}", self._state(step))
            self._writer.wait()
            self._saved_step = step
        return True

    def save_model(self, step: int) -> None:
        """Write the weights alone, to `step-N-model`, which no run resumes from."""
        self.wait()
        self._write(f"step-{step}-model", {"model": get_model_state(self._model)})
        self._writer.wait()

    def save_seed(self) -> None:
        """Write `step-0`, which holds weights only: a start for any mesh. ValueError where a run has begun already."""
        found = self._find()
        if steps := [*found.whole, *found.damaged, *found.abandoned]:
            raise ValueError(
                f"checkpoint.create_seed_checkpoint = true: {self.storage.locate('')} holds step-{max(steps)}, and a "
                "seed is made before a run. Leave the key out to go on with that run, or name another job.dump_folder."
            )
        self._write("step-0", {"model": get_model_state(self._model), "step": 0})
        self._writer.wait()

    def wait_until_staged(self) -> None:
        """Return when the next optimizer step may change what is being saved."""
        self._writer.wait_until_staged()

    def wait(self) -> None:
        """Return when nothing is being written; raises (or warns of) what went wrong with the last write."""
        try:
            self._writer.wait()
        except SaveError as error:
            self._fail(error)

    def close(self, timeout_seconds: float) -> None:
        self._writer.close(timeout_seconds)

    def _write(self, name: str, state: dict[str, Any]) -> None:
        if self._load_only:
            return
        # What is left behind stays until a checkpoint of this run is whole, but for one whose name that takes.
        left_behind, self._left_behind = self._left_behind, None
        if left_behind is not None and name == f"step-{left_behind}":
            self._abandon([left_behind])
            left_behind = None
        files = {CONFIG_FILE: self._config_text}
        packings = find_packings(self._model, state)
        self._writer.write(name, state, packings, files, then=lambda: self._clean_up(left_behind))

    def _fail(self, error: SaveError) -> None:
        self._saved_step = None
        if not self._goes_on_without:
            raise error
        logger.warning('%s Training goes on without it (checkpoint.on_save_error = "continue").', error)

    def _state(self, step: int) -> dict[str, Any]:
        model = get_model_state(self._model)
        schedulers = {"schedulers": get_schedulers_state(self._schedulers)} if self._schedulers else {}
        return schedulers | {
            "model": without_live_buffers(model) if self._is_async else model,
            "optimizer": get_optimizer_state(self._model, self._optimizers),
            "step": step,
            f"{DATA_KEY}{self._data_rank}": json.dumps(self._data.state_dict()),
            random_key(self._model): get_random_state(),
        }

    def _clean_up(self, left_behind: int | None) -> None:
        """On rank 0, when a checkpoint is whole."""
        try:
            if left_behind is not None:
                self.storage.abandon(left_behind)
            if self.keep_latest_k == 0:
                return
            found = self.storage.find()
            for step in found.whole[: -self.keep_latest_k]:
                self.storage.delete(step)
            for step in found.abandoned[: -self.keep_latest_k]:
                self.storage.delete(step, abandoned=True)
        except OSError as error:
            logger.warning("Old checkpoints could not be deleted: %s", error)

    # -- restoring ------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return self.storage.find().whole

    def load(self, load_step: int, *, exclude: Collection[str] = ()) -> int | None:
        """Restore the checkpoint of `load_step` (-1: the newest whole one) and return its step; None if there is none.

        exclude: parts that are left as they are, of "model", "optimizer", "lr_scheduler", "dataloader" and
        "train_state" (step and random numbers: the run begins at step 0). Both act once: where the newest checkpoint
        was written by this job, started in this way, the job goes on from it, whole. Raises ValueError for a step that
        there is not, that is damaged, or that does not fit this run, and LoadError where storage fails.
        """
        found = self._find()
        if (load_step != -1 or exclude) and found.whole and self._goes_on(found.whole[-1], load_step, exclude):
            load_step, exclude = -1, ()
        loaded = self._load_newest(found, exclude) if load_step == -1 else self._load_step(load_step, found, exclude)
        if loaded is None:
            return None
        name, step = loaded
        if step != step_of(name):
            self._left_behind = step_of(name)
        self._abandon([other for other in (*found.whole, *found.damaged) if other > step and other != step_of(name)])
        self._saved_step = step
        return step

    def _goes_on(self, newest: int, load_step: int, exclude: Collection[str]) -> bool:
        """Whether this job wrote `newest` after it had started as `load_step` and `exclude` say."""
        name = f"step-{newest}"
        text = read_on_first_rank(
            lambda: read_config(self.storage, name), self.storage.locate(name), self._writer.group
        )
        if text is None or not is_same_job(text, self._config_text, load_step=load_step, exclude=exclude):
            return False
        logger.info(
            "%s was written by this job, so it goes on from there: checkpoint.load_step = %d and exclude_from_loading "
            "= %s have had their effect. For them to act once more, move the later checkpoints away.",
            self.storage.locate(name), load_step, sorted(exclude),
        )  # fmt: skip
        return True

    def load_initial(self, storage: Storage, name: str, *, model_only: bool, exclude: Collection[str] = ()) -> int:
        """Start from another run's checkpoint; returns the step to go on from, 0 with `model_only`."""
        parts = (frozenset({"model"}) if model_only else _ALL_PARTS) - frozenset(exclude)
        location = storage.locate(name)
        if not read_on_first_rank(lambda: bool(storage.sizes(name)), location, self._writer.group):
            raise ValueError(
                f'checkpoint.initial_load_path = "{location}": there is no such checkpoint. Name the folder step-N of '
                "a run, or set checkpoint.initial_load_in_hf = true for a Hugging Face folder or hub id."
            )
        return self._restore(storage, name, parts)

    def _find(self) -> Found:
        folder = f"checkpoint.folder {self.storage.locate('')}"
        return read_on_first_rank(self.storage.find, folder, self._writer.group, done="listed")

    @property
    def _data_ranks(self) -> int:
        return self._model.dims.data_parallel_size

    def _load_step(self, step: int, found: Found, exclude: Collection[str]) -> tuple[str, int]:
        if step not in (*found.whole, *found.damaged):
            raise ValueError(
                f"checkpoint.load_step = {step}: {self.storage.locate('')} holds no such step; there are "
                f"{', '.join(map(str, found.whole)) or 'none'}. -1 means the latest."
            )
        name = f"step-{step}"
        return name, self._restore(self.storage, name, _parts_of(step, exclude))

    def _load_newest(self, found: Found, exclude: Collection[str]) -> tuple[str, int] | None:
        problems = [f"step-{step} was set aside as step-{step}.abandoned." for step in found.abandoned]
        for step in sorted((*found.whole, *found.damaged), reverse=True):
            try:
                return self._load_step(step, found, exclude)
            except DamagedCheckpoint as error:
                problems.append(str(error))
                logger.warning("%s The one before is tried.", error)
        if problems:
            raise ValueError(
                f"{self.storage.locate('')} holds no whole checkpoint: {' '.join(problems)} Restore one of them, or "
                "name another checkpoint.folder."
            )
        return None

    def _restore(self, storage: Storage, name: str, parts: Collection[str]) -> int:
        group = self._writer.group
        metadata, config_text = read_on_first_rank(
            lambda: (read_metadata(storage, name), read_config(storage, name)), storage.locate(name), group
        )
        if parts != {"model"} and config_text is not None:
            self._warn_of_changes(config_text, len(find_ranks(metadata, DATA_KEY)), storage.locate(name))
        state = self._wanted(metadata, parts)
        with same_outcome(ValueError, group=group):  # what does not fit may be known to some stages only
            check_fits(self._whole(state), storage.locate(name), metadata)
        read_state(state, find_packings(self._model, state), storage, name, group)
        self._put_back(state)
        if "step" in state and (saved := find_ranks(metadata, RANDOM_KEY)) != (ranks := random_keys(self._model)):
            logger.info(
                "%s holds the random states of %d ranks, and this run has %d%s: those without one are seeded anew.",
                storage.locate(name), len(saved), len(ranks), "" if len(saved) != len(ranks) else " others",
            )  # fmt: skip
        logger.info("resumed from %s", storage.locate(name))
        return state.get("step", 0)

    def _warn_of_changes(self, config_text: str, data_ranks: int, location: str) -> None:
        changes = find_changes(config_text, self._config_text)
        if data_ranks > 0:
            changes += find_new_batch_size(config_text, data_ranks, self._config_text, self._data_ranks)
        for change in changes:
            logger.warning("%s was saved with another setting: %s.", location, change)

    def _wanted(self, metadata: Metadata, parts: Collection[str]) -> dict[str, Any]:
        """The state to be filled: tensors of this run in place, strings and numbers as placeholders."""
        state: dict[str, Any] = {}
        if "model" in parts:
            state["model"] = get_model_state(self._model)
        if "optimizer" in parts:
            prefix = "optimizer."
            keys = {key.removeprefix(prefix) for key in metadata.state_dict_metadata if key.startswith(prefix)}
            state["optimizer"] = blank_optimizer_state(self._model, self._optimizers, keys)
        if "lr_scheduler" in parts and self._schedulers:
            state["schedulers"] = ""
        if "dataloader" in parts:
            state |= dict.fromkeys(sorted(find_ranks(metadata, DATA_KEY)), "")
        if "train_state" in parts:
            state["step"] = 0
            key = random_key(self._model)
            saved = metadata.state_dict_metadata
            state[key] = {kind: value for kind, value in get_random_state().items() if f"{key}.{kind}" in saved}
        return state

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with the whole model's tensors, on the meta device, for those of the stages that are here."""
        if "model" not in state or self._model.pipelined is None:
            return state
        return {**state, "model": get_whole_model_state(self._model)}

    def _put_back(self, state: dict[str, Any]) -> None:
        """Hand on what is not filled in place."""
        if "optimizer" in state:
            set_optimizer_state(self._model, self._optimizers, state["optimizer"])
        if "schedulers" in state:
            set_schedulers_state(self._schedulers, state["schedulers"])
        if positions := [json.loads(state[key]) for key in _in_order(state, DATA_KEY)]:
            self._set_position(positions)
        if "step" in state:
            random = state[random_key(self._model)]
            set_random_state(random)
            if not random:
                torch.manual_seed(torch.initial_seed() + state["step"])  # not the numbers of the first steps again

    def _set_position(self, positions: list[dict[str, Any]]) -> None:
        """Move the data; what one rank refuses is an error on all, or the others would wait for it."""
        with same_outcome(ValueError, group=self._writer.group):
            self._data.load_state_dict(positions)

    def _abandon(self, steps: list[int]) -> None:
        """Set checkpoints aside that this run leaves behind, or the next resume would take the newest of them."""
        if self._load_only or not steps:
            return
        if dist.get_rank() == 0:
            for step in steps:
                self.storage.abandon(step)
        dist.barrier(group=self._writer.group)
        logger.warning("later checkpoints are set aside as step-N.abandoned: %s", sorted(steps))


def _parts_of(step: int, exclude: Collection[str]) -> frozenset[str]:
    """What is restored of a checkpoint: of step 0, a seed, the weights only."""
    return (frozenset({"model"}) if step == 0 else _ALL_PARTS) - frozenset(exclude)


def _in_order(state: dict[str, Any], prefix: str) -> list[str]:
    return sorted((key for key in state if key.startswith(prefix)), key=lambda key: int(key[len(prefix) :]))
