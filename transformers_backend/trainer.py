"""The training loop. `train_step` is the whole algorithm; everything else sets up what it uses.

Flow: JobConfig -> model on the meta device -> sharded, filled -> optimizer -> data -> steps -> metrics, checkpoints,
export. A `Trainer` is made on every rank; without a process group it starts one.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from parallelize.distributed import (
    collectives_written_on_error,
    from_first_rank,
    gather_objects,
    has_fast_bfloat16,
    initialize,
    launched_world_size,
    patience,
    pick_device,
    record_collectives,
    set_timeout,
    shutdown,
)
from transformers_backend.checkpoint import Checkpointer, is_remote, open_storage, start
from transformers_backend.data import PackedBatches, build_batches, configured_sources, load_tokenizer
from transformers_backend.decoder import learned_positions
from transformers_backend.flops import model_flops_per_token
from transformers_backend.folders import lock_folder
from transformers_backend.generate import sample_text
from transformers_backend.job_config import JobConfig, validate
from transformers_backend.metrics import check_trackers_installed, setup_logging
from transformers_backend.model import HFTransformerModel, HFTransformerModelArgs
from transformers_backend.optimizer import build_optimizer, build_schedulers
from transformers_backend.reporting import build_metrics, profilers
from transformers_backend.run_summary import describe_run
from transformers_backend.signals import StopRequest
from transformers_backend.weights import load_hf_weights

logger = logging.getLogger(__name__)


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
                if job_config.comm.trace_buf_size > 0:
                    record_collectives(self._trace_prefix, buffer_size=job_config.comm.trace_buf_size)
                initialize(self.device, timeout_seconds=job_config.comm.init_timeout_seconds)
                opened.callback(shutdown)
            self._set_up(opened)
            self._opened = opened.pop_all()

    def _set_up(self, opened: contextlib.ExitStack) -> None:
        config = self.job_config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        setup_logging(self.rank)
        validate(config, world_size=self.world_size)
        check_trackers_installed(tensorboard=config.metrics.enable_tensorboard, wandb=config.metrics.enable_wandb)
        self.dump_folder = Path(config.job.dump_folder).expanduser()
        try:
            self.dump_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f'job.dump_folder = "{config.job.dump_folder}": cannot be made ({error.strerror}). Name another folder.'
            ) from error
        self._lock_dump_folder(opened)
        torch.use_deterministic_algorithms(config.debug.deterministic, warn_only=config.debug.deterministic_warn_only)
        with patience(None, then_seconds=config.comm.init_timeout_seconds):  # rank 0 may download
            self.model = self._build_model()
        set_timeout(config.comm.init_timeout_seconds, self.model.mesh)
        self._check_sequence_lengths()
        self._say_what_attention_sees()
        torch.manual_seed(config.debug.seed + 1 + self.model.data_rank)  # dropout: different on different data
        self.tokenizer = load_tokenizer(
            config.model.hf_assets_path or config.hf_transformers.model,
            revision=None if config.model.hf_assets_path else config.hf_transformers.revision,
            trust_remote_code=config.hf_transformers.trust_remote_code,
        )
        self.accumulation_steps = self._count_accumulation_steps()
        self.data = self._build_data(opened, validation=False)
        self.validation_data = self._build_data(opened, validation=True) if config.validation.enable else None
        self.data_wait_seconds = 0.0  # time that training steps have waited for their batches
        self._build_optimizers()
        self.flops_per_token = model_flops_per_token(self.model.hf_model, self.model.decoder, config.training.seq_len)
        self._describe()
        self.step = 0  # optimizer steps done
        self.checkpointer = self._build_checkpointer(opened) if config.checkpoint.enable else None
        if self.checkpointer is not None:
            self.step = start(
                self.checkpointer,
                self.model,
                load_step=config.checkpoint.load_step,
                exclude=config.checkpoint.exclude_from_loading,
                initial_load_path=config.checkpoint.initial_load_path,
                initial_load_in_hf=config.checkpoint.initial_load_in_hf,
                initial_load_model_only=config.checkpoint.initial_load_model_only,
            )
        self._first_step = self.step + 1
        if self.rank == 0:
            config.save(self.dump_folder / "config.toml")
        self.metrics = opened.enter_context(
            build_metrics(
                config, dump_folder=self.dump_folder, device=self.device, computes_in=self._computes_in,
                flops_per_token=self.flops_per_token, rank=self.rank, world_size=self.world_size, steps_done=self.step,
            )
        )  # fmt: skip

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
        watched = profilers(
            config.profiling, dump_folder=self.dump_folder, device=self.device, rank=self.rank, steps_done=self.step
        )
        with (
            StopRequest() as stop,
            _no_automatic_garbage_collection(),
            watched as (profiler, memory_recorder),
            self._flight_recorder(),
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
                    self._log(result, tokens_since_log, self.data_wait_seconds - waited_until_log)
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
        """One optimizer step on the next global batch."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        micro_batches = [self._next_batch(self.data) for _ in range(self.accumulation_steps)]
        targets = sum(self.model.count_targets(batch["labels"]) for batch in micro_batches)
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss += self.model.forward_backward(**batch, num_items_in_batch=targets)
        grad_norm = self.model.clip_grad_norm_(self.job_config.training.max_norm)
        if self.checkpointer is not None:
            self.checkpointer.wait_until_staged()
        if self._is_finite(loss, grad_norm):
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
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _is_finite(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Whether the step may update weights; raises (or only warns) with step, rank and parameter if it may not."""
        if math.isfinite(loss.item()) and math.isfinite(grad_norm.item()):
            return True
        message = (
            f"step {self.step + 1}: loss {loss.item()}, gradient norm {grad_norm.item()}. {self.model.find_nonfinite()}"
        )
        if self.job_config.debug.skip_nonfinite_steps:
            logger.warning("%s The step is skipped (debug.skip_nonfinite_steps).", message)
            return False
        raise FloatingPointError(
            f"{message} The weights are those of step {self.step}. Lower optimizer.lr or training.max_norm, or set "
            "debug.skip_nonfinite_steps to go on without such steps."
        )

    def _after_step(self) -> None:
        config = self.job_config
        if self.step == self._first_step:  # which may have compiled
            set_timeout(config.comm.train_timeout_seconds, self.model.mesh)
        if self.validation_data is not None and self.step % config.validation.freq == 0:
            self.evaluate()
        is_first = config.checkpoint.enable_first_step_checkpoint and self.step == 1
        if self.checkpointer is not None and (is_first or self.step % config.checkpoint.interval == 0):
            with self._patience():
                self.checkpointer.save(self.step)
        if self.step % config.training.gc_freq == 0:
            gc.collect(1)

    def _patience(self):
        return patience(self.model.mesh, then_seconds=self.job_config.comm.train_timeout_seconds)

    def _log(self, result: StepResult, tokens: int, data_wait_seconds: float) -> None:
        self.metrics.log(
            self.step,
            loss=result.loss.item(),
            grad_norm=result.grad_norm.item(),
            lr=result.lr,
            tokens=tokens,
            data_wait_seconds=data_wait_seconds,
        )

    def _save_and_stop(self, reason: str) -> None:
        """The end of a run that a signal stopped: a checkpoint, without the export and the sample of a finished one."""
        done = f"{reason}: stopped after step {self.step} of {self.job_config.training.steps}"
        if self.checkpointer is None:
            logger.warning("%s; nothing is saved, because checkpoint.enable is false", done)
            return
        with self._patience():
            self.checkpointer.save_last(self.step)
        logger.info("%s; saved, the same command goes on from there", done)

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

    # -- set-up ---------------------------------------------------------------------------------------------------

    def _build_model(self) -> HFTransformerModel:
        config = self.job_config
        model = HFTransformerModel(HFTransformerModelArgs().update_from_config(config))
        return model.parallelize(
            config.parallelism,
            activation_checkpoint=config.activation_checkpoint,
            compile=config.compile,
            param_dtype=self._computation_dtype(),
            cpu_offload=config.training.enable_cpu_offload,
            seed=config.debug.seed,
        )

    def _check_sequence_lengths(self) -> None:
        longest = learned_positions(self.model.hf_model, self.model.decoder)
        made_for = self.model.hf_model.config.to_dict().get("max_position_embeddings")
        lengths = {"training.seq_len": self.job_config.training.seq_len}
        if self.job_config.validation.enable:
            lengths["validation.seq_len"] = self.job_config.validation.seq_len or lengths["training.seq_len"]
        for key, length in lengths.items():
            if longest is not None and length > longest:
                raise ValueError(
                    f"{key} = {length}: {self.model.model_class.__name__} learns a table of {longest} positions, so it "
                    f"must be at most {longest}."
                )
            if longest is None and made_for is not None and length > made_for:
                logger.warning(
                    "%s = %d: the model is made for max_position_embeddings = %d. What it makes of later positions may "
                    "be poor. Use shorter sequences, or set rope_parameters and max_position_embeddings in "
                    "hf_transformers.config_overrides.", key, length, made_for,
                )  # fmt: skip

    def _say_what_attention_sees(self) -> None:
        if self.job_config.training.packing == "concat":
            logger.info('training.packing = "concat": tokens attend to the documents before their own in a sequence')
            return
        isolation = self.model.isolate_documents()
        if isolation.way is not None:
            logger.info(
                'training.packing = "documents": attention stays within each document, by %s (tried on the twin)',
                isolation.way,
            )
        else:
            logger.warning(
                'training.packing = "documents": attention crosses documents, or may: %s. Another '
                "hf_transformers.attn_implementation may keep them apart (docs/PACKING.md).",
                isolation.reason,
            )

    def _computation_dtype(self) -> torch.dtype | None:
        """training.mixed_precision_param, resolved; None where it is the parameters' own dtype."""
        wanted = self.job_config.training.mixed_precision_param
        if wanted == "auto":
            wanted = "bfloat16" if has_fast_bfloat16(self.device) else "float32"
        return None if wanted == self.job_config.training.dtype else getattr(torch, wanted)

    @property
    def _computes_in(self) -> torch.dtype:
        return self._computation_dtype() or getattr(torch, self.job_config.training.dtype)

    def _build_data(self, opened: contextlib.ExitStack, *, validation: bool) -> PackedBatches:
        """The data of this rank, or the first rank's error on every rank: only one may have too little text."""
        batches, message = None, None
        try:
            batches = self._open_data(validation=validation)
            opened.callback(batches.close)
        except ValueError as error:
            message = str(error)
        if (found := next(filter(None, gather_objects(message)), None)) is not None:
            raise ValueError(found)
        return batches

    def _open_data(self, *, validation: bool) -> PackedBatches:
        training = self.job_config.training
        section = self.job_config.validation if validation else training
        return build_batches(
            *configured_sources(section),
            tokenizer=self.tokenizer,
            vocabulary_size=self.model.vocabulary_size,
            seq_len=section.seq_len or training.seq_len,
            batch_size=section.local_batch_size or training.local_batch_size,
            batches_per_step=1 if validation else self.accumulation_steps,
            data_rank=self.model.data_rank,
            data_world_size=self.model.dims.data_parallel_size,
            seed=self.job_config.debug.seed,
            repeat=not validation,
            packing=training.packing,
            num_workers=training.num_workers,
            prefetch_factor=training.prefetch_factor,
        )

    def _build_optimizers(self) -> None:
        optimizer, schedule = self.job_config.optimizer, self.job_config.lr_scheduler
        hidden = tuple(f"{layer}." for layer in self.model.decoder.layers)
        self.optimizers = build_optimizer(
            self.model.hf_model.named_parameters(),
            name=optimizer.name,
            lr=optimizer.lr,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            implementation=optimizer.implementation,
            matrix_names={name for name, _ in self.model.hf_model.named_parameters() if name.startswith(hidden)},
        )
        self.schedulers = build_schedulers(
            self.optimizers,
            warmup_steps=schedule.warmup_steps,
            total_steps=schedule.total_steps or self.job_config.training.steps,
            decay_ratio=schedule.decay_ratio,
            decay_type=schedule.decay_type,
            min_lr_factor=schedule.min_lr_factor,
        )

    def _lock_dump_folder(self, opened: contextlib.ExitStack) -> None:
        problem = None
        if self.rank == 0:
            try:
                opened.enter_context(lock_folder(self.dump_folder))
            except (ValueError, OSError) as error:
                problem = str(error)
        if (problem := from_first_rank(problem)) is not None:
            raise ValueError(problem)

    def _build_checkpointer(self, opened: contextlib.ExitStack) -> Checkpointer:
        config = self.job_config
        checkpointer = Checkpointer(
            open_storage(config.checkpoint.folder, self.dump_folder),
            model=self.model,
            optimizers=self.optimizers,
            schedulers=self.schedulers,
            data=self.data,
            data_rank=self.model.data_rank,
            config_text=config.to_toml(),
            keep_latest_k=config.checkpoint.keep_latest_k,
            async_mode=config.checkpoint.async_mode,
            on_save_error=config.checkpoint.on_save_error,
            load_only=config.checkpoint.load_only,
        )
        opened.callback(checkpointer.close, config.comm.train_timeout_seconds)
        return checkpointer

    def _count_accumulation_steps(self) -> int:
        training = self.job_config.training
        per_forward = training.local_batch_size * self.model.dims.data_parallel_size
        return 1 if training.global_batch_size == -1 else training.global_batch_size // per_forward

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together see in one optimizer step."""
        training = self.job_config.training
        sequences = training.local_batch_size * self.model.dims.data_parallel_size * self.accumulation_steps
        return sequences * training.seq_len

    @property
    def _trace_prefix(self) -> str:
        comm = self.job_config.comm
        folder = Path(self.job_config.job.dump_folder).expanduser() / comm.save_traces_folder
        return str(folder / comm.save_traces_file_prefix)

    def _flight_recorder(self) -> contextlib.AbstractContextManager[None]:
        if self.job_config.comm.trace_buf_size == 0 or not self._owns_process_group:
            return contextlib.nullcontext()
        return collectives_written_on_error(self._trace_prefix)

    def _describe(self) -> None:
        config = self.job_config
        if config.job.print_config:
            logger.info("resolved config:\n%s", config.to_toml())
        summary = describe_run(
            config,
            self.model,
            optimizers=self.optimizers,
            computes_in=self._computes_in,
            accumulation_steps=self.accumulation_steps,
            tokens_per_step=self.tokens_per_step,
            flops_per_token=self.flops_per_token,
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
