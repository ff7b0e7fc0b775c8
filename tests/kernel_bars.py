"""The bar of every kernel: as near to float64 as plain torch in the same dtype, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from parallelize.kernels.language import launches_on

needs_triton = pytest.mark.skipif(not launches_on(torch.device("cpu")), reason="no Triton, or not its interpreter")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SLACK = 1.1
_MORE = {
    # Half an ulp: what another order of a sum, or another library's exp, makes.
    torch.float32: 2.0**-24,
    # An ulp: Triton's interpreter cuts bf16 off where a GPU rounds to nearest.
    torch.bfloat16: 2.0**-7,
}


def assert_as_exact_as_torch(
    kernel: Callable, reference: Callable, inputs: Sequence[torch.Tensor], *, dtype: torch.dtype, roundings: int = 1
) -> None:
    """Compare a kernel's outputs and gradients with those of `reference` in float64.

    Both take tensors like `inputs`, all of which get gradients, and return a tensor or a tuple of them.
    roundings: how often a value is rounded to the dtype on its way, each of which may cost what _MORE says.
    """
    found, plain = results(kernel, inputs), results(reference, inputs)
    exact = results(reference, inputs, torch.float64)
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        assert ours.shape == right.shape
        assert ours.dtype == theirs.dtype
        bar = _SLACK * error(theirs, right) + roundings * _MORE.get(dtype, 0.0)
        assert error(ours, right) <= bar, (error(ours, right), bar)


def results(
    function: Callable, inputs: Sequence[torch.Tensor], dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Outputs and the gradients of all inputs, in this dtype or their own."""
    leaves = [one.detach().to(dtype or one.dtype).requires_grad_() for one in inputs]
    returned = function(*leaves)
    outs = returned if isinstance(returned, tuple) else (returned,)
    generator = torch.Generator().manual_seed(7)
    # Numbers that every dtype has, so that all compute the same.
    grads = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outs]
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference, relative to that of what is exact; 0 for nothing."""
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
