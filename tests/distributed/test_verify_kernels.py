"""The parity report with kernels, which Triton's interpreter runs where there is Triton, on two ranks."""

from __future__ import annotations

import functools

import pytest
import torch

from parallelize.config import KERNELS
from tests.distributed.workers import quick_context
from transformers_backend.verify import verify

# The promise of the project, written out here so that a loosened tolerance in the sources shows.
LOSS, GRADIENT = 1e-5, 1e-4


def test_a_split_model_with_kernels_is_plain_transformers(monkeypatch: pytest.MonkeyPatch):
    """Phi-3 has gate and up in one weight, of which each rank has a part of both."""
    quick_context()
    forks = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr("transformers_backend.verify.compare.mp.spawn", forks)
    (report,) = verify(["phi3"], fsdp=1, tp=2, kernels=KERNELS)
    assert report.verdict == "pass", report
    assert report.loss_difference <= LOSS, report
    assert report.gradient_error <= GRADIENT, report
    assert report.export == "bit-equal", report
