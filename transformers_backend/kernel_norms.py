"""Which modules are an RMSNorm that a kernel computes: found by what they compute. `kernel_plan.py` asks.

A copy of a module alone, with random weights, is compared with the kernel's plain-torch reference: equal outputs in
fp32 and bf16, and with weights of the other of the two, in training and in evaluation; equal gradients. A kind is what
computes alike: the class, the plain attributes (eps ...) and the shapes of the parameters. Each kind is tried once.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterator

import torch
from torch import nn

from parallelize.kernels.replace import NormKernel, has_own_forward
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
        is_changed = has_own_forward(module) and not isinstance(found[kind], str)
        yield name, module, "has a forward that is not its class's" if is_changed else found[kind]


def _norms(hf_model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are norms by the name of their class, and have nothing but perhaps a weight."""
    for name, module in hf_model.named_modules():
        if "norm" not in type(module).__name__.lower() or list(module.children()):
            continue
        if {one for one, _ in (*module.named_parameters(), *module.named_buffers())} <= {"weight"}:
            yield name, module


def _kind(module: nn.Module) -> tuple:
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and key != "training"
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return type(module), tuple(sorted(plain.items())), tuple(sorted(shapes.items()))


def find_norm_kernel(module: nn.Module) -> NormKernel | None:
    """The kernel that computes what a norm computes, or None."""
    if len(inspect.signature(type(module).forward).parameters) != 2:  # with a gate, for example, that may be missing
        return None
    has_weight = any(True for _ in module.parameters())
    for eps in (value for value in vars(module).values() if isinstance(value, float)):
        for offset, rounds_first in ((0.0, True), (0.0, False), (1.0, False)) if has_weight else ((0.0, True),):
            kernel = NormKernel(eps, offset, rounds_first, has_weight)
            if _computes_the_same(module, kernel):
                return kernel
    return None


@torch.enable_grad()
def _computes_the_same(module: nn.Module, kernel: NormKernel) -> bool:
    # Weights may be in fp32 while layers compute in bf16, and the other way round where the residual stays in fp32.
    for dtype, weight_dtype, training in itertools.product(*[(torch.float32, torch.bfloat16)] * 2, (True, False)):
        one = _filled(module, weight_dtype).train(training)
        columns = next((parameter.shape[-1] for parameter in one.parameters()), _COLUMNS)
        generator = torch.Generator().manual_seed(3)
        # Rows of several sizes: in some eps decides, and in some it is nothing.
        sizes = torch.tensor([1e-3, math.sqrt(kernel.eps), 1.0, 30.0])
        x = (torch.randn(2, 4, columns, generator=generator) * sizes[:, None]).to(dtype).requires_grad_()
        try:
            expected = type(one).forward(one, x)  # what is replaced: hooks still run
            found = kernel.reference(one, x)
        except MODEL_ERRORS:
            return False
        if not (isinstance(expected, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)):
            return False
        if dtype == weight_dtype == torch.float32 and not _same_gradients(one, kernel, x, expected, generator):
            return False
    return True


def _same_gradients(
    module: nn.Module, kernel: NormKernel, x: torch.Tensor, expected: torch.Tensor, generator: torch.Generator
) -> bool:
    leaves = [x, *module.parameters()]
    grad_out = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad(expected, leaves, grad_out)
    ours = torch.autograd.grad(kernel.forward(module, x), leaves, grad_out)
    return all((a - b).abs().max() <= _SLACK * a.abs().max() for a, b in zip(wanted, ours, strict=True))


def _filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU with random weights, none of them frozen."""
    one = copy.deepcopy(module).to_empty(device="cpu").to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return one
