"""Rotary position embedding of queries and keys in one launch (RoFormer, https://arxiv.org/abs/2104.09864).

Each pair of columns (a, b) of a head becomes (a * cos - b * sin, b * cos + a * sin). Models differ in

    interleaved    pairs are columns 2 j and 2 j + 1 (Cohere, GLM); otherwise j and j + half (Llama)
    repeats        the tables' first half holds a number a pair (GLM); otherwise they hold one for each column
    wide           computed in fp32 whatever comes in (Cohere)
    casts_back     returned in the dtype of what comes in, whatever that of the tables (OLMo 2)

Columns beyond the tables' pass as they are (partial rotary embedding). The kernel computes in fp32 and rounds once.
The backward is the rotation by the negative angle: it needs the tables, and nothing else is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallelize.kernels.language import jit, launches_on, next_power_of_two, tl

_HEADS = 8  # of one token, that a program rotates


@dataclass(frozen=True)
class RotaryForm:
    """How a model rotates; see above."""

    interleaved: bool = False
    repeats: bool = False
    wide: bool = False
    casts_back: bool = False

    def out_dtype(self, x: torch.Tensor, cos: torch.Tensor) -> torch.dtype:
        if self.casts_back:
            return x.dtype
        return torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32 if self.wide else x.dtype)


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: RotaryForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query (batch, heads, sequence, head size) and key (batch, key heads, sequence, head size).

    cos, sin: (batch or 1, sequence, columns), columns even and at most the head size; they get no gradient.
    Returns both with their shapes and, where columns lie side by side, the order in which they lie in memory.
    """
    return _rotary(query, key, cos, sin, form.interleaved, form.repeats, form.wide, form.casts_back)


def rotary_reference(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: RotaryForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, rounding where models round."""
    cos, sin = (_table(table, form).unsqueeze(1) for table in (cos, sin))
    return _rotated(query, cos, sin, form), _rotated(key, cos, sin, form)


def _table(table: torch.Tensor, form: RotaryForm) -> torch.Tensor:
    return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1) if form.repeats else table


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: RotaryForm) -> torch.Tensor:
    columns = cos.shape[-1]
    turned, rest = x[..., :columns], x[..., columns:]
    if form.wide:
        turned = turned.to(torch.promote_types(x.dtype, torch.float32))
    turned = turned * cos + _quarter_turn(turned, form) * sin
    if form.casts_back:
        turned = turned.to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _quarter_turn(x: torch.Tensor, form: RotaryForm) -> torch.Tensor:
    if form.interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@torch.library.custom_op("parallelize::rotary", mutates_args=())
def _rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    repeats: bool,
    wide: bool,
    casts_back: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    form = RotaryForm(interleaved, repeats, wide, casts_back)
    outs = tuple(_empty_like(x, form.out_dtype(x, cos)) for x in (query, key))
    if not launches_on(query.device):
        for out, x in zip(outs, rotary_reference(query, key, cos, sin, form), strict=True):
            out.copy_(x)
    else:
        _launch(*outs, query, key, cos, sin, form, backward=False)
    return outs


@_rotary.register_fake
def _(query, key, cos, sin, *options):
    form = RotaryForm(*options)
    return tuple(_empty_like(x, form.out_dtype(x, cos)) for x in (query, key))


@torch.library.custom_op("parallelize::rotary_backward", mutates_args=())
def _rotary_backward(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    repeats: bool,
    query_dtype: torch.dtype,
    key_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query and key, in these dtypes."""
    form = RotaryForm(interleaved, repeats)
    grads = (grad_query, grad_key)
    outs = tuple(_empty_like(x, dtype) for x, dtype in zip(grads, (query_dtype, key_dtype), strict=True))
    if not launches_on(grad_query.device):
        tables = tuple(_table(table, form).unsqueeze(1) for table in (cos, sin))
        for out, grad in zip(outs, grads, strict=True):
            out.copy_(_rotated_back(grad, *tables, form))
    else:
        _launch(*outs, grad_query, grad_key, cos, sin, form, backward=True)
    return outs


@_rotary_backward.register_fake
def _(grad_query, grad_key, cos, sin, interleaved, repeats, query_dtype, key_dtype):
    return _empty_like(grad_query, query_dtype), _empty_like(grad_key, key_dtype)


def _empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Lies in memory as x does where its columns lie side by side, as the kernel writes them.

    They do not in the gradient of keys that are multiplied transposed, as eager attention does.
    """
    layout = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout)


def _rotated_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: RotaryForm) -> torch.Tensor:
    columns = cos.shape[-1]
    turned, rest = grad[..., :columns], grad[..., columns:]
    turned = turned * cos - _quarter_turn(turned * sin, form)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _keep(ctx, inputs, output) -> None:
    query, key, cos, sin, *ctx.options = inputs
    ctx.dtypes = query.dtype, key.dtype
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_query, grad_key):
    grads = _rotary_backward(grad_query, grad_key, *ctx.saved_tensors, *ctx.options[:2], *ctx.dtypes)
    return *grads, *[None] * 6


_rotary.register_autograd(_backward, setup_context=_keep)


def _launch(query_out, key_out, query, key, cos, sin, form: RotaryForm, *, backward: bool) -> None:
    batch, heads, sequence, head_size = query.shape
    if not query.numel() + key.numel():
        return
    assert query_out.stride(-1) == key_out.stride(-1) == 1
    query, key, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, cos, sin))
    cos, sin = (table.expand(batch, -1, -1) for table in (cos, sin))
    columns = cos.shape[-1]
    query_blocks, key_blocks = (-(-number // _HEADS) for number in (heads, key.shape[1]))
    _kernel[(batch * sequence, query_blocks + key_blocks)](
        query, key, query_out, key_out, cos, sin,
        sequence, heads, key.shape[1], query_blocks, columns // 2, head_size - columns,
        *query.stride()[:3], *key.stride()[:3], *query_out.stride()[:3], *key_out.stride()[:3],
        *cos.stride()[:2], *sin.stride()[:2],
        INTERLEAVED=form.interleaved, REPEATS=form.repeats, BACKWARD=backward, HEADS=_HEADS,
        HALF=next_power_of_two(columns // 2), REST=next_power_of_two(head_size - columns) if head_size > columns else 0,
        WIDE=tl.float64 if query.dtype == torch.float64 else tl.float32,
    )  # fmt: skip


@jit
def _rotate_heads(
    x, out, first, second, first_cos, second_cos, first_sin, second_sin, inside, x_stride, out_stride,
    half, rest, head, heads,
    BACKWARD: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Heads `head` of one token; x and out point to its head 0; first and second are the columns of pairs."""
    inside = (head < heads)[:, None] & inside[None, :]
    row, out_row = (head * x_stride)[:, None], (head * out_stride)[:, None]
    a = tl.load(x + row + first[None, :], mask=inside, other=0.0).to(WIDE)
    b = tl.load(x + row + second[None, :], mask=inside, other=0.0).to(WIDE)
    if BACKWARD:
        turned_a = a * first_cos[None, :] + b * second_sin[None, :]
        turned_b = b * second_cos[None, :] - a * first_sin[None, :]
    else:
        turned_a = a * first_cos[None, :] - b * first_sin[None, :]
        turned_b = b * second_cos[None, :] + a * second_sin[None, :]
    tl.store(out + out_row + first[None, :], turned_a.to(out.dtype.element_ty), mask=inside)
    tl.store(out + out_row + second[None, :], turned_b.to(out.dtype.element_ty), mask=inside)
    if REST:
        column = tl.arange(0, REST)
        passes = (head < heads)[:, None] & (column < rest)[None, :]
        same = tl.load(x + row + 2 * half + column[None, :], mask=passes, other=0.0)
        tl.store(out + out_row + 2 * half + column[None, :], same.to(out.dtype.element_ty), mask=passes)


@jit
def _kernel(
    query, key, query_out, key_out, cos, sin,
    sequence, query_heads, key_heads, query_blocks, half, rest,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    query_out_batch, query_out_head, query_out_token, key_out_batch, key_out_head, key_out_token,
    cos_batch, cos_token, sin_batch, sin_token,
    INTERLEAVED: tl.constexpr, REPEATS: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (t, n) does the nth heads of token t: blocks of query heads come before those of key heads."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // sequence, token % sequence
    block = tl.program_id(1)
    pair = tl.arange(0, HALF)
    inside = pair < half
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, half + pair
    first_angle, second_angle = first, second
    if REPEATS:
        first_angle, second_angle = pair, pair
    cos += batch * cos_batch + place * cos_token
    sin += batch * sin_batch + place * sin_token
    first_cos = tl.load(cos + first_angle, mask=inside, other=0.0).to(WIDE)
    second_cos = tl.load(cos + second_angle, mask=inside, other=0.0).to(WIDE)
    first_sin = tl.load(sin + first_angle, mask=inside, other=0.0).to(WIDE)
    second_sin = tl.load(sin + second_angle, mask=inside, other=0.0).to(WIDE)
    if block < query_blocks:
        _rotate_heads(
            query + batch * query_batch + place * query_token,
            query_out + batch * query_out_batch + place * query_out_token,
            first, second, first_cos, second_cos, first_sin, second_sin, inside, query_head, query_out_head,
            half, rest, (block * HEADS + tl.arange(0, HEADS)).to(tl.int64), query_heads,
            BACKWARD, REST, WIDE,
        )  # fmt: skip
    else:
        _rotate_heads(
            key + batch * key_batch + place * key_token,
            key_out + batch * key_out_batch + place * key_out_token,
            first, second, first_cos, second_cos, first_sin, second_sin, inside, key_head, key_out_head,
            half, rest, ((block - query_blocks) * HEADS + tl.arange(0, HEADS)).to(tl.int64), key_heads,
            BACKWARD, REST, WIDE,
        )  # fmt: skip
