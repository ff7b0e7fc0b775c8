"""MetricsLogger: the figures of an interval of training, and all the places that they go to.

The trainer hands `MetricsLogger.log` numbers that are already reduced over ranks; rates, shares, utilisation, memory
and time are worked out here.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parallelize import costs
from transformers_backend.metrics.files import StepLines
from transformers_backend.metrics.terminal import ProgressBar, duration
from transformers_backend.metrics.trackers import Tracker

logger = logging.getLogger(__name__)

GIB = 2**30


class MetricsLogger:
    """Writes `metrics.jsonl` and `validation.jsonl` into `dump_folder`, logs a line for each, and feeds the trackers.

    Only the main rank writes; on other ranks every method returns at once, so all ranks may call alike. A resumed run
    continues the files from its checkpoint on, a new run begins new ones, see `files.py`.

    A line of `metrics.jsonl` has these keys, then those of `extra`:

        step                          optimizer steps done
        loss                          nats a target token, mean over the global batch
        grad_norm                     global norm before clipping
        lr                            learning rate of the step
        tokens_per_second             all data ranks together, since the last log
        tokens_per_second_per_device  the same divided by world_size: tensor-parallel ranks share in each token
        tflops_per_device             model TFLOP/s by the formula in parallelize/costs.py
        mfu                           that as a fraction of the device's peak; null where the peak is unknown
        peak_memory_gib               GiB so far on this rank: reserved on the CUDA device, else resident in RAM
        time_s                        seconds since this process started the run (not counting runs it resumed)
        data_wait_share               part of the interval, 0 to 1, that this rank waited for its data; null: not known
        compile_s                     seconds of the interval that this rank spent compiling; null: not known

    A line of `validation.jsonl` has step, validation_loss, tokens, tokens_per_second (null where not timed), time_s.
    """

    def __init__(
        self,
        dump_folder: Path,
        *,
        is_main: bool,
        device: torch.device,
        flops_per_token: float,
        peak_flops_per_device: float | None,
        world_size: int,
        steps_done: int,
        total_steps: int,
        keep_earlier: bool = False,
        progress_bar: bool = False,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """world_size: number of devices, whatever each of them does of a token.

        steps_done: optimizer steps of the checkpoint that the run resumed from, 0 for a new run.
        keep_earlier: set the folder's earlier files aside, even those of the run that this one resumed from. The
        trackers are closed with the logger.
        """
        self._is_main = is_main
        self._device = device
        self._flops_per_token = flops_per_token
        self._peak_flops_per_device = peak_flops_per_device
        self._world_size = world_size
        self._total_steps = total_steps
        self._start = self._last_log = time.perf_counter()
        self._last_step = steps_done
        self._trackers = list(trackers)
        self._bar = ProgressBar(steps_done=steps_done, total_steps=total_steps, enabled=progress_bar and is_main)
        if is_main:
            lines_until = 0 if keep_earlier else steps_done
            self._metrics_lines = StepLines(dump_folder / "metrics.jsonl", steps_done=lines_until)
            self._validation_lines = StepLines(dump_folder / "validation.jsonl", steps_done=lines_until)

    def advance(self) -> None:
        """Say that an optimizer step is done, whether it is logged or not."""
        self._bar.advance()

    def log(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        data_wait_seconds: float | None = None,
        compile_seconds: float | None = None,
        extra: dict[str, float] | None = None,
    ) -> None:
        """Record step `step`; `tokens` is what all data ranks together processed since the last log.

        data_wait_seconds: what of the time since then this rank waited for the next batch.
        compile_seconds: and what of it this rank compiled.
        """
        if not self._is_main:
            return
        now = time.perf_counter()
        seconds = max(now - self._last_log, 1e-9)
        tokens_per_second = tokens / seconds
        per_device = tokens_per_second / self._world_size
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": per_device,
            "tflops_per_device": per_device * self._flops_per_token / 1e12,
            "mfu": costs.mfu(per_device, self._flops_per_token, self._peak_flops_per_device),
            "peak_memory_gib": peak_memory_gib(self._device),
            "time_s": now - self._start,
            "data_wait_share": None if data_wait_seconds is None else min(data_wait_seconds / seconds, 1.0),
            "compile_s": compile_seconds,
            **(extra or {}),
        }
        seconds_left = (self._total_steps - step) * seconds / max(step - self._last_step, 1)
        self._last_log, self._last_step = now, step
        self._bar.show(f"loss {loss:.4f}")
        logger.info(_line(record, seconds_left))
        self._metrics_lines.write(record)
        self._track("train", record)

    def log_validation(self, step: int, loss: float, tokens: int, seconds: float | None = None) -> None:
        """Record a validation after step `step` over `tokens` tokens of all data ranks.

        `seconds` is what it took: that time is then not counted into the training throughput of the current interval.
        """
        if not self._is_main:
            return
        now = time.perf_counter()
        if seconds is not None:
            self._last_log = min(self._last_log + seconds, now)
        record = {
            "step": step,
            "validation_loss": loss,
            "tokens": tokens,
            "tokens_per_second": None if seconds is None else tokens / max(seconds, 1e-9),
            "time_s": now - self._start,
        }
        logger.info(f"step {step:>7}  validation loss {loss:8.4f}  over {tokens:,} tokens")
        self._validation_lines.write(record)
        self._track("validation", record)

    def close(self) -> None:
        """Close the files, the bar and the trackers; further calls of `close` do nothing."""
        if self._is_main:
            self._bar.close()
            self._metrics_lines.close()
            self._validation_lines.close()
        while self._trackers:
            self._trackers.pop().close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _track(self, prefix: str, record: dict[str, Any]) -> None:
        figures = {key: value for key, value in record.items() if key != "step" and value is not None}
        for tracker in self._trackers:
            tracker.write(prefix, record["step"], figures)


def peak_memory_gib(device: torch.device) -> float:
    """The peak so far in GiB: memory reserved on a CUDA device by this process, else its resident set in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # bytes on macOS, KiB elsewhere


def _line(record: dict[str, Any], seconds_left: float) -> str:
    """The aligned line that a human reads."""
    utilisation = "" if record["mfu"] is None else f"  mfu {record['mfu']:6.1%}"
    waiting = "" if record["data_wait_share"] is None else f"  data wait {record['data_wait_share']:6.1%}"
    compiling = f"  compiling {record['compile_s']:.1f} s" if record["compile_s"] else ""
    return (
        f"step {record['step']:>7}  loss {record['loss']:8.4f}  grad norm {record['grad_norm']:8.3f}"
        f"  lr {record['lr']:.2e}  {record['tokens_per_second']:>12,.0f} tokens/s"
        f"  {record['tflops_per_device']:7.2f} TFLOP/s/device{utilisation}"
        f"  peak {record['peak_memory_gib']:6.2f} GiB{waiting}{compiling}  left {duration(seconds_left)}"
    )
