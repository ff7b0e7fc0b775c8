"""The gradient norm in one process: plain tensors against a norm worked out by hand. Meshes: tests/distributed."""

from __future__ import annotations

import pytest
import torch

from parallelize.grad_norm import clip_grad_norm_


def _parameters(*gradients: list[float] | None, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameter = torch.nn.Parameter(torch.zeros(len(gradient) if gradient else 2, dtype=dtype))
        parameter.grad = torch.tensor(gradient, dtype=dtype) if gradient else None
        parameters.append(parameter)
    return parameters


def test_scales_all_gradients_by_one_factor():
    parameters = _parameters([3.0, 0.0], None, [0.0, 4.0, 12.0])  # norm 13
    norm = clip_grad_norm_(parameters, 1.3)
    assert norm.item() == pytest.approx(13.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.3, 0.0]))
    assert parameters[1].grad is None
    torch.testing.assert_close(parameters[2].grad, torch.tensor([0.0, 0.4, 1.2]))


def test_small_gradients_stay():
    parameters = _parameters([3.0, 4.0])
    assert clip_grad_norm_(parameters, 6.0).item() == 5.0
    assert parameters[0].grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(("norm_type", "expected"), [(float("inf"), 12.0), (1.0, 19.0)])
def test_other_norms(norm_type, expected):
    parameters = _parameters([3.0, 0.0], [4.0, -12.0])
    assert clip_grad_norm_(parameters, 1.2, norm_type=norm_type).item() == expected
    torch.testing.assert_close(parameters[1].grad, torch.tensor([4.0, -12.0]) * 1.2 / expected)


def test_infinite_bound_only_measures():
    parameters = _parameters([3.0, 4.0])
    assert clip_grad_norm_(parameters, float("inf")).item() == 5.0
    assert parameters[0].grad.tolist() == [3.0, 4.0]


def test_takes_a_generator_and_agrees_with_torch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    model(torch.randn(4, 5)).square().sum().backward()
    ours = clip_grad_norm_((parameter for parameter in model.parameters()), 0.1)
    clipped = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.manual_seed(0)
    torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))  # draws the same numbers
    model(torch.randn(4, 5)).square().sum().backward()
    reference = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)
    for mine, parameter in zip(clipped, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-6, atol=0)


def test_mixed_precisions_give_a_float32_norm():
    parameters = _parameters([3.0, 4.0]) + _parameters([12.0], dtype=torch.bfloat16)
    norm = clip_grad_norm_(parameters, 1.3)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(13.0)
    assert parameters[1].grad.dtype == torch.bfloat16


def test_no_gradients_at_all():
    assert clip_grad_norm_(_parameters(None, None), 1.0).item() == 0.0
    assert clip_grad_norm_([], 1.0).item() == 0.0


def test_non_finite_norm_is_returned_or_raised():
    parameters = _parameters([float("inf"), 1.0])
    assert clip_grad_norm_(parameters, float("inf")).item() == float("inf")
    parameters = _parameters([float("nan"), 1.0])
    with pytest.raises(RuntimeError, match=r"gradient norm is nan.*overflow in the loss"):
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert parameters[0].grad[1].item() == 1.0, "an error leaves the gradients as they were"


def test_a_non_finite_norm_leaves_the_gradients_alone():
    """So that the one gradient that was to blame can still be named."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([float("nan"), 1.0]), torch.tensor([30.0, 40.0])
    assert not clip_grad_norm_(parameters, 1.0).isfinite()
    torch.testing.assert_close(parameters[1].grad, torch.tensor([30.0, 40.0]))
