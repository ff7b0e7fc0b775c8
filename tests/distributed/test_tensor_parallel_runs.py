"""Whole runs with tensor parallelism as users make them, jobs and loops of their own, beside the same on one device."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from parallelize.config import ActivationCheckpointConfig
from tests.distributed.workers import WorkerPool
from tests.jobs import restored_process, tiny_job
from transformers_backend import JobConfig, ParallelismConfig, Trainer

_WIDTHS = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": _WIDTHS | {"intermediate_size": 48, "num_key_value_heads": 2},
    "phi3": _WIDTHS | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0},
    "falcon": _WIDTHS,
    "gpt2": {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip
_DEGREES = ("data_parallel_replicate_degree", "data_parallel_shard_degree", "tensor_parallel_degree")
_ROWS, _STEPS = 4, 3
_DOCUMENTS = ((9, 1, 21), (31,), (14, 17), (2, 29))  # lengths in each row of a batch; 31 is no multiple of a degree


# -- jobs -----------------------------------------------------------------------------------------------------------


def _job(folder: str, model_type: str, mesh: tuple[int, int, int], changes: dict) -> JobConfig:
    """Two micro-batches a step on one or on two data ranks, the same four rows together."""
    config = tiny_job(
        folder, "-".join(map(str, mesh)), training__steps=_STEPS, training__global_batch_size=_ROWS,
        training__local_batch_size=_ROWS // 2 // (mesh[0] * mesh[1]), hf_transformers__model_type=model_type,
        hf_transformers__config_overrides=MODELS[model_type], **changes,
    )  # fmt: skip
    config.parallelism = ParallelismConfig(**dict(zip(_DEGREES, mesh, strict=True)))
    return config


def _batch(step: int, *, seq: int, packed: bool) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 300, (_ROWS, seq), generator=torch.Generator().manual_seed(step))
    if not packed:
        return {"input_ids": tokens, "labels": tokens.clone()}
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in _DOCUMENTS])
    return {"input_ids": tokens, "labels": tokens.masked_fill(positions == 0, -100), "position_ids": positions}


def _train(config: JobConfig) -> list[float]:
    """Train on batches that depend on the step only, however many data ranks there are; losses and norms."""
    with contextlib.closing(Trainer(config)) as trainer:
        model, taken = trainer.model, iter(range(2 * _STEPS))

        def next_batch(data) -> dict[str, torch.Tensor]:
            step, part = divmod(next(taken), 2)
            packed = config.training.packing == "documents"
            rows = _batch(step, seq=config.training.seq_len, packed=packed)
            own = 2 * part + torch.arange(2).chunk(model.dims.data_parallel_size)[model.data_rank]
            return {name: tensor[own] for name, tensor in rows.items()}

        trainer._next_batch = next_batch
        results = [trainer.train_step() for _ in range(_STEPS)]
        found = [number.item() for result in results for number in (result.loss, result.grad_norm)]
        return [*found, trainer.evaluate()] if config.validation.enable else found


_PACKED = {"training__packing": "documents", "training__seq_len": 31}


@pytest.mark.parametrize(
    ("model_type", "mesh", "changes", "tolerance"),
    [
        pytest.param("llama", (1, 1, 4), {**_PACKED, "validation__enable": True, "validation__steps": -1}, 1e-5,
                     id="llama: documents by positions, no multiple of the degree, validation, heads shared"),
        pytest.param("falcon", (1, 1, 4), _PACKED, 1e-5, id="falcon: documents by masks"),
        pytest.param("phi3", (1, 2, 2), {"activation_checkpoint": ActivationCheckpointConfig(mode="full")}, 1e-5,
                     id="phi3: fused, recomputed"),
        pytest.param("gpt2", (2, 1, 2), {"activation_checkpoint": ActivationCheckpointConfig("selective", "op")}, 1e-5,
                     id="gpt2: replicas, recomputed by operation"),
        pytest.param("gpt2", (1, 2, 2), {"training__enable_cpu_offload": True}, 1e-5, id="gpt2: offloaded"),
        pytest.param("phi3", (1, 1, 4), {"optimizer__name": "Muon"}, 1e-3, id="phi3: Muon"),  # orthogonalises in bf16
        pytest.param("llama", (1, 2, 2), {"training__mixed_precision_param": "bfloat16"}, 3e-2, id="llama: bfloat16"),
    ],
)  # fmt: skip
def test_a_job_is_that_of_one_rank(
    four: WorkerPool, folder: str, model_type: str, mesh: tuple[int, int, int], changes: dict, tolerance: float
):
    keys = {key: value for key, value in changes.items() if "__" in key}
    if "validation__enable" in keys:
        keys["validation__dataset_path"] = f"{folder}/held_out.txt"
    alone, together = (_job(folder, model_type, degrees, keys) for degrees in ((1, 1, 1), mesh))
    for section, value in changes.items():
        if "__" not in section:
            setattr(together, section, value)
    with restored_process():
        expected = _train(alone)
    for found in four.run(_train, together):
        assert found == pytest.approx(expected, rel=tolerance)


def test_a_job_ends_with_a_sample_and_counts_tokens_once(four: WorkerPool, folder: str):
    config = _job(folder, "llama", (1, 2, 2), {"job__sample_prompt": "1: line", "job__sample_tokens": 5})
    four.run(_run, config)
    lines = [json.loads(line) for line in (Path(config.job.dump_folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3], "one rank writes"
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(4 * line["tokens_per_second_per_device"])


def _run(config: JobConfig) -> None:
    with contextlib.closing(Trainer(config)) as trainer:
        trainer.train()
        assert trainer.tokens_per_step == _ROWS * config.training.seq_len
