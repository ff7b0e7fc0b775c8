"""Rotary embeddings whose frequencies depend on how long a sequence is, where a rank has only a part of it.

Transformers' "longrope" (Phi 3 with 128k) and "dynamic" types choose their frequencies by the latest of the positions
that they are given. Ranks that share a sequence have unlike ones, so that queries and keys would be turned by unlike
angles. Here such a module is given one position more, the latest of all ranks, and its result for that is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._pytree import tree_map_only


class WholeLengths:
    """Hooks on the rotary embeddings of one model."""

    def __init__(self, rotaries: Iterable[nn.Module]) -> None:
        self.latest: torch.Tensor | None = None
        """The latest position in the whole sequences that the model runs on, a scalar; None where it has these."""
        for rotary in rotaries:
            rotary.register_forward_pre_hook(self._add_latest, with_kwargs=True)
            rotary.register_forward_hook(self._drop_latest)

    def _add_latest(self, rotary: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.latest is None:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": self._longer(kwargs["position_ids"])}
        hidden_states, positions, *others = args
        return (hidden_states, self._longer(positions), *others), kwargs

    def _longer(self, positions: torch.Tensor) -> torch.Tensor:
        """(rows, local) -> (rows, local + 1)"""
        return torch.cat([positions, self.latest.expand(len(positions), 1)], 1)

    def _drop_latest(self, rotary: nn.Module, args: tuple, output):
        if self.latest is None:
            return None
        return tree_map_only(torch.Tensor, lambda angles: angles[:, :-1], output)  # (rows, local + 1, dim) each
