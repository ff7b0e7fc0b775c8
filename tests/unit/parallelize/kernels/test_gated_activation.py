"""Gated activations' kernels against float64 and as operators; their references against finite differences."""

from __future__ import annotations

import pytest
import torch

from parallelize.kernels import gated_activation as gated_activation_module
from parallelize.kernels.gated_activation import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_reference,
    packed_gated_activation,
)
from tests.kernel_bars import DTYPES, assert_as_exact_as_torch, needs_triton, results


def normal(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 37, 1100])
def test_as_exact_as_torch(columns: int, dtype: torch.dtype, activation: str):
    gate, up = (normal(2, 3, columns, dtype=dtype, size=2.0, seed=seed) for seed in (1, 2))
    for inputs in ((gate, up), (gate,)):
        assert_as_exact_as_torch(
            lambda gate, up=None: gated_activation(gate, up, activation),
            lambda gate, up=None: gated_activation_reference(gate, up, activation),
            inputs, dtype=dtype, roundings=len(inputs),  # the activation, and its product with up
        )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate_first", [True, False])
def test_two_halves_of_one_tensor(activation: str, gate_first: bool):
    def reference(packed):
        first, second = packed.chunk(2, dim=-1)
        return gated_activation_reference(*(first, second) if gate_first else (second, first), activation)

    whole = normal(3, 5, 2 * 37)
    for packed in (whole, whole.transpose(0, 1), normal(3, 5, 100)[..., :74]):
        assert_as_exact_as_torch(
            lambda packed: packed_gated_activation(packed, activation, gate_first=gate_first),
            reference, (packed,), dtype=torch.float32,
        )  # fmt: skip


@needs_triton
def test_rows_and_columns_that_lie_apart():
    wide = normal(4, 6, 90)
    gate, up = wide.chunk(2, dim=-1)
    for inputs in ((gate, up), (gate.transpose(0, 1), up.transpose(0, 1)), (wide[..., ::2], up)):
        assert_as_exact_as_torch(
            lambda gate, up: gated_activation(gate, up, "silu"),
            lambda gate, up: gated_activation_reference(gate, up, "silu"),
            inputs, dtype=torch.float32,
        )  # fmt: skip


@needs_triton
def test_halves_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch):
    """Nothing of the size of an input is allocated but the output."""
    gate, up = normal(4, 6, 64).chunk(2, dim=-1)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("an input was copied"))
    assert gated_activation_module._rows(gate).data_ptr() == gate.data_ptr()
    assert gated_activation_module._rows(up).data_ptr() == up.data_ptr()
    gated_activation(gate, up, "silu")


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(activation: str):
    """Far from 0, activations are the identity or 0, and so are slopes 1 or 0 (squared ReLU: 2 x)."""
    gate = torch.tensor([-3e4, -300.0, -50.0, -1e-30, 0.0, 1e-30, 50.0, 300.0, 3e4])
    out, grad = results(lambda gate: gated_activation(gate, None, activation), (gate,))
    plain, plain_grad = results(lambda gate: gated_activation_reference(gate, None, activation), (gate,))
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-6, atol=1e-7)


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinity_and_not_a_number_stay_what_they_are(activation: str):
    values = torch.tensor([float("nan"), float("inf"), 1.0])
    out = gated_activation(values, torch.ones(3), activation)
    assert out[0].isnan()
    assert out[1] == float("inf")
    assert out[2].isfinite()
    grad_gate, _ = results(lambda gate, up: gated_activation(gate, up, activation), (values, torch.ones(3)))[1:]
    assert grad_gate[0].isnan()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (2, 0)])
def test_nothing(shape: tuple[int, ...]):
    gate, up = (torch.empty(shape, requires_grad=True) for _ in range(2))
    out = gated_activation(gate, up, "gelu")
    grads = torch.autograd.grad(out.sum(), (gate, up))
    assert out.shape == grads[0].shape == grads[1].shape == shape


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_references_backward(activation: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gated_activation_module, "launches_on", lambda device: False)
    gate, up = (normal(3, 5, seed=seed).double().requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda gate, up: gated_activation(gate, up, activation), (gate, up))
    assert torch.autograd.gradcheck(lambda gate: gated_activation(gate, None, activation), (gate,))
    packed = normal(3, 6).double().requires_grad_()
    for gate_first in (True, False):
        assert torch.autograd.gradcheck(
            lambda packed, first=gate_first: packed_gated_activation(packed, activation, gate_first=first), (packed,)
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_triton_bits_are_those_of_torch(activation: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gated_activation_module, "launches_on", lambda device: False)
    inputs = [normal(4, 9, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
    found = results(lambda gate, up: gated_activation(gate, up, activation), inputs)
    plain = results(lambda gate, up: gated_activation_reference(gate, up, activation), inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))


def test_as_operators():
    gate, up = (normal(3, 16, seed=seed).requires_grad_() for seed in (1, 2))
    operators = torch.ops.parallelize
    torch.library.opcheck(operators.gated_activation.default, (gate, up, "silu"))
    torch.library.opcheck(operators.gated_activation.default, (gate, None, "relu2"))
    torch.library.opcheck(operators.packed_gated_activation.default, (gate, "gelu_tanh", False))
