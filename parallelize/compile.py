"""torch.compile, layer by layer: small graphs that compile fast and that FSDP2's hooks stay outside of."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch._dynamo.callback import CallbackArgs, callback_handler
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.pgo import reset_code_state

from parallelize.tensor_parallel.local import with_local_parameters

COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)
"""What a layer that cannot be compiled as one graph raises at its first call."""

# Layers of one class share their code, and the compiler counts compilations by code: a model may have several kinds of
# layer (gemma3n has six), each compiled for training, for validation and for another batch size. torch's limit of 8
# guards against a compilation a step, which this still does.
_RECOMPILE_LIMIT = 64


def apply_compile(layers: Iterable[nn.Module], *, backend: str) -> None:
    """Compile the forward of each layer in place, as one graph each.

    Only `forward` is compiled, on the instance: hooks run around the compiled code, names do not change, and layers
    of the same class and kind share one compilation, because the compiler caches by code, not by instance.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    for layer in layers:
        compiled = torch.compile(layer.forward, backend=backend, fullgraph=True)
        layer.forward = with_local_parameters(layer, compiled)


class CompileTimer:
    """Within the block, the seconds that this process compiles: tracing and generating code, forward and backward.

    Time in which several threads compile counts once. Code that comes out of a cache on the disk counts for the time
    that it takes to find and load it.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began = 0.0

    def take(self) -> float:
        """The seconds since the block began, or since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def __enter__(self) -> CompileTimer:
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._start in callback_handler.start_callbacks:  # `torch.compiler.reset` takes all of them away
            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)

    def _start(self, _: CallbackArgs) -> None:
        self._began = time.perf_counter()

    def _end(self, _: CallbackArgs) -> None:
        self._seconds += time.perf_counter() - self._began


@contextlib.contextmanager
def compiled_for_now() -> Iterator[None]:
    """Within the block a small copy of a model is compiled; the compiler knows no sizes when it begins, nor after it.

    The compiler takes a size that it has seen another value of for one that keeps changing. The layers of the model
    itself are the same code as the copy's, so that it would compile them for batches and sequences of any size: slower
    to compile (on a CPU, 20 seconds for a layer instead of one) and slower to run. What is compiled already stays.
    """
    reset_code_state()
    try:
        yield
    finally:
        reset_code_state()
