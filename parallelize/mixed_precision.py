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
def parameters_cast_to(
    model: nn.Module, dtype: torch.dtype | None, *, backward_in_halves: bool = False
) -> Iterator[None]:
    """Within the block, the modules of `model` hold their floating-point parameters cast to `dtype` (None: as is).

    The casts are part of the autograd graph: a backward adds the gradient, cast back, to the parameter's own `.grad`.
    Forward and backward both belong in the block, because recomputed activations read the parameters again. Buffers
    (rotary frequencies) keep their dtype. Tied parameters share one cast. Embeddings look rows up in the parameter as
    it is kept and cast these, which are the same, and fewer.

    backward_in_halves: whether gradients of inputs and of weights may be computed at different times. What does so
    looks for those of the casts that modules hold, and `kept_parameter` then says nothing of what is behind these.
    """
    modules = list(model.modules()) if dtype is not None else []
    places = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype
    ]
    tables = {module for module, _, _ in places if _looks_rows_up(module)}
    casts: dict[int, torch.Tensor] = {}
    for module, _, parameter in places:
        if module not in tables and id(parameter) not in casts:
            casts[id(parameter)] = parameter.to(dtype)
            if not backward_in_halves:
                casts[id(parameter)].kept_parameter = parameter
    with contextlib.ExitStack() as stack:
        for module in tables:
            stack.callback(module.register_forward_hook(lambda module, inputs, rows: rows.to(dtype)).remove)
        for module, name, parameter in places:
            if module not in tables:
                module._parameters[name] = casts[id(parameter)]
                stack.callback(module._parameters.__setitem__, name, parameter)
        yield


def _looks_rows_up(module: nn.Module) -> bool:
    """Whether it does just that: where ranks have parts of a table, rows are added up over them, better in `dtype`."""
    return type(module) is nn.Embedding and "forward" not in vars(module)


def kept_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter that a module's one is a cast of, or the same: who knows gradients in fp32 can add them to that."""
    return getattr(parameter, "kept_parameter", parameter)
