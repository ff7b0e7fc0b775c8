"""What the machine is, the most that it can do (matrix products, copies), and what a process holds of its memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

_BESIDE = ("triton", "accelerate", "liger-kernel", "torchtitan", "flash-attn")  # packages whose versions matter


def describe_machine() -> dict[str, Any]:
    model_names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model_names[0] if model_names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory[0], 1) if memory else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "packages": {name: version for name in _BESIDE if (version := _version(name)) is not None},
    }


def machine_in_words(machine: dict[str, Any]) -> str:
    where = machine["device"] or f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    beside = "".join(f", {name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['date']}; {where}; Python {machine['python']}, torch {machine['torch']}{cuda}, "
        f"transformers {machine['transformers']}{beside}."
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


# -- the most that it can do -------------------------------------------------------------------------------------------


def measure_ceiling(precision: str, threads: int) -> float:
    """FLOP/s of the best of several large square matrix products: what a training step can at most come near to."""
    return _in_a_process(time_matrix_products, precision, threads)


def measure_bandwidth() -> float:
    """Bytes/s of the best of several large copies on the device, read and written bytes counted both."""
    return _in_a_process(time_copies)


def _in_a_process(measure: Callable[..., float], *arguments: Any) -> float:
    if not torch.cuda.is_available():
        return measure(*arguments)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own holds no memory afterwards
        return pool.apply(measure, arguments)


def time_matrix_products(precision: str, threads: int) -> float:
    torch.set_num_threads(threads)
    on_cuda = torch.cuda.is_available()
    size, dtype = 8192 if on_cuda else 2048, torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device="cuda" if on_cuda else "cpu").to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: left @ right)


def time_copies() -> float:
    size = 2**30 if torch.cuda.is_available() else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.zeros_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source))


def _best_seconds(action: Callable[[], Any]) -> float:
    best, repeats = float("inf"), 20 if torch.cuda.is_available() else 1
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(repeats):
            action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


# -- memory, in bytes: allocated on the CUDA device, else resident in RAM ----------------------------------------------


def peak_memory() -> int:
    """Largest use since `reset_peak_memory`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _process_status("VmHWM")


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS


def resident_memory() -> int:
    """What the process holds now: what the imported libraries cost, before a model exists."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _process_status("VmRSS")


def _process_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
