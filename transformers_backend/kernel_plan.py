"""Which modules of a model compute by a kernel: found by what they compute, and proven before they are replaced.

    "auto" or names -> kinds of modules -> a copy of each, alone, with random weights, beside a kernel's plain-torch
    reference: equal outputs in fp32 and bf16, equal gradients -> {module's name: kernel} -> parallelize/kernels/

A kind is what computes alike: the class, the plain attributes (eps ...) and the shapes of the parameters. Each kind is
tried once; modules that no kernel fits stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from parallelize.config import KERNELS, KernelConfig
from parallelize.kernels.replace import ModuleKernel, NormKernel, RotaryKernel
from transformers_backend.decoder import describe_decoder
from transformers_backend.head_kernel import find_linear_head
from transformers_backend.kernel_gates import gate_kernels
from transformers_backend.kernel_rotary import rotary_kernels
from transformers_backend.loss import LinearHead
from transformers_backend.proof import MODEL_ERRORS
from transformers_backend.twin import build_twin

_COLUMNS = 96  # of what a module without parameters is tried on
_SLACK = 1e-5  # of gradients in fp32, relative to the largest


@dataclass
class KernelPlan:
    """What computes by a kernel, and what could not."""

    kernels: dict[str, ModuleKernel | RotaryKernel] = field(default_factory=dict)
    """By name of the module."""
    linear_head: LinearHead | None = None
    """What the head is, where the loss is computed from it without logits; `loss.py` does so."""
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many modules there are of (class, the kernel's name or why it has none)."""

    def add(self, name: str, module: nn.Module, found: ModuleKernel | RotaryKernel | str) -> None:
        """found: the module's kernel, or why it has none."""
        if not isinstance(found, str):
            self.kernels[name] = found
        self.kinds[type(module).__name__, found if isinstance(found, str) else found.kernel] += 1

    def summary(self) -> str:
        """How many modules compute by which kernel, e.g. "rms_norm 5"."""
        counts = Counter(kernel.kernel for kernel in self.kernels.values())
        if self.linear_head is not None:
            counts["linear_cross_entropy"] = 1
        return ", ".join(f"{name} {count}" for name, count in counts.items())


def choose_kernels(
    hf_model: PreTrainedModel, config: KernelConfig, device: torch.device, *, is_compiled: bool
) -> KernelPlan:
    """Find the modules of a whole model that may have one of the enabled kernels. Changes nothing."""
    names = enabled_kernels(config, device, is_compiled=is_compiled)
    plan = KernelPlan()
    if "rms_norm" in names:
        found: dict[tuple, NormKernel | str] = {}
        for name, module in _norms(hf_model):
            kind = _kind(module)
            if kind not in found:
                found[kind] = find_norm_kernel(module) or "computes something else"
            plan.add(name, module, found[kind])
    searches = {"gated_activation": gate_kernels, "rotary": rotary_kernels}
    if searches.keys() & set(names):
        twin = build_twin(hf_model.config, type(hf_model))
        for name in (name for name in searches if name in names):
            for module_and_kernel in searches[name](hf_model, twin):
                plan.add(*module_and_kernel)
    if "linear_cross_entropy" in names:
        head = find_linear_head(hf_model)
        plan.linear_head = head if isinstance(head, LinearHead) else None
        plan.kinds[describe_decoder(hf_model).head, head if isinstance(head, str) else "linear_cross_entropy"] += 1
    return plan


def enabled_kernels(config: KernelConfig, device: torch.device, *, is_compiled: bool) -> tuple[str, ...]:
    """The names that "auto" stands for: on a GPU all that the compiler does not make as well itself.

    Not linear_cross_entropy: it saves memory for a fourth matrix product, and how long that takes is unmeasured.
    """
    if config.enable == ["none"]:
        return ()
    if config.enable != ["auto"]:
        return tuple(config.enable)
    if device.type != "cuda" or is_compiled:
        return ()
    return tuple(name for name in KERNELS if name != "linear_cross_entropy")


def _norms(hf_model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are norms by the name of their class, and have nothing but perhaps a weight."""
    for name, module in hf_model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if "norm" in type(module).__name__.lower() and not list(module.children()) and parameters.keys() <= {"weight"}:
            yield name, module


def _kind(module: nn.Module) -> tuple:
    plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return type(module), tuple(sorted(plain.items())), tuple(sorted(shapes.items()))


def find_norm_kernel(module: nn.Module) -> NormKernel | None:
    """The kernel that computes what a norm computes, or None."""
    has_weight = any(True for _ in module.parameters())
    for eps in (value for value in vars(module).values() if isinstance(value, float)):
        for offset, rounds_first in ((0.0, True), (0.0, False), (1.0, False)) if has_weight else ((0.0, True),):
            kernel = NormKernel(eps, offset, rounds_first, has_weight)
            if _computes_the_same(module, kernel):
                return kernel
    return None


@torch.enable_grad()
def _computes_the_same(module: nn.Module, kernel: NormKernel) -> bool:
    for dtype in (torch.float32, torch.bfloat16):
        one = _filled(module, dtype)
        columns = next((parameter.shape[-1] for parameter in one.parameters()), _COLUMNS)
        generator = torch.Generator().manual_seed(3)
        # Rows of several sizes: in some eps decides, and in some it is nothing.
        sizes = torch.tensor([1e-3, math.sqrt(kernel.eps), 1.0, 30.0])
        x = (torch.randn(2, 4, columns, generator=generator) * sizes[:, None]).to(dtype).requires_grad_()
        try:
            expected = one(x)
            found = kernel.reference(one, x)
        except MODEL_ERRORS:
            return False
        if not (isinstance(expected, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)):
            return False
        if dtype == torch.float32:
            grad_out = torch.randn(expected.shape, generator=generator)
            wanted = torch.autograd.grad(expected, [x, *one.parameters()], grad_out)
            ours = torch.autograd.grad(kernel.forward(one, x), [x, *one.parameters()], grad_out)
            pairs = zip(wanted, ours, strict=True)
            if any((a - b).abs().max() > _SLACK * a.abs().max() for a, b in pairs):
                return False
    return True


def _filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU with random weights."""
    one = copy.deepcopy(module).to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return one
