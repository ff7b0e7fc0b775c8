"""Puts kernels into a model: forwards of single modules, on the instances, whose names and parameters stay.

Comes first of all that changes a model (`parallelize/model.py`): tensor parallelism then gives the new forward local
parameters, and recomputation and the compiler see it in the layer. Which module may have which kernel is decided where
models are known (`transformers_backend/kernel_plan.py`).
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from parallelize.kernels.gated_activation import gated_activation, gated_activation_reference, packed_gated_activation
from parallelize.kernels.rms_norm import rms_norm, rms_norm_reference


class ModuleKernel(Protocol):
    """What runs in the place of a module's forward."""

    kernel: str
    """Its name among `parallelize.config.KERNELS`."""

    def forward(self, module: nn.Module, *args, **kwargs):
        """In the place of `type(module).forward`, with the parameters that the module has at that moment."""


@dataclass(frozen=True)
class NormKernel:
    """RMSNorm of a module with a `weight`, or with none; the arguments are those of `rms_norm`."""

    eps: float
    offset: float
    rounds_first: bool
    has_weight: bool
    kernel: str = "rms_norm"

    def forward(self, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._compute(rms_norm, module, hidden_states)

    def reference(self, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same in plain torch."""
        return self._compute(rms_norm_reference, module, hidden_states)

    def _compute(self, function, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = module.weight if self.has_weight else None
        return function(hidden_states, weight, self.eps, offset=self.offset, rounds_first=self.rounds_first)


@dataclass(frozen=True)
class GatedActivationKernel:
    """chain(act(gate) * up) of a module that calls its children for all but the activation and the product.

    They are called as before, in their order, whatever has become of them: split, hooked, wrapped.
    """

    activation: str
    """One of `parallelize.kernels.gated_activation.ACTIVATIONS`."""
    producers: tuple[str, ...]
    """Children that are given the input, in the order of their calls: one of gate and up, or one for both."""
    form: str
    """What they return: "gate up" or "up gate", of two or of one in halves, or "gate" where there is no up."""
    chain: tuple[str, ...]
    """Children that the product goes through, one after the other: a dropout or a norm where there is one, down."""
    skipped: str | None
    """The child that was the activation, which is not called any more."""
    kernel: str = "gated_activation"

    def forward(self, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        produced = [getattr(module, name)(hidden_states) for name in self.producers]
        if len(produced) == 1 and self.form != "gate":
            product = packed_gated_activation(produced[0], self.activation, gate_first=self.form == "gate up")
        else:
            product = gated_activation(*self.gate_and_up(produced), self.activation)
        return self._finish(module, product)

    def reference(self, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same in plain torch."""
        produced = [getattr(module, name)(hidden_states) for name in self.producers]
        return self._finish(module, gated_activation_reference(*self.gate_and_up(produced), self.activation))

    def gate_and_up(self, produced: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of what the producers return."""
        if self.form == "gate":
            return produced[0], None
        first, second = produced[0].chunk(2, dim=-1) if len(produced) == 1 else produced
        return (first, second) if self.form == "gate up" else (second, first)

    def _finish(self, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        for name in self.chain:
            hidden_states = getattr(module, name)(hidden_states)
        return hidden_states


def apply_kernels(model: nn.Module, kernels: Mapping[str, ModuleKernel]) -> None:
    """Replace the forwards of the modules that `kernels` names, of those that this rank has."""
    present = dict(model.named_modules())
    for name in kernels.keys() & present.keys():
        replace_forward(present[name], kernels[name])


def replace_forward(module: nn.Module, kernel: ModuleKernel) -> None:
    # A bound method, because a copy of the module then has one that is bound to the copy.
    module.forward = types.MethodType(_Forward(kernel), module)


@dataclass(frozen=True)
class _Forward:
    kernel: ModuleKernel

    def __call__(self, module: nn.Module, *args, **kwargs):
        return self.kernel.forward(module, *args, **kwargs)
