"""Which modules are an RMSNorm that a kernel computes: found by what they compute. `kernel_plan.py` asks.

A copy of a module alone, with random weights, is compared with the kernel's plain-torch reference: equal outputs in
fp32 and bf16, equal gradients. A kind is what computes alike: the class, the plain attributes (eps ...) and the shapes
of the parameters. Each kind is tried once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import nn

from parallelize.kernels.replace import NormKernel
from transformers_backend.proof import MODEL_ERRORS

_COLUMNS = 96  # of what a module without parameters is tried on
_SLACK = 1e-5  # of gradients in fp32, relative to the largest


def norm_kernels(hf_model: nn.Module) -> Iterator[tuple[str, nn.Module, NormKernel | str]]:
    """Every norm without a bias: its name, itself, and its kernel or why it has none."""
    found: dict[tuple, NormKernel | str] = {}
    for name, module in _norms(hf_model):
        kind = _kind(module)
        if kind not in found:
            found[kind] = find_norm_kernel(module) or "computes something else"
        yield name, module, found[kind]


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
