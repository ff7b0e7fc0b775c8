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

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from parallelize.tensor_parallel.collectives import cut, gather_and_enter, join, leave_and_scatter, pad_to_multiple
from parallelize.tensor_parallel.randomness import ForkedRandomness

_SEQUENCE = -2  # of (batch, seq, hidden), of (tokens, hidden), and of (streams, batch, seq, hidden)


@dataclass(frozen=True)
class Stack:
    """Layers that run one after another."""

    layers: tuple[str, ...]
    """Their names."""
    is_handed_on: bool = False
    """Whether the next stage of a pipeline goes on with what the last of them yields."""


class SequenceShards:
    """Cuts the sequence before the first layer and joins it after the last; any length, padded inside."""

    def __init__(self, group: dist.ProcessGroup, randomness: ForkedRandomness | None = None) -> None:
        """randomness: what gives each rank random numbers of its own for its part; None where none are drawn."""
        self.group = group
        self._randomness = randomness
        self._length = 0  # of the sequence that is in the layers now

    def install(
        self, layers: Sequence[nn.Module], arguments: Sequence[str] = (), *, is_handed_on: bool = False
    ) -> None:
        """`layers` run one after another; `arguments` of theirs travel with the hidden states and are cut as they.

        is_handed_on: the next stage of a pipeline goes on with this rank's part, so nothing is joined after the last.
        """
        layers[0].register_forward_pre_hook(self._before_first, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave if is_handed_on else self._after_last)
        for layer in layers:
            if names := [name for name in inspect.signature(layer.forward).parameters if name in arguments]:
                _change_arguments(layer, names, self._cut)

    def enter_region(self, shard: torch.Tensor) -> torch.Tensor:
        """(batch, seq / ranks, hidden) -> (batch, seq, hidden)"""
        whole = gather_and_enter(shard, shard.dim() + _SEQUENCE, self.group)
        # Tokens of padding at the end would be seen by no other token, but masks and positions have the true length.
        # Contiguous as a plain model's, of which a view may be taken.
        return whole if whole.dim() == 2 else whole.narrow(_SEQUENCE, 0, self._length).contiguous()

    def leave_region(self, term: torch.Tensor) -> torch.Tensor:
        """This rank's term (batch, seq, hidden) of a sum -> its shard (batch, seq / ranks, hidden) of the sum"""
        dim = term.dim() + _SEQUENCE
        padded = pad_to_multiple(term, dim, dist.get_world_size(self.group))
        return leave_and_scatter(padded, dim, self.group)

    def compute_whole(self, module: nn.Module) -> None:
        """Let a module that nothing splits see the whole sequence, and give back this rank's part of its output."""
        plain_forward = module.forward

        @functools.wraps(plain_forward)
        def forward(*args, **kwargs):
            output = plain_forward(*args, **kwargs)
            if isinstance(output, torch.Tensor):
                return self._cut(output)
            return type(output)([self._cut(output[0]), *output[1:]])

        module.forward = forward
        first = next(iter(inspect.signature(plain_forward).parameters))
        _change_arguments(module, [first], self._joined)

    def _before_first(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        whole = args[0] if args else kwargs["hidden_states"]
        self._length = whole.shape[_SEQUENCE]
        shard = self._cut(whole)
        if self._randomness is not None and layer.training:
            self._randomness.enter()
        return ((shard, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": shard})

    def _leave(self, layer: nn.Module, args: tuple, output) -> None:
        if self._randomness is not None:
            self._randomness.leave()

    def _after_last(self, layer: nn.Module, args: tuple, output):
        self._leave(layer, args, output)
        if isinstance(output, torch.Tensor):
            return self._joined(output)
        return type(output)([self._joined(output[0]), *output[1:]])  # a tuple or a list, by the model's convention

    def _cut(self, whole: torch.Tensor) -> torch.Tensor:
        dim = whole.dim() + _SEQUENCE
        return cut(pad_to_multiple(whole, dim, dist.get_world_size(self.group)), dim, self.group)

    def _joined(self, shard: torch.Tensor) -> torch.Tensor:
        whole = join(shard, shard.dim() + _SEQUENCE, self.group)
        if whole.shape[_SEQUENCE] == self._length:
            return whole
        # A copy, because FSDP2's hook on the output of a layer does not survive what changes a view in place.
        return whole.narrow(_SEQUENCE, 0, self._length).clone()


def _change_arguments(module: nn.Module, names: Sequence[str], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let the module's forward see changed tensors for the arguments `names`, however they are passed."""
    plain_forward = module.forward
    order = list(inspect.signature(plain_forward).parameters)

    @functools.wraps(plain_forward)
    def forward(*args, **kwargs):
        positional = [_changed(name in names, value, change) for name, value in zip(order, args, strict=False)]
        kwargs = {name: _changed(name in names, value, change) for name, value in kwargs.items()}
        return plain_forward(*positional, *args[len(order) :], **kwargs)

    module.forward = forward


def _changed(is_named: bool, value, change: Callable[[torch.Tensor], torch.Tensor]):
    return change(value) if is_named and isinstance(value, torch.Tensor) else value
