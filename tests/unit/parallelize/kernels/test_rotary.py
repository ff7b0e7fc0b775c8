"""Rotary embedding's kernel against float64, against a rotation of complex numbers, and as an operator."""

from __future__ import annotations

import pytest
import torch

from parallelize.kernels import rotary as rotary_module
from parallelize.kernels.rotary import RotaryForm, rotary, rotary_reference
from tests.kernel_bars import assert_as_exact_as_torch, needs_triton, results

FORMS = {
    "half": RotaryForm(),
    "half, cast back": RotaryForm(casts_back=True),
    "interleaved, wide": RotaryForm(interleaved=True, wide=True, casts_back=True),
    "interleaved, repeated": RotaryForm(interleaved=True, repeats=True),
}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def given(
    heads: int = 4, key_heads: int = 2, head_size: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key as attention has them: heads were columns of the hidden states."""
    return tuple(normal(2, 5, number, head_size, dtype=dtype).transpose(1, 2) for number in (heads, key_heads))


@needs_triton
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32),
                                    (torch.bfloat16,) * 2], ids=str)  # fmt: skip
@pytest.mark.parametrize(("heads", "key_heads", "head_size", "columns"), [(4, 2, 16, 16), (9, 1, 14, 6), (1, 1, 2, 2)])
def test_as_exact_as_torch(heads: int, key_heads: int, head_size: int, columns: int, dtypes: tuple, name: str):
    dtype, table_dtype = dtypes
    cos, sin = (table.to(table_dtype) for table in normal(2, 2, 5, columns).unbind())

    def reference(query, key):
        tables = (table.to(torch.promote_types(table.dtype, torch.float64)) for table in (cos, sin))
        return rotary_reference(query, key, *(tables if query.dtype == torch.float64 else (cos, sin)), FORMS[name])

    assert_as_exact_as_torch(
        lambda query, key: rotary(query, key, cos, sin, FORMS[name]), reference,
        given(heads, key_heads, head_size, dtype), dtype=dtype,
    )  # fmt: skip


def pairs_of(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """(..., columns) -> (..., pairs, 2)."""
    return x.unflatten(-1, shape) if shape[-1] == 2 else x.unflatten(-1, shape).mT


def test_is_a_rotation_of_complex_numbers():
    query, key = (one.double() for one in given(head_size=8))
    angles = normal(5, 4).double()
    turn = torch.polar(torch.ones_like(angles), angles)
    for form, pairs in ((RotaryForm(), (2, 4)), (RotaryForm(interleaved=True, repeats=True), (4, 2))):
        tables = (torch.cat([part, part], dim=-1)[None] for part in (angles.cos(), angles.sin()))
        found = rotary(query, key, *tables, form)
        for out, x in zip(found, (query, key), strict=True):
            turned = torch.view_as_complex(pairs_of(x, *pairs).contiguous()) * turn
            torch.testing.assert_close(pairs_of(out, *pairs).contiguous(), torch.view_as_real(turned))


@needs_triton
def test_one_table_for_all_rows_and_tensors_that_lie_apart():
    cos, sin = normal(2, 1, 5, 32)[..., ::2].unbind()
    fused = normal(2, 5, 3 * 4 * 16).view(2, 5, 4, 48).transpose(1, 2)
    query, key = fused[..., :16], fused[..., 16:32]
    for inputs in ((query, key), (query, key.expand(2, 4, 5, 16)), (normal(2, 4, 5, 32)[..., ::2], key)):
        assert_as_exact_as_torch(
            lambda query, key: rotary(query, key, cos, sin, RotaryForm()),
            lambda query, key: rotary_reference(query, key, cos, sin, RotaryForm()),
            inputs, dtype=torch.float32,
        )  # fmt: skip


@needs_triton
def test_columns_that_do_not_lie_side_by_side():
    """Eager attention multiplies by transposed keys, and their gradient comes back transposed."""
    cos, sin = normal(2, 2, 5, 16).unbind()
    query, key = normal(2, 3, 5, 16), normal(2, 3, 16, 5).transpose(2, 3)

    def scores(function):
        return lambda query, key: (lambda q, k: (q @ k.transpose(2, 3)).softmax(-1))(
            *function(query, key, cos, sin, RotaryForm())
        )

    assert_as_exact_as_torch(scores(rotary), scores(rotary_reference), (query, key), dtype=torch.float32)


def test_results_lie_in_memory_as_what_came_in():
    query, key = given()
    tables = normal(2, 1, 5, 16).unbind()
    for out, x in zip(rotary(query, key, *tables, RotaryForm()), (query, key), strict=True):
        assert out.stride() == x.stride()


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # of the interpreter
def test_extreme_values():
    query, key = given(dtype=torch.float16)
    query = query.clone()
    query[0, 0, 0], query[0, 0, 1], query[0, 0, 2] = 6e4, 1e-7, float("nan")
    cos, sin = torch.full((2, 1, 5, 16), 0.5**0.5).unbind()
    out, plain = (
        function(query, key, cos, sin, RotaryForm(casts_back=True))[0] for function in (rotary, rotary_reference)
    )
    torch.testing.assert_close(out, plain, equal_nan=True)
    assert out[0, 0, 0].isinf().any()
    assert out[0, 0, 2].isnan().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 5, 16), (2, 4, 0, 16)])
def test_no_tokens(shape: tuple[int, ...]):
    query, key = (torch.empty(shape, requires_grad=True) for _ in range(2))
    tables = (torch.empty(1, shape[2], 16) for _ in range(2))
    outs = rotary(query, key, *tables, RotaryForm())
    grads = torch.autograd.grad(sum(out.sum() for out in outs), (query, key))
    assert all(one.shape == shape for one in (*outs, *grads))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("columns", [8, 6])
def test_the_references_backward(columns: int, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rotary_module, "launches_on", lambda device: False)
    query, key = (one.double().requires_grad_() for one in given(2, 1, 8))
    cos, sin = normal(2, 2, 5, columns).double().unbind()
    assert torch.autograd.gradcheck(lambda query, key: rotary(query, key, cos, sin, FORMS[name]), (query, key))
    found = results(lambda query, key: rotary(query, key, cos, sin, FORMS[name]), (query, key))
    plain = results(lambda query, key: rotary_reference(query, key, cos, sin, FORMS[name]), (query, key))
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_as_an_operator():
    query, key = (one.requires_grad_() for one in given())
    cos, sin = normal(2, 2, 5, 8).unbind()
    torch.library.opcheck(torch.ops.parallelize.rotary.default, (query, key, cos, sin, True, True, False, False))
