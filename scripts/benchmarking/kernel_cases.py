"""Each kernel beside what computes the same, and what forward and backward have to move or compute at least."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from parallelize.kernels.gated_activation import gated_activation, gated_activation_reference
from parallelize.kernels.linear_cross_entropy import linear_cross_entropy
from parallelize.kernels.rms_norm import rms_norm, rms_norm_reference
from parallelize.kernels.rotary import RotaryForm, rotary, rotary_reference

CONTESTANTS = ("kernel", "eager", "compiled", "liger")
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One computation on inputs of one shape."""

    kernel: str
    """Among `parallelize.config.KERNELS`."""
    shape: str
    inputs: tuple[torch.Tensor, ...]
    """Those that require gradients get them."""
    grads: tuple[torch.Tensor, ...] | None
    """Of the outputs; None where the output is a scalar."""
    contestants: dict[str, Callable[..., Any]]
    bytes_moved: int | None = None
    """Forward and backward together, each number read or written as rarely as possible: share of the copy bandwidth."""
    flops: int | None = None
    """Of the matrix products that forward and backward need, without recomputation: share of the ceiling."""


def why_not_here(contestant: str) -> str | None:
    """What a contestant needs that is not there, or None."""
    if contestant == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return None


def find_cases(kernel: str, device: torch.device) -> list[Callable[[], Case]]:
    """What makes the cases of a kernel: large ones in bf16 on a GPU, tiny ones in fp32 elsewhere."""
    large = device.type == "cuda"
    make, shapes, tiny = _CASES[kernel]
    return [functools.partial(make, _Maker(device), *shape) for shape in (shapes if large else tiny)]


class _Maker:
    """Makes tensors on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, requires_grad: bool = False) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self._generator, device=self.device)
        return numbers.to(self._dtype).requires_grad_(requires_grad)

    def targets(self, tokens: int, vocabulary: int) -> torch.Tensor:
        return torch.randint(vocabulary, (tokens,), generator=self._generator, device=self.device)


def _size(*tensors: torch.Tensor) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _rms_norm(make: _Maker, tokens: int, columns: int) -> Case:
    x, weight = make.normal(tokens, columns, requires_grad=True), make.normal(columns, requires_grad=True)

    def eager(x, weight):
        return rms_norm_reference(x, weight, EPS)

    def liger(x, weight):
        from liger_kernel.transformers.functional import liger_rms_norm

        return liger_rms_norm(x, weight, EPS, 0.0, "llama", False)

    return Case(
        "rms_norm", f"{tokens:,} x {columns:,}", (x, weight), (make.normal(tokens, columns),),
        {"kernel": lambda x, weight: rms_norm(x, weight, EPS), "eager": eager, "compiled": _compiled(eager),
         "liger": liger},
        bytes_moved=5 * _size(x),  # x, out; x, the gradients of both
    )  # fmt: skip


def _gated_activation(make: _Maker, tokens: int, columns: int) -> Case:
    gate, up = (make.normal(tokens, columns, requires_grad=True) for _ in range(2))

    def eager(gate, up):
        return gated_activation_reference(gate, up, "silu")

    def liger(gate, up):
        from liger_kernel.transformers.functional import liger_swiglu

        return liger_swiglu(gate, up)

    return Case(
        "gated_activation", f"silu, {tokens:,} x {columns:,}", (gate, up), (make.normal(tokens, columns),),
        {"kernel": lambda gate, up: gated_activation(gate, up, "silu"), "eager": eager, "compiled": _compiled(eager),
         "liger": liger},
        bytes_moved=8 * _size(gate),  # gate, up, out; gate, up, the gradients of all three
    )  # fmt: skip


def _rotary(make: _Maker, tokens: int, heads: int, key_heads: int, dim: int) -> Case:
    # As attention has them: heads were columns of the hidden states.
    query, key = (make.normal(1, tokens, n * dim).unflatten(-1, (n, dim)).transpose(1, 2) for n in (heads, key_heads))
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    grads = tuple(make.normal(1, tokens, n * dim).unflatten(-1, (n, dim)).transpose(1, 2) for n in (heads, key_heads))
    angles = torch.arange(tokens, device=make.device)[:, None] / 500000 ** (
        torch.arange(dim // 2, device=make.device) * 2 / dim
    )
    angles = torch.cat([angles, angles], dim=-1)[None]
    cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
    form = RotaryForm()

    def eager(query, key, cos, sin):
        return rotary_reference(query, key, cos, sin, form)

    def liger(query, key, cos, sin):
        from liger_kernel.transformers.functional import liger_rope

        return liger_rope(query, key, cos, sin)

    return Case(
        "rotary", f"{tokens:,} tokens, {heads} and {key_heads} heads of {dim}", (query, key, cos, sin), grads,
        {"kernel": lambda query, key, cos, sin: rotary(query, key, cos, sin, form), "eager": eager,
         "compiled": _compiled(eager), "liger": liger},
        bytes_moved=4 * _size(query, key) + 2 * _size(cos, sin),  # in, out, and their gradients
    )  # fmt: skip


def _linear_cross_entropy(make: _Maker, tokens: int, columns: int, vocabulary: int, softcap: float | None) -> Case:
    hidden = make.normal(tokens, columns, requires_grad=True)
    weight = (make.normal(vocabulary, columns) * columns**-0.5).requires_grad_()

    def eager(hidden, weight, targets):
        logits = (hidden @ weight.t()).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets, reduction="sum")

    def liger(hidden, weight, targets):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="sum")

    def kernel(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, softcap=softcap)

    cap = "" if softcap is None else f", softcap {softcap:g}"
    return Case(
        "linear_cross_entropy", f"{tokens:,} tokens, {columns:,} x {vocabulary:,}{cap}",
        (hidden, weight, make.targets(tokens, vocabulary)), None,
        {"kernel": kernel, "eager": eager, "compiled": _compiled(eager), "liger": liger},
        flops=6 * tokens * columns * vocabulary,
    )  # fmt: skip


_CASES: dict[str, tuple[Callable[..., Case], list[tuple], list[tuple]]] = {
    # what makes a case, the shapes on a GPU (Llama 3.2 1B, 3B and larger; Gemma 2 2B), and tiny ones
    "rms_norm": (_rms_norm, [(8192, 2048), (8192, 4096), (8192, 8192)], [(8, 16)]),
    "gated_activation": (_gated_activation, [(8192, 8192), (8192, 14336)], [(8, 16)]),
    "rotary": (_rotary, [(8192, 32, 8, 64), (8192, 24, 8, 128)], [(8, 4, 2, 8)]),
    "linear_cross_entropy": (
        _linear_cross_entropy, [(8192, 2048, 128256, None), (8192, 2304, 256000, 30.0)], [(8, 16, 32, 30.0)],
    ),
}  # fmt: skip
