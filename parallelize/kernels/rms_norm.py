"""RMSNorm: x / sqrt(mean(x^2) + eps), times a weight (Zhang and Sennrich, https://arxiv.org/abs/1910.07467).

Models differ in where they round to the dtype of x, and in what the weight means:

    rounds_first    weight * (x / rms).to(x.dtype)               Llama, Qwen3, Mistral ...
    otherwise       (weight * (x / rms)).to(x.dtype)             OLMo 2
    offset = 1      ((1 + weight) * (x / rms)).to(x.dtype)       Gemma

Everything is computed in fp32. The backward reads x, the output's gradient and a number a row; the weight's gradient is
added up in fp32 by a few programs, each over many rows, and their sums by one more operation.
"""

from __future__ import annotations

import torch

from parallelize.kernels.language import jit, launches_on, next_power_of_two, processors, tl


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """RMSNorm over the last dimension of x (..., columns), weight (columns,) or None.

    Returns the shape of x in its dtype; with `rounds_first` in that of weight * x.
    """
    return _rms_norm(x, weight, eps, offset, rounds_first)[0]


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """The same in plain torch, rounding where models round."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normal.to(x.dtype)
    if rounds_first:
        return (weight + offset if offset else weight) * normal.to(x.dtype)
    return (normal * (weight.to(wide.dtype) + offset)).to(x.dtype)


@torch.library.custom_op("parallelize::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, rounds_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and 1 / rms of every row in fp32 (fp64 for x in fp64)."""
    if not _launches(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        reciprocal = torch.rsqrt(wide.square().mean(-1) + eps)
        return rms_norm_reference(x, weight, eps, offset=offset, rounds_first=rounds_first).contiguous(), reciprocal
    x = x.contiguous()
    columns = x.shape[-1]
    out = torch.empty_like(x, dtype=_out_dtype(x, weight, rounds_first))
    reciprocal = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        _forward_kernel[(reciprocal.numel(),)](
            x, x if weight is None else weight.contiguous(), out, reciprocal, columns, eps, offset,
            HAS_WEIGHT=weight is not None, ROUNDS_FIRST=rounds_first, **_block(columns),
        )  # fmt: skip
    return out, reciprocal


@_rms_norm.register_fake
def _(x, weight, eps, offset, rounds_first):
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(x.shape, dtype=_out_dtype(x, weight, rounds_first), device=x.device)
    return out, x.new_empty(x.shape[:-1], dtype=wide)


@torch.library.custom_op("parallelize::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    reciprocal: torch.Tensor,
    offset: float,
    rounds_first: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of weight; the second is empty where it is not wanted."""
    columns = x.shape[-1]
    if not _launches(x):
        return _backward_reference(grad_out, x, weight, reciprocal, offset, rounds_first, wants_weight)
    grad_out, x = grad_out.contiguous(), x.contiguous()
    rows = reciprocal.numel()
    programs = min(rows, 4 * processors(x.device))
    grad_x = torch.empty_like(x)
    sums = x.new_zeros((programs if wants_weight else 0, columns), dtype=torch.float32)
    if x.numel():
        _backward_kernel[(programs,)](
            grad_out, x, x if weight is None else weight.contiguous(), reciprocal, grad_x, sums, rows, columns, offset,
            HAS_WEIGHT=weight is not None, WANTS_WEIGHT=wants_weight, ROUNDS_FIRST=rounds_first, PROGRAMS=programs,
            **_block(columns),
        )  # fmt: skip
    return grad_x, sums.sum(0).to(weight.dtype) if wants_weight else x.new_empty(0)


@_rms_norm_backward.register_fake
def _(grad_out, x, weight, reciprocal, offset, rounds_first, wants_weight):
    return x.new_empty(x.shape), torch.empty_like(weight) if wants_weight else x.new_empty(0)


def _backward_reference(grad_out, x, weight, reciprocal, offset, rounds_first, wants_weight):
    wide = reciprocal.dtype
    normal = x.to(wide) * reciprocal[..., None]
    grad = grad_out.to(wide)
    grad_weight = x.new_empty(0)
    if wants_weight:
        seen = normal.to(x.dtype).to(wide) if rounds_first else normal
        grad_weight = (grad * seen).flatten(0, -2).sum(0).to(weight.dtype)
    if weight is not None:
        grad = grad * (weight.to(wide) + offset)
    grad_x = reciprocal[..., None] * (grad - normal * (grad * normal).mean(-1, keepdim=True))
    return grad_x.to(x.dtype).contiguous(), grad_weight


def _keep(ctx, inputs, output) -> None:
    x, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return None, None, None, None, None
    x, weight, reciprocal = ctx.saved_tensors
    wants_weight = ctx.needs_input_grad[1]
    grad_x, grad_weight = _rms_norm_backward(grad_out, x, weight, reciprocal, *ctx.options, wants_weight)
    return grad_x, grad_weight if wants_weight else None, None, None, None


_rms_norm.register_autograd(_backward, setup_context=_keep)


def _launches(x: torch.Tensor) -> bool:
    return launches_on(x.device) and x.dtype != torch.float64  # the kernels compute in fp32


def _block(columns: int) -> dict[str, int]:
    """What a program holds, and how many warps: one for a head's norm, more for rows that one has no registers for."""
    block = next_power_of_two(columns)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _out_dtype(x: torch.Tensor, weight: torch.Tensor | None, rounds_first: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if rounds_first and weight is not None else x.dtype


@jit
def _forward_kernel(
    x, weight, out, reciprocal, columns, eps, offset,
    HAS_WEIGHT: tl.constexpr, ROUNDS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x + row * columns + column, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
    tl.store(reciprocal + row, scale)
    normal = wide * scale
    if ROUNDS_FIRST:
        normal = normal.to(values.dtype).to(tl.float32)
    if HAS_WEIGHT:
        normal = normal * (tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset)
    tl.store(out + row * columns + column, normal.to(out.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_out, x, weight, reciprocal, grad_x, sums, rows, columns, offset,
    HAS_WEIGHT: tl.constexpr, WANTS_WEIGHT: tl.constexpr, ROUNDS_FIRST: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p does rows p, p + PROGRAMS ... and keeps their sum of the weight's gradient."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    if HAS_WEIGHT:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    if WANTS_WEIGHT:
        total = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, PROGRAMS):
        values = tl.load(x + row * columns + column, mask=inside, other=0.0)
        scale = tl.load(reciprocal + row)
        normal = values.to(tl.float32) * scale
        grad = tl.load(grad_out + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        if WANTS_WEIGHT:
            if ROUNDS_FIRST:
                total += grad * normal.to(values.dtype).to(tl.float32)
            else:
                total += grad * normal
        if HAS_WEIGHT:
            grad = grad * factor
        inner = tl.sum(grad * normal, 0) / columns
        tl.store(grad_x + row * columns + column, (scale * (grad - normal * inner)).to(values.dtype), mask=inside)
    if WANTS_WEIGHT:
        tl.store(sums + program * columns + column, total, mask=inside)
