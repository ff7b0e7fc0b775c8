"""The trainer on two ranks: a step is plain Transformers', a resumed run is bit-equal, and a bad rank is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from parallelize.distributed import gather_objects
from tests.distributed.workers import WorkerPool
from tests.jobs import SEQUENCE, tiny_job
from transformers_backend import JobConfig, Trainer


def _job(folder: str, name: str, **changes) -> JobConfig:
    """Two micro-batches of one sequence on each of two ranks."""
    return tiny_job(folder, name, **{"training__local_batch_size": 1, "training__global_batch_size": 4, **changes})


def _train(config: JobConfig) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Run a job; returns the weights, and this rank's tokens of the step that would come next."""
    trainer = Trainer(config)
    trainer.train()
    state, batch = trainer.model.full_state_dict(), next(trainer.data)
    trainer.close()
    assert dist.is_initialized(), "the process group is its maker's"
    return state, [batch["input_ids"]]


def _curve(config: JobConfig) -> list[tuple]:
    lines = [json.loads(line) for line in (Path(config.job.dump_folder) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_a_resumed_run_is_the_same_bit_by_bit(two: WorkerPool, folder: str, optimizer: str):
    options = {"optimizer__name": optimizer, "checkpoint__enable": True, "checkpoint__interval": 3,
               "checkpoint__last_save_model_only": False, "lr_scheduler__total_steps": 6}  # fmt: skip
    whole, first, second = (
        _job(folder, name, training__steps=steps, **options) for name, steps in (("a", 6), ("b", 3), ("b", 6))
    )
    expected = two.run(_train, whole)
    two.run(_train, first)
    resumed = two.run(_train, second)
    assert [line[0] for line in _curve(whole)] == [1, 2, 3, 4, 5, 6], "one line a step: only one rank writes"
    assert _curve(second) == _curve(whole)
    for (state, tokens), (expected_state, expected_tokens) in zip(resumed, expected, strict=True):
        assert all(torch.equal(state[name], value) for name, value in expected_state.items())
        assert torch.equal(tokens[0], expected_tokens[0]), "each rank goes on in its own part of the data"
    assert not torch.equal(expected[0][1][0], expected[1][1][0]), "ranks read different data"


def _steps_beside_plain(config: JobConfig, start: str) -> list[tuple[float, float, float, float]]:
    """Three steps, each beside plain Transformers on the batches of all ranks and micro-batches together."""
    trainer = Trainer(config)
    trainer.model.save_pretrained(start)
    plain = AutoModelForCausalLM.from_pretrained(start).train()
    groups = [{"params": [p for p in plain.parameters() if (p.ndim >= 2) is decayed], "weight_decay": decay}
              for decayed, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    numbers = []
    for step in range(3):
        positions = gather_objects(trainer.data.state_dict())
        mine = [next(trainer.data)["input_ids"] for _ in range(trainer.accumulation_steps)]
        trainer.data.load_state_dict(positions)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        batch = torch.cat([tokens for rank in everyone for tokens in rank])
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 2)
        loss = plain(input_ids=batch, labels=batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result = trainer.train_step()
        numbers.append((result.loss.item(), loss.item(), result.grad_norm.item(), norm.item()))
    trainer.close()
    return numbers


def test_steps_are_plain_transformers_on_the_global_batch(two: WorkerPool, folder: str):
    config = _job(folder, "plain", lr_scheduler__decay_ratio=0.0)
    for numbers in two.run(_steps_beside_plain, config, f"{folder}/start"):
        for loss, expected_loss, norm, expected_norm in numbers:
            assert loss == pytest.approx(expected_loss, rel=1e-4)
            assert norm == pytest.approx(expected_norm, rel=1e-3)


def _poisoned_rank(config: JobConfig) -> str:
    """The second rank's tokens meet an embedding row that overflows."""
    trainer = Trainer(config)
    trainer.train_step()
    only_there = 300  # no byte: the text does not have it
    with torch.no_grad():
        embedding = trainer.model.hf_model.model.embed_tokens.weight
        row = only_there - 192  # the second half lives on the second rank
        if trainer.rank == 1:
            embedding.to_local()[row] = float("nan")
    original = trainer._next_batch

    def with_a_bad_token(data):
        batch = original(data)
        if trainer.rank == 1:
            batch["input_ids"][:, 3] = only_there
        return batch

    trainer._next_batch = with_a_bad_token
    with pytest.raises(FloatingPointError, match="step 2: loss nan") as caught:
        trainer.train_step()
    trainer.close()
    return str(caught.value)


def test_the_rank_with_the_bad_loss_is_named(two: WorkerPool, folder: str):
    messages = two.run(_poisoned_rank, _job(folder, "poisoned"))
    assert messages[0] == messages[1]
    assert "Non-finite loss on rank 1;" in messages[0]


def _validate(config: JobConfig) -> float:
    trainer = Trainer(config)
    loss = trainer.evaluate()
    trainer.close()
    return loss


def test_validation_sees_every_token_once_whatever_the_ranks(two: WorkerPool, folder: str):
    options = {"validation__enable": True, "validation__dataset_path": f"{folder}/held_out.txt",
               "validation__seq_len": SEQUENCE, "training__global_batch_size": -1}  # fmt: skip
    losses = []
    for batch in (1, 3):
        config = _job(folder, f"validation-{batch}", validation__local_batch_size=batch, **options)
        one, other = two.run(_validate, config)
        assert one == other
        losses.append(one)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    lines = [(Path(folder) / f"validation-{batch}" / "validation.jsonl").read_text() for batch in (1, 3)]
    assert json.loads(lines[0])["tokens"] == json.loads(lines[1])["tokens"]


def test_the_export_of_two_ranks_is_their_model(two: WorkerPool, folder: str):
    config = _job(folder, "export", training__steps=2, checkpoint__enable=True, checkpoint__last_save_in_hf=True,
                  job__sample_prompt="1: line", job__sample_tokens=3)  # fmt: skip
    (state, _), _ = two.run(_train, config)
    model = AutoModelForCausalLM.from_pretrained(Path(config.job.dump_folder) / "checkpoint" / "step-2-hf")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
