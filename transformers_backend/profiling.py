"""Where time and memory go: torch profiler traces and CUDA memory snapshots, each a context around the training loop.

The trainer enters both and calls `.step()` on what they yield after every optimizer step; disabled ones do nothing.
Traces open in https://ui.perfetto.dev, snapshots in https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_MEMORY_EVENTS = 100_000  # the newest allocations and frees that a snapshot keeps


class Stepper:
    def step(self) -> None:
        """Say that an optimizer step is done. This one, of a disabled context, does nothing."""


@contextlib.contextmanager
def maybe_profile(
    *, enabled: bool, folder: Path, freq: int, active: int, warmup: int, rank: int, first_step: int = 0
) -> Iterator[Stepper]:
    """In every `freq` steps trace the last `active`, after `warmup` steps of tracing that are thrown away.

    Writes folder/rank{rank}_step{n}.json.gz, n being the last step in the trace. `first_step` is the number of steps
    done before (of a resumed run). A ValueError where active + warmup do not fit into freq.
    """
    if not enabled:
        yield Stepper()
        return
    if active < 1 or warmup < 0 or freq < warmup + active:
        raise ValueError(
            f"profiling.profile_freq = {freq}: must be at least profiler_warmup ({warmup}, 0 or more) + "
            f"profiler_active ({active}, 1 or more); raise profile_freq."
        )
    folder.mkdir(parents=True, exist_ok=True)

    def write_trace(profiler: torch.profiler.profile) -> None:
        path = folder / f"rank{rank}_step{first_step + profiler.step_num}.json.gz"
        profiler.export_chrome_trace(str(path))
        logger.info("profiler trace written to %s", path)

    schedule = torch.profiler.schedule(wait=freq - warmup - active, warmup=warmup, active=active)
    # Without `activities` torch records all that the machine supports: CPU, and CUDA where there is one.
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write_trace, record_shapes=True) as profiler:
        yield _Tracer(profiler)


@dataclass
class _Tracer(Stepper):
    profiler: torch.profiler.profile

    def step(self) -> None:
        with warnings.catch_warnings():
            # Meant so: a trace holds one cycle. Raised as an error, this warning leaves the profiler half built, and
            # leaving its context then crashes the interpreter (torch 2.13).
            warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
            self.profiler.step()


@contextlib.contextmanager
def maybe_record_memory(
    *, enabled: bool, folder: Path, freq: int, rank: int, device: torch.device, first_step: int = 0
) -> Iterator[Stepper]:
    """Write folder/rank{rank}_step{n}.pickle every `freq` steps, and rank{rank}_out_of_memory.pickle on such an end.

    CUDA only: on another device it warns and does nothing.
    """
    if enabled and device.type != "cuda":
        logger.warning("profiling.enable_memory_snapshot works on CUDA devices only, not on %s: ignored.", device.type)
    if not enabled or device.type != "cuda":
        yield Stepper()
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
    try:
        yield _MemoryRecorder(folder, freq, rank, first_step)
    except torch.OutOfMemoryError:
        torch.cuda.memory._dump_snapshot(str(folder / f"rank{rank}_out_of_memory.pickle"))
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@dataclass
class _MemoryRecorder(Stepper):
    folder: Path
    freq: int
    rank: int
    done: int

    def step(self) -> None:
        self.done += 1
        if self.done % self.freq == 0:
            path = self.folder / f"rank{self.rank}_step{self.done}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            logger.info("memory snapshot written to %s", path)
