"""Gated activations: act(gate) * up (Shazeer, https://arxiv.org/abs/2002.05202), and squared ReLU alone.

    silu         x * sigmoid(x)                                      SwiGLU: Llama, Qwen3, Mistral ...
    gelu         x * (1 + erf(x / sqrt(2))) / 2                      GeGLU
    gelu_tanh    x * (1 + tanh(c * (x + 0.044715 * x^3))) / 2        GeGLU with c = sqrt(2 / pi): Gemma
    relu2        max(x, 0)^2                                         with `up`, or alone: Nemotron, Persimmon

The activation is computed in fp32 (fp64 for fp64), rounded to the dtype of gate as a module of its own would round it,
and multiplied. The backward computes it again from gate, so that gate and up are all that is kept. gate and up may be
the two halves of one tensor, as a fused projection returns them: rows are read where they lie, and `packed=` writes
their gradients into one tensor, too.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from parallelize.kernels.language import jit, launches_on, next_power_of_two, tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")

_BLOCK = 1024  # columns of a program: 16 bytes of half precision for each of 128 threads


def gated_activation(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """act(gate) * up for gate and up (..., columns) of one shape; act(gate) where up is None.

    activation: one of ACTIVATIONS. Returns their shape in the dtype that their product has.
    """
    return _gated(gate, up, activation)


def packed_gated_activation(packed: torch.Tensor, activation: str, *, gate_first: bool = True) -> torch.Tensor:
    """act(gate) * up for packed (..., 2 x columns): gate's columns and then up's, or the other way round.

    Returns (..., columns) in packed's dtype.
    """
    return _packed(packed, activation, gate_first)


def gated_activation_reference(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The same in plain torch, rounding where models round."""
    activated = activate(gate, activation)
    return activated if up is None else activated * up


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gate)
    if activation == "relu2":
        return F.relu(gate).square()
    assert activation in ACTIVATIONS, activation
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


@torch.library.custom_op("parallelize::gated_activation", mutates_args=())
def _gated(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    out = torch.empty(gate.shape, dtype=_out_dtype(gate, up), device=gate.device)
    _forward_into(out, gate, up, activation)
    return out


@_gated.register_fake
def _(gate, up, activation):
    return torch.empty(gate.shape, dtype=_out_dtype(gate, up), device=gate.device)


@torch.library.custom_op("parallelize::gated_activation_backward", mutates_args=())
def _gated_backward(
    grad_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and of up; the second is empty where there is no up."""
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = gate.new_empty(0) if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
    _backward_into(grad_gate, None if up is None else grad_up, grad_out, gate, up, activation)
    return grad_gate, grad_up


@_gated_backward.register_fake
def _(grad_out, gate, up, activation):
    grad_up = gate.new_empty(0) if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), grad_up


@torch.library.custom_op("parallelize::packed_gated_activation", mutates_args=())
def _packed(packed: torch.Tensor, activation: str, gate_first: bool) -> torch.Tensor:
    gate, up = _halves(packed, gate_first)
    out = torch.empty(gate.shape, dtype=packed.dtype, device=packed.device)
    _forward_into(out, gate, up, activation)
    return out


@_packed.register_fake
def _(packed, activation, gate_first):
    shape = (*packed.shape[:-1], packed.shape[-1] // 2)
    return torch.empty(shape, dtype=packed.dtype, device=packed.device)


@torch.library.custom_op("parallelize::packed_gated_activation_backward", mutates_args=())
def _packed_backward(grad_out: torch.Tensor, packed: torch.Tensor, activation: str, gate_first: bool) -> torch.Tensor:
    grad_packed = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    _backward_into(*_halves(grad_packed, gate_first), grad_out, *_halves(packed, gate_first), activation)
    return grad_packed


@_packed_backward.register_fake
def _(grad_out, packed, activation, gate_first):
    return torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)


def _keep(ctx, inputs, output) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, grad_out):
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = _gated_backward(grad_out, gate, up, ctx.activation)
    return grad_gate, None if up is None else grad_up, None


def _keep_packed(ctx, inputs, output) -> None:
    packed, *ctx.options = inputs
    ctx.save_for_backward(packed)


def _backward_packed(ctx, grad_out):
    return _packed_backward(grad_out, *ctx.saved_tensors, *ctx.options), None, None


_gated.register_autograd(_backward, setup_context=_keep)
_packed.register_autograd(_backward_packed, setup_context=_keep_packed)


def _halves(packed: torch.Tensor, gate_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up."""
    first, second = packed.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _out_dtype(gate: torch.Tensor, up: torch.Tensor | None) -> torch.dtype:
    return gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., columns) -> (rows, columns), a view where rows lie at equal distances and their columns side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _forward_into(out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> None:
    if not launches_on(gate.device):
        out.copy_(gated_activation_reference(gate, up, activation))
    elif out.numel():
        out, gate = _rows(out), _rows(gate)
        factor = gate if up is None else _rows(up)
        _forward_kernel[_grid(gate)](
            gate, factor, out, gate.shape[1], gate.stride(0), factor.stride(0), out.stride(0),
            ACTIVATION=activation, HAS_UP=up is not None, WIDE=_wide(gate), BLOCK=_block(gate),
        )  # fmt: skip


def _backward_into(
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor | None,
    grad_out: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
) -> None:
    """grad_gate and grad_up: written row by row; their rows may lie apart."""
    if not launches_on(gate.device):
        if grad_up is not None:
            grad_up.copy_(grad_out * activate(gate, activation))
            grad_out = grad_out * up
        grad_gate.copy_(_activation_backward(grad_out.to(gate.dtype), gate, activation))
    elif gate.numel():
        grad_out, gate, grad_gate = _rows(grad_out), _rows(gate), _rows(grad_gate)
        factor, grad_factor = (gate, grad_gate) if up is None else (_rows(up), _rows(grad_up))
        _backward_kernel[_grid(gate)](
            grad_out, gate, factor, grad_gate, grad_factor, gate.shape[1],
            grad_out.stride(0), gate.stride(0), factor.stride(0), grad_gate.stride(0), grad_factor.stride(0),
            ACTIVATION=activation, HAS_UP=up is not None, WIDE=_wide(gate), BLOCK=_block(gate),
        )  # fmt: skip


def _activation_backward(grad: torch.Tensor, gate: torch.Tensor, activation: str) -> torch.Tensor:
    """What autograd computes for `activate`."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    if activation == "relu2":
        return grad * (2 * F.relu(gate))
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _block(gate: torch.Tensor) -> int:
    return min(_BLOCK, next_power_of_two(gate.shape[1]))


def _grid(gate: torch.Tensor) -> tuple[int, int]:
    return gate.shape[0], -(-gate.shape[1] // _block(gate))


def _wide(gate: torch.Tensor):
    return tl.float64 if gate.dtype == torch.float64 else tl.float32


@jit
def _sigmoid_and_slope(x):
    """sigmoid(x) and sigmoid(x) * (1 - sigmoid(x)), without the overflow and the cancellation of the plain formulas."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small), small / ((1.0 + small) * (1.0 + small))


@jit
def _activation_and_slope(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative, of fp32 or fp64."""
    # Where products of 0 and infinity would come about, the slope has long been 0 or 1.
    near = tl.minimum(tl.maximum(x, -40.0), 40.0)
    if ACTIVATION == "silu":
        share, share_slope = _sigmoid_and_slope(x)
        value = x * share
        slope = share + near * share_slope
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + near * (0.3989422804014327 * tl.exp(-0.5 * near * near))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u); 2 c = 1.5957...
        share, share_slope = _sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * share
        slope = share + near * share_slope * (1.5957691216057308 * (1.0 + 0.134145 * near * near))
    else:
        positive = tl.where(x < 0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@jit
def _forward_kernel(
    gate, up, out, columns, gate_stride, up_stride, out_stride,
    ACTIVATION: tl.constexpr, HAS_UP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (r, b) does block b of row r; strides are those of rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    value, _ = _activation_and_slope(x.to(WIDE), ACTIVATION)
    if HAS_UP:
        factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(WIDE)
        value = value.to(x.dtype).to(WIDE) * factor
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_out, gate, up, grad_gate, grad_up, columns,
    grad_out_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride,
    ACTIVATION: tl.constexpr, HAS_UP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    grad = tl.load(grad_out + row * grad_out_stride + column, mask=inside, other=0.0).to(WIDE)
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    value, slope = _activation_and_slope(x.to(WIDE), ACTIVATION)
    if HAS_UP:
        factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(WIDE)
        inner = (grad * value.to(x.dtype).to(WIDE)).to(grad_up.dtype.element_ty)
        tl.store(grad_up + row * grad_up_stride + column, inner, mask=inside)
        grad = grad * factor
    tl.store(grad_gate + row * grad_gate_stride + column, (grad * slope).to(x.dtype), mask=inside)
