"""The ways in which ranks compute attention over a sequence that they share, by name; all with one signature."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parallelize.context_parallel.allgather import allgather_attention
from parallelize.context_parallel.ring import ring_attention
from parallelize.context_parallel.ulysses import ulysses_attention

METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "ring": ring_attention,
    "allgather": allgather_attention,
    "ulysses": ulysses_attention,
}
"""The values of `ParallelismConfig.context_parallel_method`."""
