"""The parts of a run, each made as the job config says: what the trainer sets up before its first step.

Between the trainer and the parts: these functions read the sections of a `JobConfig`, the parts below take flat values.
In the order in which `Trainer` calls them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from parallelize.costs import peak_flops
from parallelize.distributed import (
    collectives_written_on_error,
    from_first_rank,
    has_fast_bfloat16,
    initialize,
    record_collectives,
    same_outcome,
    shutdown,
)
from transformers_backend.checkpoint import Checkpointer, is_remote, locate_folder, open_storage, require_shared, start
from transformers_backend.data import PackedBatches, build_batches, configured_sources, load_tokenizer
from transformers_backend.decoder import learned_positions
from transformers_backend.flops import model_flops_per_token
from transformers_backend.folders import lock_folder
from transformers_backend.job_config import Comm, JobConfig, Profiling
from transformers_backend.metrics import MetricsLogger, open_trackers
from transformers_backend.model import HFTransformerModel, HFTransformerModelArgs
from transformers_backend.optimizer import build_optimizer, build_schedulers
from transformers_backend.profiling import Stepper, maybe_profile, maybe_record_memory

logger = logging.getLogger(__name__)

Optimizers = Sequence[torch.optim.Optimizer]
Schedulers = Sequence[torch.optim.lr_scheduler.LambdaLR]


@contextlib.contextmanager
def open_process_group(config: JobConfig, device: torch.device) -> Iterator[None]:
    """The default process group, for a trainer that nobody has made one for."""
    if config.comm.trace_buf_size > 0:
        prefix = _trace_prefix(config.comm, config.job.dump_folder)
        record_collectives(prefix, buffer_size=config.comm.trace_buf_size)  # before any group starts
    initialize(device, timeout_seconds=config.comm.init_timeout_seconds)
    try:
        yield
    finally:
        shutdown()


@contextlib.contextmanager
def own_folder(name: str, key: str) -> Iterator[Path]:
    """A folder that a key names, made and locked for this run by rank 0; ValueError on all ranks if that cannot be."""
    folder, problem = Path(name).expanduser(), None
    with contextlib.ExitStack() as held:
        if dist.get_rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock_folder(folder, key))
            except OSError as error:
                problem = f'{key} = "{name}": cannot be made ({error.strerror}). Name another folder.'
            except ValueError as error:
                problem = str(error)
        if (problem := from_first_rank(problem)) is not None:
            raise ValueError(problem)
        folder.mkdir(parents=True, exist_ok=True)  # where machines do not share it, each has its own
        yield folder


def build_model(config: JobConfig, device: torch.device) -> HFTransformerModel:
    """The model, sharded over the process group and filled; with packed documents, told to keep them apart."""
    model = HFTransformerModel(HFTransformerModelArgs().update_from_config(config))
    computes_in = computation_dtype(config, device)
    model.parallelize(
        config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
        float8=config.float8,
        kernels=config.kernels,
        param_dtype=None if computes_in == getattr(torch, config.training.dtype) else computes_in,
        cpu_offload=config.training.enable_cpu_offload,
        seed=config.debug.seed,
        seq_len=config.training.seq_len,
    )
    _check_sequence_lengths(config, model)
    _choose_what_attention_sees(config.training.packing, model)
    return model


def computation_dtype(config: JobConfig, device: torch.device) -> torch.dtype:
    """training.mixed_precision_param, resolved."""
    wanted = config.training.mixed_precision_param
    if wanted == "auto":
        wanted = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return getattr(torch, wanted)


def _check_sequence_lengths(config: JobConfig, model: HFTransformerModel) -> None:
    longest = learned_positions(model.hf_model, model.decoder)
    made_for = model.hf_model.config.to_dict().get("max_position_embeddings")
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable:
        lengths["validation.seq_len"] = config.validation.seq_len or config.training.seq_len
    for key, length in lengths.items():
        if longest is not None and length > longest:
            raise ValueError(
                f"{key} = {length}: {model.model_class.__name__} learns a table of {longest} positions, so it must be "
                f"at most {longest}."
            )
        if longest is None and made_for is not None and length > made_for:
            logger.warning(
                "%s = %d: the model is made for max_position_embeddings = %d. What it makes of later positions may be "
                "poor. Use shorter sequences, or set rope_parameters and max_position_embeddings in "
                "hf_transformers.config_overrides.", key, length, made_for,
            )  # fmt: skip


def _choose_what_attention_sees(packing: str, model: HFTransformerModel) -> None:
    if packing == "concat":
        logger.info('training.packing = "concat": tokens attend to the documents before their own in a sequence')
        return
    isolation = model.isolate_documents()
    if isolation.way is not None:
        logger.info(
            'training.packing = "documents": attention stays within each document, by %s (tried on the twin)',
            isolation.way,
        )
    else:
        logger.warning(
            'training.packing = "documents": attention crosses documents, or may: %s. '
            "docs/PACKING.md lists the models and implementations that keep them apart.",
            isolation.reason,
        )


def find_tokenizer(config: JobConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(
        config.model.hf_assets_path or config.hf_transformers.model,
        revision=None if config.model.hf_assets_path else config.hf_transformers.revision,
        trust_remote_code=config.hf_transformers.trust_remote_code,
    )


def count_accumulation_steps(config: JobConfig, data_ranks: int) -> int:
    """Forward and backward passes in one optimizer step."""
    training = config.training
    if training.global_batch_size == -1:
        return 1
    return training.global_batch_size // (training.local_batch_size * data_ranks)


def count_tokens_per_step(config: JobConfig, data_ranks: int) -> int:
    """Tokens that all data ranks together see in one optimizer step; other ranks see the same ones again."""
    sequences = config.training.local_batch_size * data_ranks * count_accumulation_steps(config, data_ranks)
    return sequences * config.training.seq_len


def flops_per_token(config: JobConfig, model: HFTransformerModel) -> float:
    """FLOPs of training the whole model on one token, of which a rank of a pipeline has only some layers."""
    return model_flops_per_token(model.blueprint, model.decoder, config.training.seq_len)


@contextlib.contextmanager
def open_data(
    config: JobConfig, model: HFTransformerModel, tokenizer: PreTrainedTokenizerBase, *, validation: bool
) -> Iterator[PackedBatches]:
    """This rank's batches, or an error that one rank met on all of them: only one may have too little text."""
    training = config.training
    section = config.validation if validation else training
    batches = None
    try:
        with same_outcome(ValueError, OSError, ImportError):
            batches = build_batches(
                *configured_sources(section),
                tokenizer=tokenizer,
                vocabulary_size=model.vocabulary_size,
                seq_len=section.seq_len or training.seq_len,
                batch_size=section.local_batch_size or training.local_batch_size,
                batches_per_step=1 if validation else count_accumulation_steps(config, model.dims.data_parallel_size),
                data_rank=model.data_rank,
                data_world_size=model.dims.data_parallel_size,
                seed=config.debug.seed,
                repeat=not validation,
                packing=training.packing,
                num_workers=training.num_workers,
                prefetch_factor=training.prefetch_factor,
            )
        assert batches is not None
        yield batches
    finally:
        if batches is not None:
            batches.close()


def build_optimizers(config: JobConfig, model: HFTransformerModel) -> tuple[Optimizers, Schedulers]:
    optimizer, schedule = config.optimizer, config.lr_scheduler
    hidden = tuple(f"{layer}." for layer in model.decoder.layers)
    optimizers = build_optimizer(
        model.hf_model.named_parameters(),
        name=optimizer.name,
        lr=optimizer.lr,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        implementation=optimizer.implementation,
        matrix_names={name for name, _ in model.hf_model.named_parameters() if name.startswith(hidden)},
    )
    schedulers = build_schedulers(
        optimizers,
        warmup_steps=schedule.warmup_steps,
        total_steps=schedule.total_steps or config.training.steps,
        decay_ratio=schedule.decay_ratio,
        decay_type=schedule.decay_type,
        min_lr_factor=schedule.min_lr_factor,
    )
    return optimizers, schedulers


@contextlib.contextmanager
def open_checkpointer(
    config: JobConfig,
    dump_folder: Path,
    *,
    model: HFTransformerModel,
    optimizers: Optimizers,
    schedulers: Schedulers,
    data: PackedBatches,
) -> Iterator[Checkpointer | None]:
    """The checkpointer of the run, None with checkpoint.enable = false; at the end it waits for a save under way."""
    checkpoint = config.checkpoint
    if not checkpoint.enable:
        yield None
        return
    storage = open_storage(checkpoint.folder, dump_folder)
    with contextlib.ExitStack() as held:
        if not checkpoint.load_only:
            require_shared(storage)
            if not is_remote(checkpoint.folder):
                place = Path(locate_folder(checkpoint.folder, dump_folder)).resolve()
                if not place.is_relative_to(dump_folder.resolve()):  # where the dump folder's lock does not reach
                    held.enter_context(own_folder(str(place), "checkpoint.folder"))
        checkpointer = Checkpointer(
            storage,
            model=model,
            optimizers=optimizers,
            schedulers=schedulers,
            data=data,
            data_rank=model.data_rank,
            config_text=config.to_toml(),
            keep_latest_k=checkpoint.keep_latest_k,
            async_mode=checkpoint.async_mode,
            on_save_error=checkpoint.on_save_error,
            load_only=checkpoint.load_only,
        )
        try:
            yield checkpointer
        finally:
            checkpointer.close(config.comm.train_timeout_seconds)


def load_start(config: JobConfig, checkpointer: Checkpointer | None, model: HFTransformerModel) -> int:
    """Restore the checkpoint that the run starts from, if any; the number of optimizer steps that it has done."""
    checkpoint = config.checkpoint
    if checkpointer is None:
        return 0
    return start(
        checkpointer,
        model,
        load_step=checkpoint.load_step,
        exclude=checkpoint.exclude_from_loading,
        initial_load_path=checkpoint.initial_load_path,
        initial_load_in_hf=checkpoint.initial_load_in_hf,
        initial_load_model_only=checkpoint.initial_load_model_only,
    )


def open_metrics(config: JobConfig, dump_folder: Path, *, model: HFTransformerModel, steps_done: int) -> MetricsLogger:
    """The logger of this rank; rank 0's has the trackers that [metrics] asks for.

    steps_done: optimizer steps of the checkpoint that the run resumed from, 0 for a new run.
    """
    rank, device = dist.get_rank(), model.device
    metrics = config.metrics
    trackers = []
    if rank == 0:
        trackers = open_trackers(
            dump_folder,
            tensorboard_folder=dump_folder / metrics.save_tb_folder if metrics.enable_tensorboard else None,
            wandb=metrics.enable_wandb,
            description=config.job.description,
            config=config.to_dict(),
            steps_done=steps_done,
        )
    peak = None
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device), computation_dtype(config, device))
    return MetricsLogger(
        dump_folder,
        is_main=rank == 0,
        device=device,
        flops_per_token=flops_per_token(config, model),
        peak_flops_per_device=peak,
        world_size=dist.get_world_size(),
        steps_done=steps_done,
        total_steps=config.training.steps,
        keep_earlier=config.checkpoint.load_only,  # such a run is a look at another's checkpoint
        progress_bar=metrics.progress_bar,
        trackers=trackers,
    )


@contextlib.contextmanager
def profilers(
    section: Profiling, dump_folder: Path, *, device: torch.device, steps_done: int
) -> Iterator[tuple[Stepper, Stepper]]:
    """The profiler and the memory recorder of this rank: call `.step()` on both after every optimizer step."""
    rank = dist.get_rank()
    is_chosen = section.max_ranks == -1 or rank < section.max_ranks
    common = {"freq": section.profile_freq, "rank": rank, "first_step": steps_done}
    with (
        maybe_profile(
            enabled=section.enable_profiling and is_chosen,
            folder=dump_folder / section.save_traces_folder,
            active=section.profiler_active,
            warmup=section.profiler_warmup,
            **common,
        ) as profiler,
        maybe_record_memory(
            enabled=section.enable_memory_snapshot and is_chosen,
            folder=dump_folder / section.save_memory_snapshot_folder,
            device=device,
            **common,
        ) as memory_recorder,
    ):
        yield profiler, memory_recorder


def _trace_prefix(comm: Comm, dump_folder: str) -> str:
    """Path to which a rank's number is added for the file of its flight recorder."""
    return str(Path(dump_folder).expanduser() / comm.save_traces_folder / comm.save_traces_file_prefix)


def flight_recorder(comm: Comm, dump_folder: str, *, recording: bool) -> contextlib.AbstractContextManager[None]:
    """A context that writes what the flight recorder holds if an error ends it, where [comm] asks for one.

    recording: whether `open_process_group` started the group, which is when recording has to begin.
    """
    if comm.trace_buf_size == 0 or not recording:
        return contextlib.nullcontext()
    return collectives_written_on_error(_trace_prefix(comm, dump_folder))
