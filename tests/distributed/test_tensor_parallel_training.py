"""Two tensor-parallel ranks are one data rank: the same batches, random numbers and figures as a run on one rank."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.workers import WorkerPool
from tests.jobs import SEQUENCE, restored_process, tiny_job
from transformers_backend import HFTransformerModel, JobConfig, ParallelismConfig, Trainer
from transformers_backend.model_args import HFTransformerModelArgs


def _job(folder: str, name: str, *, tensor: int, **changes) -> JobConfig:
    """Two micro-batches of two sequences a step, on one data rank."""
    validation = {"validation__enable": True, "validation__freq": 2, "validation__steps": -1,
                  "validation__dataset_path": f"{folder}/held_out.txt"}  # fmt: skip
    config = tiny_job(folder, name, training__global_batch_size=4, **validation, **changes)
    config.parallelism = ParallelismConfig(tensor_parallel_degree=tensor)
    return config


def _train(config: JobConfig) -> dict[str, object]:
    with contextlib.closing(Trainer(config)) as trainer:
        if trainer.step == 0:
            torch.rand(5)  # as dropout would
        position = trainer.data.state_dict()
        tokens = [next(trainer.data)["input_ids"] for _ in range(2)]
        trainer.data.load_state_dict([position])
        trainer.train()
        return {
            "tokens": tokens,
            "next tokens": next(trainer.data)["input_ids"],
            "random numbers": torch.rand(4),
            "tokens a step": trainer.tokens_per_step,
            "data": (trainer.model.data_rank, trainer.model.dims.data_parallel_size),
            "weights": trainer.model.full_state_dict(),
        }


def _lines(config: JobConfig, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(config.job.dump_folder) / name).read_text().splitlines()]


def test_a_run_is_that_of_one_rank(two: WorkerPool, folder: str):
    alone, together = _job(folder, "alone", tensor=1), _job(folder, "together", tensor=2)
    with restored_process():
        expected = _train(alone)
    for found in two.run(_train, together):
        assert all(map(torch.equal, found["tokens"], expected["tokens"]))
        assert torch.equal(found["next tokens"], expected["next tokens"])
        assert torch.equal(found["random numbers"], expected["random numbers"])
        assert found["tokens a step"] == expected["tokens a step"] == 4 * SEQUENCE
        assert found["data"] == (0, 1)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(_lines(together), _lines(alone), strict=True):
        for figure in ("loss", "grad_norm"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4), figure
        assert ours["tokens_per_second_per_device"] == pytest.approx(ours["tokens_per_second"] / 2)
        work = [line["tflops_per_device"] / line["tokens_per_second_per_device"] for line in (ours, theirs)]
        assert work[0] == pytest.approx(work[1]), "FLOPs of a token are the model's, not a rank's"
    for ours, theirs in zip(_lines(together, "validation.jsonl"), _lines(alone, "validation.jsonl"), strict=True):
        assert ours["tokens"] == theirs["tokens"], "every token counts once"
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-4)


def test_a_resumed_run_is_the_same_bit_by_bit(two: WorkerPool, folder: str):
    options = {"checkpoint__enable": True, "checkpoint__interval": 3, "checkpoint__last_save_model_only": False,
               "lr_scheduler__total_steps": 6}  # fmt: skip
    whole, first, second = (
        _job(folder, name, tensor=2, training__steps=steps, **options) for name, steps in (("a", 6), ("b", 3), ("b", 6))
    )
    expected = two.run(_train, whole)
    two.run(_train, first)
    resumed = two.run(_train, second)
    for found, wanted in zip(resumed, expected, strict=True):
        assert all(torch.equal(found["weights"][name], weight) for name, weight in wanted["weights"].items())
        assert torch.equal(found["random numbers"], wanted["random numbers"]), "the state was saved once"
        assert torch.equal(found["next tokens"], wanted["next tokens"])
    with restored_process():  # the same run goes on on one rank
        third = _job(folder, "b", tensor=1, training__steps=8, **options)
        _train(third)
    assert [line["step"] for line in _lines(third)] == list(range(1, 9))


_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}


def _wrapped(seed: int) -> HFTransformerModel:
    torch.manual_seed(0)
    model = HFTransformerModel(HFTransformerModelArgs().update_from_config(tiny_job("", "")))
    torch.manual_seed(seed)
    return model.parallelize(ParallelismConfig(tensor_parallel_degree=2))


def _random_after_seeds_of_their_own() -> torch.Tensor:
    _wrapped(seed=torch.distributed.get_rank())
    return torch.rand(8)


def test_ranks_that_were_seeded_apart_draw_the_same(two: WorkerPool):
    first, second = two.run(_random_after_seeds_of_their_own)
    assert torch.equal(first, second)


def _train_on_batches(tokens_of_ranks: list[torch.Tensor]) -> str | None:
    batch = tokens_of_ranks[torch.distributed.get_rank()]
    try:
        _wrapped(seed=0).forward_backward(batch, labels=batch)
    except ValueError as error:
        return str(error)
    return None


def test_different_batches_in_one_tensor_parallel_group_are_refused(two: WorkerPool):
    batch = torch.arange(12).view(2, 6)
    assert two.run(_train_on_batches, [batch, batch]) == [None, None]
    for other in (batch + 1, batch[:1], batch.view(1, 12)):
        for message in two.run(_train_on_batches, [batch, other]):
            assert "differ between ranks of one tensor-parallel group of 2" in message
            assert "Give each rank the batch of its data_rank" in message


def _refusals_of_batches(batch: torch.Tensor) -> list[str]:
    model, rank = _wrapped(seed=0), torch.distributed.get_rank()
    unknown = batch.clone()
    unknown[1, 2] = model.vocabulary_size
    messages = []
    model.forward_backward(batch, labels=batch)
    for step, tokens in (
        (model.evaluate, batch + rank),
        (model.forward_backward, batch + rank),  # every batch is compared, not only the first
        (model.forward_backward, unknown),
        (model.forward_backward, torch.where(unknown == model.vocabulary_size, -1, unknown)),
    ):
        try:
            step(tokens, labels=batch)
            messages.append("")
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def test_later_batches_and_unknown_tokens_are_refused(two: WorkerPool):
    for *different, one, other in two.run(_refusals_of_batches, torch.arange(12).view(2, 6)):
        for message in different:
            assert "differ between ranks of one tensor-parallel group of 2" in message
        for message in (one, other):
            assert "a token id is outside of the vocabulary of" in message


def _message_of_a_tied_plan() -> str:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**_TINY, tie_word_embeddings=True))
    try:
        HFTransformerModel.wrap(model).parallelize(
            ParallelismConfig(tensor_parallel_degree=2, tensor_parallel_plan={"lm_head": "replicate"})
        )
    except ValueError as error:
        return str(error)
    return ""


def test_a_plan_that_splits_tied_embeddings_in_two_ways_is_refused(two: WorkerPool):
    for message in two.run(_message_of_a_tied_plan):
        assert "lm_head.weight is replicate, but they are one parameter" in message
