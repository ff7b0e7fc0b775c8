"""Sequence parallelism: between regions, every rank holds its part of the sequence.

    whole (batch, seq, hidden) -> cut -> layer -> layer -> ... -> join -> whole
                                          |
                     (batch, seq / ranks, hidden): norms, residuals, dropout
                     gather_and_enter -> (batch, seq, hidden): attention, mlp -> leave_and_scatter

An all-reduce at the end of each region becomes a reduce-scatter there and an all-gather at the next one's entry: the
same communication, and the activations between regions take 1 / ranks of the memory and of the work
(https://arxiv.org/abs/2205.05198).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from parallelize.tensor_parallel.collectives import cut, gather_and_enter, join, leave_and_scatter, pad_to_multiple

_SEQUENCE = -2  # of (batch, seq, hidden), and of (tokens, hidden) where a model flattens


class SequenceShards:
    """Cuts the sequence before the first layer and joins it after the last; any length, padded inside."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._length = 0  # of the sequence that is in the layers now

    def install(self, first: nn.Module, last: nn.Module) -> None:
        first.register_forward_pre_hook(self._before_first, with_kwargs=True)
        last.register_forward_hook(self._after_last)

    def enter_region(self, shard: torch.Tensor) -> torch.Tensor:
        """(batch, seq / ranks, hidden) -> (batch, seq, hidden)"""
        whole = gather_and_enter(shard, shard.dim() + _SEQUENCE, self.group)
        # Tokens of padding at the end would be seen by no other token, but masks and positions have the true length.
        return whole[:, : self._length] if whole.dim() == 3 else whole

    def leave_region(self, term: torch.Tensor) -> torch.Tensor:
        """This rank's term (batch, seq, hidden) of a sum -> its shard (batch, seq / ranks, hidden) of the sum"""
        dim = term.dim() + _SEQUENCE
        padded = pad_to_multiple(term, dim, dist.get_world_size(self.group))
        return leave_and_scatter(padded, dim, self.group)

    def _before_first(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        whole = args[0] if args else kwargs["hidden_states"]
        self._length = whole.shape[1]
        shard = cut(pad_to_multiple(whole, 1, dist.get_world_size(self.group)), 1, self.group)
        return ((shard, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": shard})

    def _after_last(self, layer: nn.Module, args: tuple, output):
        if isinstance(output, torch.Tensor):
            return self._joined(output)
        return type(output)([self._joined(output[0]), *output[1:]])  # a tuple or a list, by the model's convention

    def _joined(self, shard: torch.Tensor) -> torch.Tensor:
        return join(shard, 1, self.group)[:, : self._length]
