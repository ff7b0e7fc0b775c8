"""Triton, where it is installed: `jit` and `tl` for kernels, and whether they run on a tensor's device.

PyTorch's CPU build comes without Triton. Kernels are then defined, and never launched.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

if importlib.util.find_spec("triton") is None:
    tl = None
    _interpreted = False
    VERSION, CACHE_FOLDER = None, Path()

    def jit(kernel):
        """Leave a kernel that is never launched as it is."""
        return kernel

    class OutOfResources(Exception):
        """Never raised: nothing is launched."""

    KERNEL_ERRORS = (RuntimeError,)

else:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources

    jit = triton.jit
    KERNEL_ERRORS = (TritonError, RuntimeError)
    # As it is when `jit` sees the kernels below, which decides for each of them.
    _interpreted = triton.knobs.runtime.interpret
    VERSION = triton.__version__
    # As it is now: the compiler of PyTorch later sets another for every device.
    CACHE_FOLDER = Path(triton.knobs.cache.dir)

__all__ = [
    "CACHE_FOLDER", "KERNEL_ERRORS", "VERSION", "OutOfResources", "jit", "launches_on", "next_power_of_two",
    "processors", "tl",
]  # fmt: skip


def launches_on(device: torch.device) -> bool:
    """Whether kernels run there: on GPUs, and everywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
    return tl is not None and (device.type == "cuda" or _interpreted)


def processors(device: torch.device) -> int:
    """Of a GPU, as many as run programs at a time; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
