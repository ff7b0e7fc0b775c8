"""Whole jobs whose sequences are shared beside the same on one device: steps, validation, sample, export, resuming."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from parallelize.config import ParallelismConfig
from tests.distributed.workers import Messages, WorkerPool
from tests.jobs import restored_process, tiny_job
from transformers_backend import JobConfig, Trainer

_SHARED = {"context_parallel_degree": 2}
_LLAMA = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
_GPT2 = {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.2,
         "embd_pdrop": 0.2, "attn_pdrop": 0.0}  # fmt: skip


def _job(folder: str, name: str, parallelism: dict, **changes) -> JobConfig:
    config = tiny_job(folder, name, **({"training__steps": 3} | changes))
    config.parallelism = ParallelismConfig(**parallelism)
    return config


def _run(config: JobConfig) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Train to the end; what was logged, and the weights."""
    with Messages("transformers_backend") as messages, contextlib.closing(Trainer(config)) as trainer:
        trainer.train()
        return messages.texts, trainer.model.full_state_dict()


def _lines(config: JobConfig, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(config.job.dump_folder) / file).read_text().splitlines()]


def _said(texts: list[str], beginning: str) -> list[str]:
    return [text for text in texts if text.startswith(beginning)]


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_a_job_is_that_of_one_device(two: WorkerPool, folder: str, packing: str):
    options = {
        "training__packing": packing, "job__sample_prompt": "1: line", "job__sample_tokens": 6,
        "validation__enable": True, "validation__freq": 2, "validation__dataset_path": f"{folder}/held_out.txt",
        "validation__local_batch_size": 3, "training__global_batch_size": 4, "checkpoint__enable": True,
        "checkpoint__last_save_in_hf": True,
    }  # fmt: skip
    alone, together = _job(folder, "alone", {}, **options), _job(folder, "together", _SHARED, **options)
    with restored_process():
        said, weights = _run(alone)
    (found_said, found_weights), _ = two.run(_run, together)
    for file, number in (
        ("metrics.jsonl", "loss"),
        ("metrics.jsonl", "grad_norm"),
        ("validation.jsonl", "validation_loss"),
    ):
        expected, found = ([line[number] for line in _lines(config, file)] for config in (alone, together))
        assert len(found) == len(expected) > 0
        assert found == pytest.approx(expected, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(found_weights[name], weight, rtol=0, atol=2e-3)  # Adam divides by small numbers
    assert _said(found_said, "sample of") == _said(said, "sample of") != []
    for line in _lines(together):
        assert line["tokens_per_second"] == pytest.approx(2 * line["tokens_per_second_per_device"])
        flops, expected_flops = (
            figures["tflops_per_device"] / figures["tokens_per_second_per_device"]
            for figures in (line, _lines(alone)[0])
        )
        assert flops == pytest.approx(expected_flops), "every token counts once"
    (table,) = _said(found_said, "the run:")
    assert "context     ring attention on 2 ranks" in table
    assert "attention sdpa" in table
    (exported,) = Path(together.job.dump_folder).glob("**/step-3-hf")
    assert "context_parallel" not in (exported / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(exported).config._attn_implementation == "sdpa"


_SPLIT = {"tensor_parallel_degree": 2}


def _part(folder: str, name: str, parallelism: dict, steps: int) -> JobConfig:
    return _job(
        folder, name, parallelism, training__steps=steps, lr_scheduler__total_steps=4, checkpoint__enable=True,
        checkpoint__interval=2, training__local_batch_size=2 if parallelism else 1, training__global_batch_size=2,
    )  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [(_SPLIT, _SHARED), (_SHARED, _SHARED)], ids=str)
def test_a_run_goes_on_on_another_mesh(two: WorkerPool, folder: str, before: dict, after: dict):
    """Meshes of as many data ranks, one, which read the same text."""
    two.run(_run, _part(folder, "whole", before, 4))
    two.run(_run, _part(folder, "parts", before, 2))
    two.run(_run, _part(folder, "parts", after, 4))
    expected, found = ([line["loss"] for line in _lines(_part(folder, name, after, 4))] for name in ("whole", "parts"))
    assert len(found) == 4
    if before == after:
        assert found == expected
    assert found == pytest.approx(expected, rel=1e-4)


def _go_on(config: JobConfig) -> None:
    """A run, and what its model is at its beginning and its end, each exported."""
    with contextlib.closing(Trainer(config)) as trainer:
        for moment in ("begin", "end"):
            trainer.model.save_pretrained(f"{config.job.dump_folder}/{moment} {config.training.steps}")
            if moment == "begin":
                trainer.train()


def test_a_run_goes_on_with_other_degrees(two: WorkerPool, four: WorkerPool, folder: str):
    """One device, pairs that share a sequence, two such pairs, one device: what is loaded is what was saved."""
    options = {"training__local_batch_size": 2, "training__global_batch_size": 4, "checkpoint__enable": True,
               "checkpoint__interval": 1, "checkpoint__async_mode": "disabled",
               "lr_scheduler__total_steps": 5}  # fmt: skip
    both = {"data_parallel_shard_degree": 2, **_SHARED}

    def job(name: str, parallelism: dict, steps: int) -> JobConfig:
        return _job(folder, name, parallelism, training__steps=steps, **options)

    with restored_process():
        _go_on(job("whole", {}, 4))
        _go_on(job("parts", {}, 1))
    two.run(_go_on, job("parts", _SHARED, 2))
    four.run(_go_on, job("parts", both, 3))
    with restored_process():
        _go_on(job("parts", {}, 4))
    exports = {path.parent.name: path.read_bytes() for path in Path(folder, "parts").glob("*/model.safetensors")}
    assert len(exports) == 8
    for steps in (2, 3, 4):
        assert exports[f"begin {steps}"] == exports[f"end {steps - 1}"]
        assert exports[f"begin {steps}"] != exports[f"end {steps}"]
    expected, found = ([line["loss"] for line in _lines(job(name, {}, 4))] for name in ("whole", "parts"))
    assert len(found) == 4
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4), "two data ranks read the text in another order"


def _dropped(config: JobConfig) -> tuple[int, list[float], torch.Tensor]:
    with contextlib.closing(Trainer(config)) as trainer:
        first = torch.rand(4)
        return trainer.model.dropout_rank, first.tolist(), trainer.train_step().loss


def test_ranks_drop_other_things(two: WorkerPool, folder: str):
    options = {"hf_transformers__model_type": "gpt2", "hf_transformers__config_overrides": _GPT2}
    (rank, numbers, loss), (other_rank, other_numbers, other_loss) = two.run(
        _dropped, _job(folder, "dropout", _SHARED, **options)
    )
    assert (rank, other_rank) == (0, 1)
    assert numbers != other_numbers
    assert loss == other_loss


def _refused(config: JobConfig) -> str:
    with pytest.raises(ValueError, match="context") as caught, contextlib.closing(Trainer(config)) as trainer:
        trainer.train()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"training__seq_len": 30}, "training.seq_len = 30: context_parallel_degree = 2 cuts", id="length"),
        pytest.param({"hf_transformers__model_type": "llama",
                      "hf_transformers__config_overrides": _LLAMA | {"attention_dropout": 0.1}},
                     "LlamaForCausalLM has attention_dropout = 0.1. Set hf_transformers.config_overrides",
                     id="attention dropout"),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_in_words_on_every_rank(two: WorkerPool, folder: str, changes: dict, message: str):
    for text in two.run(_refused, _job(folder, "refused", _SHARED, **changes)):
        assert message in text
