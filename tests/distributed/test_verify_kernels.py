"""The parity report with kernels, which Triton's interpreter runs where there is Triton, under every parallelism."""

from __future__ import annotations

import functools

import pytest
import torch

from parallelize.config import KERNELS
from tests.distributed.workers import quick_context
from transformers_backend.verify import verify

# The promise of the project, written out here so that a loosened tolerance in the sources shows.
LOSS, GRADIENT = 1e-5, 1e-4


@pytest.mark.parametrize(
    ("models", "degrees"),
    [
        (["qwen3"], {"fsdp": 2}),
        (["phi3", "glm4"], {"fsdp": 1, "tp": 2}),  # gate and up in one weight, of which a rank has parts of both
        (["gemma2"], {"fsdp": 1, "pp": 2}),
    ],
    ids=str,
)
def test_models_with_kernels_are_plain_transformers(
    models: list[str], degrees: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    quick_context()
    forks = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr("transformers_backend.verify.compare.mp.spawn", forks)
    for report in verify(models, **degrees, kernels=KERNELS):
        assert report.verdict == "pass", report
        assert report.loss_difference <= LOSS, report
        assert report.gradient_error <= GRADIENT, report
        assert report.export == "bit-equal", report
