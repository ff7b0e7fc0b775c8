"""Mixed precision on a single data rank, where there is nothing to shard: compute with casts of the parameters.

Under FSDP2 the gathered parameters already are low-precision copies (`MixedPrecisionPolicy`). On one data rank its
gathering and reducing would only copy memory around, so the copies are made here, with the same meaning: parameters
are kept, accumulated into and updated in their own dtype (fp32), and every layer computes in `dtype`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def parameters_cast_to(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block, the modules of `model` hold their floating-point parameters cast to `dtype` (None: as is).

    The casts are part of the autograd graph: a backward adds the gradient, cast back, to the parameter's own `.grad`.
    Forward and backward both belong in the block, because recomputed activations read the parameters again. Buffers
    (rotary frequencies) keep their dtype. Tied parameters share one cast.
    """
    places = [
        (module, name, parameter)
        for module in (model.modules() if dtype is not None else ())
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype
    ]
    casts: dict[int, torch.Tensor] = {}
    for _, _, parameter in places:
        if id(parameter) not in casts:
            casts[id(parameter)] = parameter.to(dtype)
    try:
        for module, name, parameter in places:
            module._parameters[name] = casts[id(parameter)]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
