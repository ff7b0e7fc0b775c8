"""RMSNorm's kernel against float64 and as an operator; its reference against finite differences."""

from __future__ import annotations

import pytest
import torch

from parallelize.kernels import rms_norm as rms_norm_module
from parallelize.kernels.rms_norm import rms_norm, rms_norm_reference
from tests.kernel_bars import DTYPES, assert_as_exact_as_torch, needs_triton

FORMS = ({"rounds_first": True}, {"rounds_first": False}, {"rounds_first": False, "offset": 1.0})


def normal(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * size).to(dtype)


@needs_triton
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 37, 128])
def test_as_exact_as_torch(columns: int, dtype: torch.dtype, form: dict):
    assert_as_exact_as_torch(
        lambda x, weight: rms_norm(x, weight, 1e-6, **form),
        lambda x, weight: rms_norm_reference(x, weight, 1e-6, **form),
        (normal(3, 7, columns, dtype=dtype), normal(columns, dtype=dtype)), dtype=dtype,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_tiny_and_huge_rows_and_no_weight(dtype: torch.dtype, size: float):
    for weight in ([], [normal(40, dtype=dtype)]):
        assert_as_exact_as_torch(
            lambda x, weight=None: rms_norm(x, weight, 1e-6),
            lambda x, weight=None: rms_norm_reference(x, weight, 1e-6),
            (normal(5, 40, dtype=dtype, size=size), *weight), dtype=dtype,
        )  # fmt: skip


@needs_triton
def test_rows_of_zeros_and_not_a_number():
    x = normal(3, 8)
    x[0], x[1, 2] = 0.0, float("nan")
    out = rms_norm(x, torch.ones(8), 1e-6)
    assert torch.equal(out[0], torch.zeros(8))
    assert out[1].isnan().all()
    assert out[2].isfinite().all()


@needs_triton
def test_a_single_column():
    """Then the output is the weight with the sign of x, and x has no influence."""
    x, weight = normal(5, 1).requires_grad_(), normal(1).requires_grad_()
    out = rms_norm(x, weight, 0.0)
    torch.testing.assert_close(out, x.sign() * weight)
    grad_x, grad_weight = torch.autograd.grad(out.sum(), (x, weight))
    torch.testing.assert_close(grad_x, torch.zeros(5, 1))
    torch.testing.assert_close(grad_weight, x.sign().sum(0))


@needs_triton
@pytest.mark.parametrize(("rows", "columns"), [(67, 512), (67, 700), (1, 16), (40, 128), (129, 64)])
def test_rows_that_programs_share_or_go_through(rows: int, columns: int):
    """4, 2, 128, 16 and 32 rows at a time; in the first two cases some programs do so several times."""
    assert_as_exact_as_torch(
        lambda x, weight: rms_norm(x, weight, 1e-6),
        lambda x, weight: rms_norm_reference(x, weight, 1e-6),
        (normal(rows, columns), normal(columns)), dtype=torch.float32,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("columns", [64, 700, 2500])
def test_every_row_is_computed_alike(columns: int):
    """Whatever rows beside it are: a row that is not a number, and the end of the last program's, touch no other."""
    x = normal(5, columns).requires_grad_()
    out = rms_norm(x, None, 1e-6)
    [grad] = torch.autograd.grad(out.sum(), x)
    more = torch.cat([torch.full((1, columns), torch.nan), x.detach()]).requires_grad_()
    found = rms_norm(more, None, 1e-6)
    [found_grad] = torch.autograd.grad(found.sum(), more)
    assert torch.equal(found[1:], out)
    assert torch.equal(found_grad[1:], grad)


@needs_triton
def test_inputs_that_are_not_contiguous():
    wide = normal(4, 6, 80)
    for x in (wide[..., 16:48], wide.transpose(0, 1)[..., :32], wide[:, ::2, ::2][..., :32]):
        assert_as_exact_as_torch(
            lambda x, weight: rms_norm(x, weight, 1e-6),
            lambda x, weight: rms_norm_reference(x, weight, 1e-6),
            (x, normal(64)[::2]), dtype=torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(shape: tuple[int, ...]):
    x, weight = torch.empty(shape, requires_grad=True), torch.ones(16, requires_grad=True)
    out = rms_norm(x, weight, 1e-6)
    grad_x, grad_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert out.shape == grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros(16))


@needs_triton
def test_a_frozen_weight_and_double_precision():
    x, weight = normal(3, 16), normal(16)
    assert_as_exact_as_torch(
        lambda x: rms_norm(x, weight, 1e-6),
        lambda x: rms_norm_reference(x, weight.to(x.dtype), 1e-6),
        (x,), dtype=torch.float32,
    )  # fmt: skip
    x, weight = x.double(), weight.double()  # more than the kernel computes in
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_references_backward(form: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rms_norm_module, "launches_on", lambda device: False)
    x, weight = normal(3, 5).double().requires_grad_(), normal(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3, **form), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 1e-3, **form), (x,))


def test_as_an_operator():
    for weight in (None, normal(16).requires_grad_()):
        torch.library.opcheck(
            torch.ops.parallelize.rms_norm.default, (normal(3, 16).requires_grad_(), weight, 1e-6, 1.0, False)
        )
