"""Puts kernels into a model: forwards of single modules, on the instances, whose names and parameters stay.

Comes first of all that changes a model (`parallelize/model.py`): tensor parallelism then gives the new forward local
parameters, and recomputation and the compiler see it in the layer. Which module may have which kernel is decided where
models are known (`transformers_backend/kernel_plan.py`).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from parallelize.kernels.gated_activation import gated_activation, gated_activation_reference, packed_gated_activation
from parallelize.kernels.rms_norm import rms_norm, rms_norm_reference
from parallelize.kernels.rotary import RotaryForm, rotary


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


@dataclass(frozen=True)
class RotaryKernel:
    """An attention module's own forward, in which one function that rotates queries and keys is another one.

    The forward is a copy of the class's with globals of its own; the model's file is left alone. The function takes
    (query, key, cos, sin, unsqueeze_dim=1); calls of another kind go to the model's own.
    """

    function: str
    """Its name in the globals of the class's forward."""
    form: RotaryForm
    is_partial: bool
    """Whether the model's function takes tables narrower than heads."""
    kernel: str = "rotary"

    def method(self, forward: types.FunctionType, rotate: Callable = rotary) -> types.FunctionType:
        """Such a copy of `forward`."""
        plain = forward.__globals__[self.function]
        form, is_partial = self.form, self.is_partial

        def rotated(q, k, cos, sin, unsqueeze_dim=1):
            if unsqueeze_dim not in (1, 2) or not _are_rotary_tables(q, k, cos, sin, 3 - unsqueeze_dim, is_partial):
                return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            if unsqueeze_dim == 1:
                return rotate(q, k, cos, sin, form)
            query, key = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, form)
            return query.transpose(1, 2), key.transpose(1, 2)

        # Without a name of their own, or the compiler would look the function up in the module of that name.
        names = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
        copied = types.FunctionType(
            forward.__code__, {**names, self.function: rotated}, forward.__name__, forward.__defaults__,
            forward.__closure__,
        )  # fmt: skip
        copied.__kwdefaults__ = forward.__kwdefaults__
        return copied


def _are_rotary_tables(q, k, cos, sin, token_dimension: int, is_partial: bool) -> bool:
    """Whether the kernel takes these; other shapes that broadcast are the model's own function's."""
    if not q.ndim == k.ndim == 4 or not cos.ndim == sin.ndim == 3:
        return False
    batch, tokens, head_size = q.shape[0], q.shape[token_dimension], q.shape[-1]
    return (
        (k.shape[0], k.shape[token_dimension], k.shape[-1]) == (batch, tokens, head_size)
        and cos.shape == sin.shape
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == tokens  # the kernel would read beyond a table that is one row for all tokens
        and (cos.shape[-1] == q.shape[-1] or (is_partial and cos.shape[-1] < q.shape[-1]))
        and not (cos.requires_grad or sin.requires_grad)
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody gave this instance a forward that is not its class's."""
    return "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after its forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def apply_kernels(model: nn.Module, kernels: Mapping[str, ModuleKernel | RotaryKernel]) -> None:
    """Replace the forwards of the modules that `kernels` names, of those that this rank has."""
    present = dict(model.named_modules())
    methods: dict[tuple[type, object], Callable] = {}  # one for all layers, which the compiler then compiles once
    for name in kernels.keys() & present.keys():
        kind = type(present[name]), kernels[name]
        methods[kind] = methods.get(kind) or _method(*kind)
        replace_forward(present[name], kernels[name], methods[kind])


def replace_forward(module: nn.Module, kernel: ModuleKernel | RotaryKernel, method: Callable | None = None) -> None:
    # A bound method, because a copy of the module then has one that is bound to the copy.
    module.forward = types.MethodType(method or _method(type(module), kernel), module)


def _method(kind: type, kernel: ModuleKernel | RotaryKernel) -> Callable:
    return kernel.method(kind.forward) if isinstance(kernel, RotaryKernel) else _Forward(kernel)


@dataclass(frozen=True)
class _Forward:
    kernel: ModuleKernel

    def __call__(self, module: nn.Module, *args, **kwargs):
        return self.kernel.forward(module, *args, **kwargs)
