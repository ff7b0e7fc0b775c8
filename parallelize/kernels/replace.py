"""Puts kernels into a model: forwards of single modules, on the instances, whose names and parameters stay.

Comes first of all that changes a model (`parallelize/model.py`): tensor parallelism then gives the new forward local
parameters, and recomputation and the compiler see it in the layer. Which module may have which kernel is decided where
models are known (`transformers_backend/kernel_plan.py`).
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

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
