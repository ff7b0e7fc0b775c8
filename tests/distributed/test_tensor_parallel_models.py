"""Architectures that split in different ways, on data and tensor parallel ranks, against plain Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen3Config

from parallelize.config import ParallelismConfig
from tests.distributed.workers import WorkerPool
from transformers_backend.verify.compare import verify_model
from transformers_backend.verify.report import Report

# The promise of the project, written out here so that a loosened tolerance in the sources shows.
LOSS, GRADIENT = 1e-5, 1e-4
# Fused and transposed matrices, norms over all heads, heads of alibi, offset positions, one key/value head, latent
# keys; and the least share of their matrices that is split.
MODELS = {
    "llama": 1.0, "phi3": 1.0, "glm4": 1.0, "olmo2": 1.0, "gpt2": 0.99, "falcon": 1.0, "gpt_neox": 1.0, "bloom": 1.0,
    "opt": 0.98, "gemma2": 1.0, "qwen3": 1.0, "minicpm3": 0.95,
}  # fmt: skip


@pytest.fixture(scope="module")
def four() -> Iterator[WorkerPool]:
    with WorkerPool(4) as pool:
        yield pool


def _verify(models: list[str], parallelism: ParallelismConfig, folder: str) -> list[Report]:
    return [
        verify_model(model, parallelism, compile=False, folder=Path(folder) / str(index))
        for index, model in enumerate(models)
    ]


def _check(report: Report, share: float) -> None:
    assert report.verdict == "pass", report
    assert report.loss_difference <= LOSS, report
    assert report.gradient_error <= GRADIENT, report
    assert report.norm_error <= GRADIENT, report
    assert report.pretrained_loss_difference <= LOSS, report
    assert report.export == "bit-equal", report
    assert report.sequence_parallel, report
    assert report.sharded is None or report.sharded >= share, report


def test_architectures_that_split_in_different_ways(four: WorkerPool, tmp_path: Path):
    mesh = ParallelismConfig(data_parallel_shard_degree=2, tensor_parallel_degree=2)
    first, *others = four.run(_verify, list(MODELS), mesh, str(tmp_path))
    for report in first:
        assert report.sharded is not None, "the first rank measures it"
        _check(report, MODELS[report.model])
    for reports in others:
        assert [report.verdict for report in reports] == ["pass"] * len(MODELS)


def test_ranks_that_share_key_value_heads(four: WorkerPool, tmp_path: Path):
    folders = [tmp_path / "llama", tmp_path / "qwen3"]
    for config_class, folder in zip((LlamaConfig, Qwen3Config), folders, strict=True):
        config_class(num_key_value_heads=2, architectures=[f"{folder.name.title()}ForCausalLM"]).save_pretrained(folder)
    mesh = ParallelismConfig(data_parallel_shard_degree=1, tensor_parallel_degree=4)
    for report in four.run(_verify, list(map(str, folders)), mesh, str(tmp_path))[0]:
        _check(report, 1.0)
        assert not report.sharded_of_twin
