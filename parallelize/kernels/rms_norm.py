"""RMSNorm: x / sqrt(mean(x^2) + eps), times a weight (Zhang and Sennrich, https://arxiv.org/abs/1910.07467).

Models differ in where they round to the dtype of x, and in what the weight means:

    rounds_first    weight * (x / rms).to(x.dtype)               Llama, Qwen3, Mistral ...
    otherwise       (weight * (x / rms)).to(x.dtype)             OLMo 2
    offset = 1      ((1 + weight) * (x / rms)).to(x.dtype)       Gemma

Everything is computed in fp32. The backward reads x, the output's gradient and a number a row; the weight's gradient is
added up in fp32 by a few programs, each over many rows, and their sums by one more operation. Of short rows, such as
heads, a program takes several at a time. All this is bound by memory, so that no search would find much: `_tile`.
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
        rows, tile = reciprocal.numel(), _tile(columns)
        _forward_kernel[(-(-rows // tile["ROWS"]),)](
            x, x if weight is None else weight.contiguous(), out, reciprocal, rows, columns, eps, offset,
            HAS_WEIGHT=weight is not None, ROUNDS_FIRST=rounds_first, **tile,
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
    rows, tile = reciprocal.numel(), _tile(columns)
    programs = min(-(-rows // tile["ROWS"]), 4 * processors(x.device))
    grad_x = torch.empty_like(x)
    sums = x.new_zeros((programs if wants_weight else 0, columns), dtype=torch.float32)
    if x.numel():
        _backward_kernel[(programs,)](
            grad_out, x, x if weight is None else weight.contiguous(), reciprocal, grad_x, sums, rows, columns, offset,
            HAS_WEIGHT=weight is not None, WANTS_WEIGHT=wants_weight, ROUNDS_FIRST=rounds_first, **tile,
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


def _tile(columns: int) -> dict[str, int]:
    """What a program holds, 2,048 numbers or a row, and how many warps: 16 numbers a thread, as long as there are."""
    block = next_power_of_two(columns)
    rows = max(2048 // block, 1)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(rows * block // 512, 16)}


def _out_dtype(x: torch.Tensor, weight: torch.Tensor | None, rounds_first: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if rounds_first and weight is not None else x.dtype


@jit
def _forward_kernel(
    x, weight, out, reciprocal, rows, columns, eps, offset,
    HAS_WEIGHT: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + place, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.where(row < rows, tl.sum(wide * wide, 1) / columns + eps, 1.0))
    tl.store(reciprocal + row, scale, mask=row < rows)
    normal = wide * scale[:, None]
    if ROUNDS_FIRST:
        normal = normal.to(values.dtype).to(tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + offset
        normal = normal * factor[None, :]
    tl.store(out + place, normal.to(out.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_out, x, weight, reciprocal, grad_x, sums, rows, columns, offset,
    HAS_WEIGHT: tl.constexpr, WANTS_WEIGHT: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program does every so many-th ROWS rows and keeps their sum of the weight's gradient."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    has_column = column < columns
    if HAS_WEIGHT:
        factor = tl.load(weight + column, mask=has_column, other=0.0).to(tl.float32) + offset
    if WANTS_WEIGHT:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        place = row[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & has_column[None, :]
        values = tl.load(x + place, mask=inside, other=0.0)
        scale = tl.load(reciprocal + row, mask=row < rows, other=0.0)[:, None]
        normal = values.to(tl.float32) * scale
        grad = tl.load(grad_out + place, mask=inside, other=0.0).to(tl.float32)
        if WANTS_WEIGHT:
            if ROUNDS_FIRST:
                total += grad * normal.to(values.dtype).to(tl.float32)
            else:
                total += grad * normal
        if HAS_WEIGHT:
            grad = grad * factor[None, :]
        inner = tl.sum(grad * normal, 1)[:, None] / columns
        tl.store(grad_x + place, (scale * (grad - normal * inner)).to(values.dtype), mask=inside)
    if WANTS_WEIGHT:
        tl.store(sums + program * columns + column, tl.sum(total, 0), mask=has_column)
