"""What a run reports: one log line and one JSON object an interval, TensorBoard where asked for.

The trainer hands `MetricsLogger.log` numbers that are already reduced over ranks; rates, utilisation, memory and time
are worked out here. `setup_logging` gives the whole program one log format.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from parallelize import costs

logger = logging.getLogger(__name__)

GIB = 2**30
_HANDLER = "transformers_backend"
# `python -m transformers_backend.train` runs under the name __main__.
_OWN_LOGGERS = ("transformers_backend", "parallelize", "__main__")


def setup_logging(rank: int) -> None:
    """Log in one format, `[rank0] 12:00:01 message`, to stderr: rank 0 from INFO on, other ranks from WARNING on.

    Other libraries speak from WARNING on, on every rank. Calling it again replaces the earlier set-up.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == _HANDLER]:
        root.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.set_name(_HANDLER)
    handler.setFormatter(logging.Formatter(f"[rank{rank}] %(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)


class MetricsLogger:
    """Writes `metrics.jsonl` and `validation.jsonl` into `dump_folder`, logs a line for each, and feeds TensorBoard.

    Only the main rank writes; on other ranks every method returns at once, so all ranks may call alike. Files are
    appended to, so a resumed run continues them (steps after its checkpoint then occur twice: the last one counts),
    and each line is on its way to the disk when the call returns, so that a killed run loses none. JSON has no NaN or
    infinity: non-finite numbers are written as null.

    A line of `metrics.jsonl` has these keys, then those of `extra`:

        step                          optimizer steps done
        loss                          nats a target token, mean over the global batch
        grad_norm                     global norm before clipping
        lr                            learning rate of the step
        tokens_per_second             all ranks together, since the last log
        tokens_per_second_per_device  the same divided by world_size
        tflops_per_device             model TFLOP/s by the formula in parallelize/costs.py
        mfu                           that as a fraction of the device's peak; null where the peak is unknown
        peak_memory_gib               GiB so far on this rank: reserved on the CUDA device, else resident in RAM
        time_s                        seconds since this process started the run (not counting runs it resumed)

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
        tensorboard_folder: Path | None,
    ) -> None:
        self._is_main = is_main
        self._device = device
        self._flops_per_token = flops_per_token
        self._peak_flops_per_device = peak_flops_per_device
        self._world_size = world_size
        self._start = self._last_log = time.perf_counter()
        self._metrics_file: TextIO | None = None
        self._validation_file: TextIO | None = None
        self._tensorboard = None
        if is_main:
            if tensorboard_folder is not None:
                self._tensorboard = _summary_writer(tensorboard_folder)
            dump_folder.mkdir(parents=True, exist_ok=True)
            self._metrics_file = _open_lines(dump_folder / "metrics.jsonl")
            self._validation_file = _open_lines(dump_folder / "validation.jsonl")

    def log(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        extra: dict[str, float] | None = None,
    ) -> None:
        """Record step `step`; `tokens` is what all ranks together processed since the last log."""
        if not self._is_main:
            return
        now = time.perf_counter()
        tokens_per_second = tokens / max(now - self._last_log, 1e-9)
        self._last_log = now
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
            **(extra or {}),
        }
        logger.info(_line(record))
        self._write(self._metrics_file, record, prefix="train")

    def log_validation(self, step: int, loss: float, tokens: int, seconds: float | None = None) -> None:
        """Record a validation after step `step` over `tokens` tokens of all ranks.

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
        self._write(self._validation_file, record, prefix="validation")

    def close(self) -> None:
        """Close the files; further calls of `close` do nothing."""
        for open_file in (self._metrics_file, self._validation_file, self._tensorboard):
            if open_file is not None:
                open_file.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, lines: TextIO | None, record: dict[str, Any], *, prefix: str) -> None:
        assert lines is not None, "only the main rank writes"
        finite = {key: value if _is_json_number(value) else None for key, value in record.items()}
        lines.write(json.dumps(finite, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            for key, value in record.items():
                if key != "step" and value is not None:
                    self._tensorboard.add_scalar(f"{prefix}/{key}", value, record["step"])


def peak_memory_gib(device: torch.device) -> float:
    """The peak so far in GiB: memory reserved on a CUDA device by this process, else its resident set in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # bytes on macOS, KiB elsewhere


def _line(record: dict[str, Any]) -> str:
    """The aligned line that a human reads."""
    utilisation = "" if record["mfu"] is None else f"  mfu {record['mfu']:6.1%}"
    return (
        f"step {record['step']:>7}  loss {record['loss']:8.4f}  grad norm {record['grad_norm']:8.3f}"
        f"  lr {record['lr']:.2e}  {record['tokens_per_second']:>12,.0f} tokens/s"
        f"  {record['tflops_per_device']:7.2f} TFLOP/s/device{utilisation}"
        f"  peak {record['peak_memory_gib']:6.2f} GiB"
    )


def _is_json_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _open_lines(path: Path) -> TextIO:
    return path.open("a", buffering=1, encoding="utf-8")  # line-buffered


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "metrics.enable_tensorboard = true needs the tensorboard package, which is not installed: "
            "`pip install tensorboard`, or set it to false (metrics.jsonl has the same numbers)."
        ) from error
    return SummaryWriter(log_dir=str(folder))
