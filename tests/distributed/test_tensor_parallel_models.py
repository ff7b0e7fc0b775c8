"""Architectures that split in different ways, on data and tensor parallel ranks, against plain Transformers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from tests.distributed.workers import quick_context
from transformers_backend.verify import Report, verify

# The promise of the project, written out here so that a loosened tolerance in the sources shows.
LOSS, GRADIENT = 1e-5, 1e-4
# Fused and transposed matrices, norms over all heads, heads of alibi, offset positions, one key/value head, latent
# keys; and the least share of their matrices that is split.
MODELS = {
    "llama": 1.0, "phi3": 1.0, "glm4": 1.0, "olmo2": 1.0, "gpt2": 0.99, "falcon": 1.0, "gpt_neox": 1.0, "bloom": 1.0,
    "opt": 0.98, "gemma2": 1.0, "qwen3": 1.0, "minicpm3": 0.95,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the report's processes from a server that has imported what they need."""
    quick_context()
    forks = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr("transformers_backend.verify.compare.mp.spawn", forks)


def _check(report: Report, share: float) -> None:
    assert report.verdict == "pass", report
    assert report.loss_difference <= LOSS, report
    assert report.gradient_error <= GRADIENT, report
    assert report.norm_error <= GRADIENT, report
    assert report.pretrained_loss_difference <= LOSS, report
    assert report.export == "bit-equal", report
    assert report.sequence_parallel, report
    assert report.sharded >= share, report


def test_architectures_that_split_in_different_ways():
    for report in verify(list(MODELS), fsdp=2, tp=2):
        _check(report, MODELS[report.model])


def test_ranks_that_share_key_value_heads(tmp_path: Path):
    folders = [tmp_path / "llama", tmp_path / "qwen3"]
    for config_class, folder in zip((LlamaConfig, Qwen3Config), folders, strict=True):
        config_class(num_key_value_heads=2, architectures=[f"{folder.name.title()}ForCausalLM"]).save_pretrained(folder)
    for report in verify(list(map(str, folders)), fsdp=1, tp=4):
        _check(report, 1.0)
        assert not report.sharded_of_twin, "two heads, shared by four ranks"
