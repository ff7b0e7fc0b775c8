"""The sections of a job's TOML file that say how a run is watched and guarded, in the manner of `sections.py`."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_backend.job_config.rules import below_minimum, empty_strings


@dataclass
class Metrics:
    log_freq: int = 10
    """Steps between log lines and between entries of metrics.jsonl."""

    progress_bar: bool = True
    """Show a progress bar with the time left where stderr is a terminal."""

    enable_tensorboard: bool = False
    """Write the metrics for TensorBoard too."""

    save_tb_folder: str = "tb"
    """Folder of the TensorBoard files, inside job.dump_folder."""

    enable_wandb: bool = False
    """Send the metrics to Weights & Biases too, as a run named like job.dump_folder with job.description as notes.
    Project and account are W&B's own settings: wandb login, WANDB_PROJECT, WANDB_MODE=offline."""

    def problems(self) -> list[str]:
        return [*below_minimum("metrics", self, log_freq=1), *empty_strings("metrics", self, "save_tb_folder")]


@dataclass
class Profiling:
    enable_profiling: bool = False
    """Record traces with torch.profiler."""

    save_traces_folder: str = "profile_traces"
    """Folder of the traces, inside job.dump_folder."""

    profile_freq: int = 10
    """Steps from one trace to the next."""

    profiler_active: int = 1
    """Steps that a trace records."""

    profiler_warmup: int = 3
    """Steps that the profiler runs for before it records."""

    enable_memory_snapshot: bool = False
    """Record the CUDA memory history and save it every profile_freq steps."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots, inside job.dump_folder."""

    max_ranks: int = 8
    """Traces and snapshots are of this many ranks only, from rank 0 on. -1 means all ranks."""

    def problems(self) -> list[str]:
        found = empty_strings("profiling", self, "save_traces_folder", "save_memory_snapshot_folder")
        found += below_minimum("profiling", self, profile_freq=1, profiler_active=1, profiler_warmup=0)
        if self.max_ranks != -1 and self.max_ranks < 1:
            found.append(f"profiling.max_ranks = {self.max_ranks}: must be at least 1, or -1 for all ranks.")
        if self.profiler_active + self.profiler_warmup > self.profile_freq >= 1:
            found.append(
                f"profiling.profile_freq = {self.profile_freq}: must be at least profiler_warmup + profiler_active = "
                f"{self.profiler_warmup + self.profiler_active}; raise it."
            )
        return found


@dataclass
class Comm:
    init_timeout_seconds: int = 300
    """Seconds that a collective may take up to and including the first step, where compilation happens."""

    train_timeout_seconds: int = 100
    """Seconds that a collective may take after the first step."""

    trace_buf_size: int = 0
    """Collectives that torch's flight recorder keeps in mind on each rank, and writes down when one fails or takes too
    long, e.g. 20000. 0 means none."""

    save_traces_folder: str = "comm_traces"
    """Folder of the flight recorder's files, inside job.dump_folder."""

    save_traces_file_prefix: str = "rank_"
    """Start of their names, before the number of the rank."""

    def problems(self) -> list[str]:
        found = below_minimum("comm", self, init_timeout_seconds=1, train_timeout_seconds=1, trace_buf_size=0)
        return found + empty_strings("comm", self, "save_traces_folder", "save_traces_file_prefix")


@dataclass
class Debug:
    seed: int = 42
    """Seed of the initial weights, the order of the data and dropout."""

    deterministic: bool = False
    """Use deterministic algorithms only, so that two runs are equal bit by bit; slower."""

    deterministic_warn_only: bool = False
    """With deterministic: warn about operations that have no deterministic form instead of stopping."""

    skip_nonfinite_steps: bool = False
    """On a non-finite loss or gradient norm: true skips the optimizer step, false stops the run naming step and
    rank."""

    def problems(self) -> list[str]:
        return below_minimum("debug", self, seed=0)
