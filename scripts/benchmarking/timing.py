"""Seconds and memory of small computations on a device: a kernel, forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_CACHE_BYTES = 2**28  # more than any device's cache: written before every measurement, so that nothing is found there
_SECONDS = 0.25  # to measure one thing for


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """The median of several runs, none of which finds its inputs in the device's cache."""
    for _ in range(2):
        action()  # compiles, tunes and takes memory
    if device.type != "cuda":
        return statistics.median(_seconds_on_host(action) for _ in range(3))
    cache = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)
    once = _seconds_on_cuda(action, cache, 1)[0]
    return statistics.median(_seconds_on_cuda(action, cache, max(3, min(50, int(_SECONDS / once)))))


def _seconds_on_host(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _seconds_on_cuda(action: Callable[[], Any], cache: torch.Tensor, repeats: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        cache.zero_()
        start.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairs]


def forward_backward(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor] | None = None
) -> Callable[[], list[torch.Tensor]]:
    """An action that computes outputs and the gradients of all inputs that want one, and returns both.

    grads: of the outputs; None for a scalar.
    """
    wanted = [one for one in inputs if one.requires_grad]

    def action() -> list[torch.Tensor]:
        out = function(*inputs)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        return [*(one.detach() for one in outs), *torch.autograd.grad(outs, wanted, grads)]

    return action


def memory_of(action: Callable[[], list[torch.Tensor]]) -> int | None:
    """Bytes that it takes at most, beyond what it returns (and what is there before); None without CUDA."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(one.numel() * one.element_size() for one in found)


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest relative difference (root mean square) between tensors and what they should be."""
    return max(
        float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
        for one, other in zip(found, expected, strict=True)
    )
