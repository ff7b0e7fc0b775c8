"""The training loop. `train_step` is the whole algorithm; everything else sets up what it uses.

Flow: JobConfig -> model on the meta device -> sharded, filled -> optimizer -> data -> steps -> metrics, checkpoints,
export. A `Trainer` is made on every rank; without a process group it starts one.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallelize.compile import CompileTimer
from parallelize.distributed import launched_world_size, patience, pick_device, set_timeout
from transformers_backend.assemble import (
    build_model,
    build_optimizers,
    computation_dtype,
    count_accumulation_steps,
    count_tokens_per_step,
    find_tokenizer,
    flight_recorder,
    flops_per_token,
    load_start,
    open_checkpointer,
    open_data,
    open_metrics,
    open_process_group,
    own_folder,
    profilers,
)
from transformers_backend.checkpoint import is_remote
from transformers_backend.data import PackedBatches
from transformers_backend.decoder import learned_positions
from transformers_backend.job_config import JobConfig, validate
from transformers_backend.metrics import check_trackers_installed, setup_logging
from transformers_backend.nonfinite import FiniteCheck
from transformers_backend.run_summary import describe_run
from transformers_backend.sample import sample_text
from transformers_backend.signals import StopRequest

logger = logging.getLogger(__name__)

_GOES_ON = "saved, the same command goes on from there"


@dataclass
class StepResult:
    loss: torch.Tensor
    """Global mean loss in nats a target token, fp32 scalar, the same on every rank."""
    grad_norm: torch.Tensor
    """Global gradient norm before clipping, fp32 scalar."""
    lr: float
    """Learning rate that the step used."""


class Trainer:
    """Trains the model of a job; `train()` runs it to the end, `train_step()` one optimizer step.

    With [checkpoint] enable it resumes where the job's folder left off: `step` is the number of steps done.
    """

    def __init__(self, job_config: JobConfig) -> None:
        self.job_config = job_config
        self.device = pick_device()
        with contextlib.ExitStack() as opened:  # closed again if the rest of the set-up fails
            self._owns_process_group = not dist.is_initialized()
            if self._owns_process_group:
                validate(job_config, world_size=launched_world_size())  # before anything starts
                opened.enter_context(open_process_group(job_config, self.device))
            self._set_up(opened)
            self._opened = opened.pop_all()

    def _set_up(self, opened: contextlib.ExitStack) -> None:
        config = self.job_config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        setup_logging(self.rank)
        validate(config, world_size=self.world_size)
        check_trackers_installed(tensorboard=config.metrics.enable_tensorboard, wandb=config.metrics.enable_wandb)
        self.dump_folder = opened.enter_context(own_folder(config.job.dump_folder, "job.dump_folder"))
        torch.use_deterministic_algorithms(config.debug.deterministic, warn_only=config.debug.deterministic_warn_only)
        with patience(None, then_seconds=config.comm.init_timeout_seconds):  # one rank may download or convert for all
            self.model = build_model(config, self.device)
            torch.manual_seed(config.debug.seed + 1 + self.model.dropout_rank)
            self.tokenizer = find_tokenizer(config)
            self.data = opened.enter_context(open_data(config, self.model, self.tokenizer, validation=False))
            self.validation_data = None
            if config.validation.enable:
                self.validation_data = opened.enter_context(
                    open_data(config, self.model, self.tokenizer, validation=True)
                )
        set_timeout(config.comm.init_timeout_seconds, self.model.mesh)
        self.data_wait_seconds = 0.0  # time that training steps have waited for their batches
        self.optimizers, self.schedulers = build_optimizers(config, self.model)
        self._finite = FiniteCheck(self.optimizers)
        self.accumulation_steps = count_accumulation_steps(config, self.model.dims.data_parallel_size)
        self._describe()
        self.checkpointer = opened.enter_context(
            open_checkpointer(
                config, self.dump_folder,
                model=self.model, optimizers=self.optimizers, schedulers=self.schedulers, data=self.data,
            )
        )  # fmt: skip
        self.step = load_start(config, self.checkpointer, self.model)  # optimizer steps done
        self._first_step = self.step + 1
        has_work = self.step < config.training.steps and not config.checkpoint.load_only
        if self.rank == 0 and has_work:  # else the file goes on to say how what is there was trained
            config.save(self.dump_folder / "config.toml")
        self.metrics = opened.enter_context(
            open_metrics(config, self.dump_folder, model=self.model, steps_done=self.step)
        )

    # -- the run --------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run the job to its last step, with checkpoints, validation, export and the closing sample."""
        config = self.job_config
        if config.checkpoint.create_seed_checkpoint:
            self.checkpointer.save_seed()
            return
        if self.step >= config.training.steps:
            logger.info(
                "nothing to do: step %d of %d is reached. Raise training.steps to go on, or name another "
                "job.dump_folder to start anew.", self.step, config.training.steps,
            )  # fmt: skip
        tokens_since_log, waited_until_log = 0, self.data_wait_seconds
        watched = profilers(config.profiling, self.dump_folder, device=self.device, steps_done=self.step)
        with (
            CompileTimer() as compiling,
            StopRequest() as stop,
            _no_automatic_garbage_collection(),
            watched as (profiler, memory_recorder),
            flight_recorder(config.comm, config.job.dump_folder, recording=self._owns_process_group),
        ):
            while self.step < config.training.steps:
                result = self.train_step()
                self.metrics.advance()
                tokens_since_log += self.tokens_per_step
                if (
                    self.step == self._first_step
                    or self.step % config.metrics.log_freq == 0
                    or self.step == config.training.steps
                ):
                    self._log(result, tokens_since_log, self.data_wait_seconds - waited_until_log, compiling.take())
                    tokens_since_log, waited_until_log = 0, self.data_wait_seconds
                self._after_step()
                profiler.step()
                memory_recorder.step()
                if (reason := stop.agreed()) is not None and self.step < config.training.steps:
                    self._save_and_stop(reason.name)
                    return
            with self._patience():
                self._finish()

    def train_step(self) -> StepResult:
        """One optimizer step on the next global batch. On a GPU the host does not wait for it, see `FiniteCheck`."""
        self._look_at_step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        micro_batches = [self._next_batch(self.data) for _ in range(self.accumulation_steps)]
        targets = sum(self.model.count_targets(batch["labels"]) for batch in micro_batches)
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss += self.model.forward_backward(**batch, num_items_in_batch=targets)
        grad_norm = self.model.clip_grad_norm_(self.job_config.training.max_norm)
        if self.checkpointer is not None:
            self.checkpointer.wait_until_staged()  # a save still copies the weights that the optimizer will change
        if self._may_update(loss, grad_norm):
            for optimizer in self.optimizers:
                optimizer.step()
        lr = self.schedulers[0].get_last_lr()[0]
        for scheduler in self.schedulers:
            scheduler.step()
        self.step += 1
        return StepResult(loss, grad_norm, lr)

    def evaluate(self) -> float:
        """Mean loss over the validation data (at most `validation.steps` batches a rank), nats a target token."""
        assert self.validation_data is not None, "[validation] enable = false"
        self.validation_data.reset()
        start, loss, targets = time.perf_counter(), torch.zeros((), device=self.device), 0
        for index, batch in enumerate(self.validation_data):
            if index == self.job_config.validation.steps:
                break
            batch_loss, batch_targets = self.model.evaluate(**self._to_device(batch))
            loss += batch_loss
            targets += batch_targets
        mean = (loss / targets).item()
        self.metrics.log_validation(self.step, mean, int(targets), time.perf_counter() - start)
        return mean

    def close(self) -> None:
        """Close files, and the process group if this trainer started it."""
        self._opened.close()

    # -- one step's helpers ---------------------------------------------------------------------------------------

    def _next_batch(self, data: PackedBatches) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        batch = next(data)
        self.data_wait_seconds += time.perf_counter() - start
        return self._to_device(batch)

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies run beside computation where the device allows it: from pinned memory."""
        # Ranks that share sequences read documents out of the positions on the host, see `SharedContext.share`.
        staying = () if self.model.context is None else ("position_ids",)
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return {
            name: tensor if name in staying else tensor.to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def _may_update(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Whether to call the optimizers; raises (or only warns) where the host already knows that they must not."""
        if self._finite.allows_update(loss, grad_norm):
            return True
        self._refuse(self.step + 1, loss.item(), grad_norm.item())
        return False

    def _look_at_step(self) -> None:
        """Before anything is made of the latest step: raise (or only warn) if it was left out on the device."""
        if (numbers := self._finite.unseen()) is not None:
            self._refuse(self.step, *numbers)

    def _refuse(self, step: int, loss: float, grad_norm: float) -> None:
        """Step, ranks and parameters, as an error or a warning; the gradients are still those of the step."""
        message = f"step {step}: loss {loss}, gradient norm {grad_norm}. {self.model.find_nonfinite()}"
        if self.job_config.debug.skip_nonfinite_steps:
            logger.warning("%s The step is skipped (debug.skip_nonfinite_steps).", message)
            return
        raise FloatingPointError(
            f"{message} The weights are those of step {step - 1}. Lower optimizer.lr or training.max_norm, or set "
            "debug.skip_nonfinite_steps to go on without such steps."
        )

    def _after_step(self) -> None:
        config = self.job_config
        if self.step == self._first_step:  # which may have compiled
            set_timeout(config.comm.train_timeout_seconds, self.model.mesh)
        if self.validation_data is not None and self.step % config.validation.freq == 0:
            self._look_at_step()
            self.evaluate()
        is_first = config.checkpoint.enable_first_step_checkpoint and self.step == 1
        if self.checkpointer is not None and (is_first or self.step % config.checkpoint.interval == 0):
            self._look_at_step()
            with self._patience():
                self.checkpointer.save(self.step)
        if self.step % config.training.gc_freq == 0:
            gc.collect(1)

    def _patience(self):
        return patience(self.model.mesh, then_seconds=self.job_config.comm.train_timeout_seconds)

    def _log(self, result: StepResult, tokens: int, data_wait_seconds: float, compile_seconds: float) -> None:
        self._look_at_step()
        self.metrics.log(
            self.step,
            loss=result.loss.item(),
            grad_norm=result.grad_norm.item(),
            lr=result.lr,
            tokens=tokens,
            data_wait_seconds=data_wait_seconds,
            compile_seconds=compile_seconds,
        )

    def _save_and_stop(self, reason: str) -> None:
        """The end of a run that a signal stopped: a checkpoint, without the export and the sample of a finished one."""
        self._look_at_step()
        done = f"{reason}: stopped after step {self.step} of {self.job_config.training.steps}"
        if self.checkpointer is None:
            logger.warning("%s; nothing is saved, because checkpoint.enable is false", done)
            return
        with self._patience():
            saved = self.checkpointer.save_last(self.step)
        logger.info("%s; %s", done, _GOES_ON if saved else "nothing is saved, because of checkpoint.load_only")

    def _finish(self) -> None:
        config = self.job_config
        if self.checkpointer is not None and config.checkpoint.last_save_model_only:
            self.checkpointer.save_model(self.step)
        elif self.checkpointer is not None:
            self.checkpointer.save_last(self.step)
        if config.checkpoint.last_save_in_hf:
            inside = "checkpoint" if is_remote(config.checkpoint.folder) else config.checkpoint.folder
            exported = self.dump_folder / inside / f"step-{self.step}-hf"
            dtype = getattr(torch, config.checkpoint.export_dtype)
            self.model.save_pretrained(exported, tokenizer=self.tokenizer, dtype=dtype)
            logger.info("exported for from_pretrained: %s", exported)
        if config.job.sample_prompt:
            text = sample_text(
                self.model,
                self.tokenizer,
                config.job.sample_prompt,
                new_tokens=config.job.sample_tokens,
                longest=learned_positions(self.model.hf_model, self.model.decoder),
            )
            logger.info("sample of the trained model:\n%s", text)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all data ranks together see in one optimizer step."""
        return count_tokens_per_step(self.job_config, self.model.dims.data_parallel_size)

    def _describe(self) -> None:
        config = self.job_config
        if config.job.print_config:
            logger.info("resolved config:\n%s", config.to_toml())
        summary = describe_run(
            config,
            self.model,
            optimizers=self.optimizers,
            computes_in=computation_dtype(config, self.device),
            accumulation_steps=self.accumulation_steps,
            tokens_per_step=self.tokens_per_step,
            flops_per_token=flops_per_token(config, self.model),
            data_name=self.data.description,
        )
        logger.info("the run:\n%s", summary)


@contextlib.contextmanager
def _no_automatic_garbage_collection():
    """Ranks that collect garbage at different moments wait for each other; see training.gc_freq."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
