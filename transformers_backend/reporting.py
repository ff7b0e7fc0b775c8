"""From the job config to what reports on a run: the trainer's MetricsLogger and profilers, as the sections say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from parallelize.costs import peak_flops
from transformers_backend.job_config import JobConfig, Profiling
from transformers_backend.metrics import MetricsLogger, open_trackers
from transformers_backend.profiling import Stepper, maybe_profile, maybe_record_memory


def build_metrics(
    config: JobConfig,
    *,
    dump_folder: Path,
    device: torch.device,
    computes_in: torch.dtype,
    flops_per_token: float,
    rank: int,
    world_size: int,
    steps_done: int,
) -> MetricsLogger:
    """The logger of this rank; rank 0's has the trackers that [metrics] asks for.

    computes_in: dtype of the computation, whose peak utilisation is measured against. steps_done: optimizer steps of
    the checkpoint that the run resumed from, 0 for a new run.
    """
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
    on_cuda = device.type == "cuda"
    return MetricsLogger(
        dump_folder,
        is_main=rank == 0,
        device=device,
        flops_per_token=flops_per_token,
        peak_flops_per_device=peak_flops(torch.cuda.get_device_name(device), computes_in) if on_cuda else None,
        world_size=world_size,
        steps_done=steps_done,
        total_steps=config.training.steps,
        progress_bar=metrics.progress_bar,
        trackers=trackers,
    )


@contextlib.contextmanager
def profilers(
    section: Profiling, *, dump_folder: Path, device: torch.device, rank: int, steps_done: int
) -> Iterator[tuple[Stepper, Stepper]]:
    """The profiler and the memory recorder of this rank: call `.step()` on both after every optimizer step."""
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
