"""torch.compile, layer by layer: small graphs that compile fast and that FSDP2's hooks stay outside of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

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


@contextlib.contextmanager
def compiled_for_now() -> Iterator[None]:
    """Within the block a small copy of a model is compiled; the compiler begins anew with it, and after it.

    The compiler takes a size that it has seen another value of for one that keeps changing. The layers of the model
    itself are the same code as the copy's, so that it would compile them for batches and sequences of any size: slower
    to compile (on a CPU, 20 seconds for a layer instead of one) and slower to run.
    """
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()
