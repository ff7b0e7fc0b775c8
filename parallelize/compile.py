"""torch.compile, layer by layer: small graphs that compile fast and that FSDP2's hooks stay outside of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def apply_compile(layers: Iterable[nn.Module], *, backend: str) -> None:
    """Compile the forward of each layer in place, as one graph each.

    Only `forward` is compiled, on the instance: hooks run around the compiled code, names do not change, and layers
    of the same class and kind share one compilation, because the compiler caches by code, not by instance.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)
