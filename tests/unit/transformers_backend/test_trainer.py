"""The trainer in this process: resume bit by bit, checkpoints, validation, export, and what stops a run."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from tests.jobs import SEQUENCE, restored_process, tiny_job
from transformers_backend import JobConfig, Trainer, load_job_config
from transformers_backend.train import main

STATED_KEYS = {
    "step", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "peak_memory_gib", "time_s", "data_wait_share",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("process")


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobConfig]:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(6):
        (text / f"{number}.txt").write_text("".join(f"{number}: line {line} of some text\n" for line in range(12)))
    (tmp_path / "held_out.txt").write_text("something else, of a length that no block divides" * 3)

    def make(folder: str = "run", **changes) -> JobConfig:
        return tiny_job(tmp_path, folder, **changes)

    return make


def _run(config: JobConfig) -> Trainer:
    trainer = Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer


def _lines(config: JobConfig, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(config.job.dump_folder) / name).read_text().splitlines()]


def _curve(config: JobConfig) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in _lines(config)]


def _folders(config: JobConfig) -> set[str]:
    return {path.name for path in (Path(config.job.dump_folder) / "checkpoint").iterdir()}


# -- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_learns_and_reports(job):
    config = job(training__steps=30)
    _run(config)
    assert not dist.is_initialized(), "the trainer ends the process group that it started"
    lines = _lines(config)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert all(line.keys() >= STATED_KEYS for line in lines)
    assert all(line["mfu"] is None for line in lines), "no peak is known of a CPU"
    assert lines[0]["loss"] == pytest.approx(math.log(384), rel=0.05)
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert [line["lr"] for line in lines[:2]] == [0.005, 0.01]
    assert all(line[key] > 0 for line in lines for key in ("grad_norm", "tokens_per_second", "peak_memory_gib"))
    assert load_job_config([str(Path(config.job.dump_folder) / "config.toml")]) == config


def test_log_freq_logs_the_first_and_the_last_step_too(job):
    config = job(training__steps=8, metrics__log_freq=3)
    _run(config)
    assert [line["step"] for line in _lines(config)] == [1, 3, 6, 8]


def test_the_first_loss_and_step_are_plain_transformers(job, tmp_path: Path):
    """One AdamW step by hand on a model that plain Transformers loaded from the same folder."""
    config = job(hf_transformers__init="pretrained")
    trainer = Trainer(job("first"))
    trainer.model.save_pretrained(tmp_path / "start", tokenizer=ByT5Tokenizer())
    trainer.close()
    config.hf_transformers.model, config.hf_transformers.model_type = str(tmp_path / "start"), None
    config.hf_transformers.config_overrides = {}
    trainer = Trainer(config)
    batch = next(trainer.data)
    trainer.data.reset()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start").train()
    decayed = [p for p in plain.parameters() if p.ndim >= 2]
    others = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95), eps=1e-8)
    loss = plain(**batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    result = trainer.train_step()
    trainer.close()
    assert result.lr == 5e-3
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=0)
    for name, value in trainer.model.full_state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_accumulation_is_one_bigger_batch(job):
    big = job("big", training__local_batch_size=4)
    small = job("small", training__local_batch_size=1, training__global_batch_size=4)
    trainers = [_run(config) for config in (big, small)]
    assert [trainer.accumulation_steps for trainer in trainers] == [1, 4]
    assert trainers[0].tokens_per_step == trainers[1].tokens_per_step == 4 * SEQUENCE
    for one, other in zip(_curve(big), _curve(small), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_validation_is_plain_transformers_mean_loss(job, tmp_path: Path):
    config = job(
        training__steps=4, validation__enable=True, validation__dataset_path=str(tmp_path / "held_out.txt"),
        validation__freq=2, validation__seq_len=SEQUENCE, validation__local_batch_size=2, checkpoint__enable=True,
        checkpoint__last_save_in_hf=True,
    )  # fmt: skip
    _run(config)
    lines = _lines(config, "validation.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    text = (tmp_path / "held_out.txt").read_text()
    tokens = [*ByT5Tokenizer()(text, add_special_tokens=False).input_ids, 1]
    model = AutoModelForCausalLM.from_pretrained(Path(config.job.dump_folder) / "checkpoint" / "step-4-hf").eval()
    loss, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens), SEQUENCE):
            block = torch.tensor([tokens[start : start + SEQUENCE]])
            if block.shape[1] > 1:
                loss += model(input_ids=block, labels=block).loss.item() * (block.shape[1] - 1)
                count += block.shape[1] - 1
    assert lines[-1]["tokens"] == count
    assert lines[-1]["validation_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert lines[0]["validation_loss"] > lines[1]["validation_loss"]


def test_validation_steps_and_a_curve_that_it_does_not_touch(job, tmp_path: Path):
    without, config = job("without"), job(
        "with", validation__enable=True, validation__dataset_path=str(tmp_path / "held_out.txt"), validation__freq=1,
        validation__steps=1, validation__seq_len=SEQUENCE, validation__local_batch_size=1,
    )  # fmt: skip
    _run(without)
    _run(config)
    assert {line["tokens"] for line in _lines(config, "validation.jsonl")} == {SEQUENCE - 1}
    assert _curve(config) == _curve(without)


def test_the_export_loads_with_the_same_loss_and_its_tokenizer(job):
    config = job(checkpoint__enable=True, checkpoint__last_save_in_hf=True, job__sample_prompt="1: line",
                 job__sample_tokens=5)  # fmt: skip
    trainer = Trainer(config)
    trainer.train()
    folder = Path(config.job.dump_folder) / "checkpoint" / "step-6-hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = trainer.model.full_state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == ByT5Tokenizer()("abc").input_ids
    batch = next(trainer.data)
    loss, targets = trainer.model.evaluate(batch["input_ids"], batch["labels"])
    trainer.close()
    assert model(**batch).loss.item() == pytest.approx((loss / targets).item(), rel=1e-6)


def test_a_sample_ends_the_run(job, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        _run(job(job__sample_prompt="1: line", job__sample_tokens=5))
    assert "sample of the trained model:\n1: line" in caplog.text


# -- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_is_the_same_bit_by_bit(job, optimizer: str, dropout: float):
    def make(folder: str, steps: int) -> JobConfig:
        config = job(folder, optimizer__name=optimizer, training__steps=steps, lr_scheduler__total_steps=6,
                     checkpoint__enable=True, checkpoint__interval=3, checkpoint__last_save_model_only=False,
                     training__local_batch_size=1, training__global_batch_size=2)  # fmt: skip
        config.hf_transformers.config_overrides["attention_dropout"] = dropout
        return config

    whole, first, second = make("whole", 6), make("parts", 3), make("parts", 6)
    expected = _run(whole).model.full_state_dict()
    _run(first)
    resumed = Trainer(second)
    torch.manual_seed(123)  # whatever happened to the random numbers in between
    resumed.checkpointer.load(-1)
    resumed.train()
    resumed.close()
    assert _curve(second) == _curve(whole), "the file goes on where it ended"
    state = resumed.model.full_state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_finished_run_does_nothing_more_and_says_so(job, caplog: pytest.LogCaptureFixture):
    config = job(training__steps=2, checkpoint__enable=True, checkpoint__interval=1, metrics__log_freq=1)
    _run(config)
    before = _curve(config)
    assert "nothing to do" not in caplog.text
    with caplog.at_level(logging.INFO, logger="transformers_backend"):
        trainer = _run(config)
    assert trainer.step == 2
    assert _curve(config) == before
    assert "nothing to do: step 2 of 2 is reached. Raise training.steps to go on, or name ano" in caplog.text


def test_load_step_takes_an_earlier_one_and_names_what_there_is(job):
    config = job(training__steps=3, checkpoint__enable=True, checkpoint__interval=1)
    _run(config)
    before = _curve(config)
    config.checkpoint.load_step = 1
    _run(config)
    assert _curve(config) == before, "steps after the checkpoint are written anew, each once"
    config.checkpoint.load_step = 7
    with pytest.raises(ValueError, match=r"checkpoint\.load_step = 7: .* holds no such step; there are 1, 2, 3\."):
        _run(config)


def test_a_look_at_a_checkpoint_leaves_the_figures_of_its_run(job):
    config = job(training__steps=3, checkpoint__enable=True, checkpoint__interval=1)
    _run(config)
    before, resolved = _lines(config), Path(config.job.dump_folder, "config.toml").read_text()
    config.checkpoint.load_step, config.checkpoint.load_only, config.optimizer.lr = 1, True, 3e-3
    _run(config)
    assert _lines(config, "metrics.jsonl.1") == before
    assert [line["step"] for line in _lines(config)] == [2, 3]
    assert Path(config.job.dump_folder, "config.toml").read_text() == resolved


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_the_first_rank_says_what_a_config_ignores(rank: str, times: int, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "job.toml").write_text("[training]\ngc_debug = true\nsteps = 0\n")
    with restored_process():
        assert main([str(tmp_path / "job.toml")]) == 2
    said = capsys.readouterr().err
    assert said.count("training.gc_debug is a torchtitan key without meaning here; ignored.") == times


def test_the_command_says_a_wrong_load_step_in_one_message(job, capsys: pytest.CaptureFixture):
    config = job(checkpoint__enable=True, checkpoint__load_step=7)
    path = Path(config.job.dump_folder) / "job.toml"
    config.save(path)
    assert main([str(path)]) == 2
    assert "error: checkpoint.load_step = 7: " in capsys.readouterr().err
    assert not dist.is_initialized(), "a refused job leaves no process group"


def test_the_latest_k_are_kept_and_a_leftover_is_ignored_and_removed(job):
    config = job(training__steps=5, checkpoint__enable=True, checkpoint__interval=1, checkpoint__keep_latest_k=2)
    leftover = Path(config.job.dump_folder) / "checkpoint" / "step-9.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.distcp").write_text("half")
    trainer = _run(config)
    assert trainer.step == 5
    assert {"step-4", "step-5"} <= _folders(config)
    assert not {"step-1", "step-2", "step-3", "step-9.tmp"} & _folders(config)
    assert trainer.checkpointer.steps() == [4, 5]


def test_a_resume_follows_the_jobs_own_settings(job):
    """A longer run, with another learning rate: the first resumed step is already on the new schedule."""
    _run(job(training__steps=2, checkpoint__enable=True, checkpoint__interval=1, optimizer__lr=1e-3))
    config = job(training__steps=4, checkpoint__enable=True, optimizer__lr=1e-5, optimizer__weight_decay=0.5)
    trainer = Trainer(config)
    try:
        fresh = [group["weight_decay"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        assert 0.5 in fresh
        assert 0 < trainer.train_step().lr <= 1e-5
    finally:
        trainer.close()


def test_what_a_checkpoint_cannot_give_is_told(job):
    _run(job(training__steps=1, checkpoint__enable=True))
    with pytest.raises(ValueError, match=r"step-1 cannot be resumed from \(.*another\s+model or optimizer"):
        Trainer(job(training__steps=2, checkpoint__enable=True, optimizer__name="Muon"))


def test_sequences_beyond_learned_positions_are_refused(job):
    config = job(hf_transformers__model_type="gpt2", training__seq_len=65)
    config.hf_transformers.config_overrides = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64,
                                               "vocab_size": 384}  # fmt: skip
    with pytest.raises(ValueError, match=r"training\.seq_len = 65: GPT2LMHeadModel learns a table of 64 positions"):
        Trainer(config)


def test_sequences_beyond_what_a_rotary_model_is_made_for_are_told(job, caplog: pytest.LogCaptureFixture):
    for length, warns in ((SEQUENCE, False), (SEQUENCE + 1, True)):
        config = job(f"run-{length}", training__seq_len=length)
        config.hf_transformers.config_overrides["max_position_embeddings"] = SEQUENCE
        Trainer(config).close()
        assert ("training.seq_len = 33: the model is made for max_position_embeddings = 32." in caplog.text) is warns


def test_waiting_for_data_is_reported(job, monkeypatch: pytest.MonkeyPatch):
    """Half a second of waiting in the second step shows in its share, and not in the others'.

    By a clock on which whatever else lies between two looks at it takes a millisecond.
    """
    seconds = [0.0]

    def perf_counter() -> float:
        seconds[0] += 0.001
        return seconds[0]

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    config = job(training__steps=3)
    trainer = Trainer(config)
    batches = trainer.data

    class Slow:
        def __next__(self):
            if trainer.step == 1:
                seconds[0] += 0.5
            return next(batches)

    trainer.data = Slow()
    trainer.train()
    trainer.close()
    shares = [line["data_wait_share"] for line in _lines(config)]
    assert shares[1] > 0.5 > max(shares[0], shares[2])
    assert trainer.data_wait_seconds > 0.5


def test_the_start_says_what_the_run_is(job, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        Trainer(job(job__description="what this run is for")).close()
    (table,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("the run:\n")]
    assert "run         what this run is for\n" in table
    assert "model       LlamaForCausalLM: 40,096 parameters, all trained; weights: new, random\n" in table


def test_a_dump_folder_that_cannot_be_made_is_told(job, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"job\.dump_folder = .*file/run.*: cannot be made"):
        Trainer(job(job__dump_folder=str(tmp_path / "file" / "run")))


def test_going_back_sets_the_later_checkpoints_aside(job):
    """Else the next resume would take the newest of the branch that was left."""
    _run(job(training__steps=3, checkpoint__enable=True, checkpoint__interval=1))
    config = job(training__steps=2, checkpoint__enable=True, checkpoint__interval=1, checkpoint__load_step=1)
    trainer = _run(config)
    assert {"step-1", "step-2", "step-2.abandoned", "step-3.abandoned"} <= _folders(config)
    assert trainer.checkpointer.steps() == [1, 2]


def test_a_leftover_of_the_same_step_is_overwritten(job):
    config = job(training__steps=2, checkpoint__enable=True, checkpoint__interval=2)
    leftover = Path(config.job.dump_folder) / "checkpoint" / "step-2.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("half")
    _run(config)
    final = Path(config.job.dump_folder) / "checkpoint" / "step-2"
    assert final.exists()
    assert not (final / "half").exists()
    assert not leftover.exists()


def test_the_last_steps_are_never_lost(job):
    """A run whose length is no multiple of the interval saves its end too, in one form or the other."""
    for model_only, expected in ((True, "step-5-model"), (False, "step-5")):
        config = job(f"run-{model_only}", training__steps=5, checkpoint__enable=True, checkpoint__interval=2,
                     checkpoint__last_save_model_only=model_only)  # fmt: skip
        trainer = _run(config)
        assert {"step-2", "step-4", expected} <= _folders(config)
        assert trainer.checkpointer.steps() == ([2, 4] if model_only else [2, 4, 5])


def test_a_checkpoint_right_after_a_validation(job, tmp_path: Path):
    """An evaluation has no backward, after which FSDP2 would free the gathered parameters of the root unit."""
    config = job(
        training__steps=4, checkpoint__enable=True, checkpoint__interval=2, validation__enable=True,
        validation__dataset_path=str(tmp_path / "held_out.txt"), validation__freq=2, validation__seq_len=SEQUENCE,
    )  # fmt: skip
    trainer = _run(config)
    assert trainer.checkpointer.steps() == [2, 4]
    before = _curve(config)
    config.checkpoint.load_step = 2
    _run(config)
    assert _curve(config) == before, "what was saved is what training went on with"
    assert [line["step"] for line in _lines(config, "validation.jsonl")] == [2, 4]


def test_nothing_is_saved_without_being_asked(job):
    config = job(training__steps=2)
    _run(config)
    assert not (Path(config.job.dump_folder) / "checkpoint").exists()


def test_other_data_is_refused_on_resume(job, tmp_path: Path):
    config = job(training__steps=2, checkpoint__enable=True, checkpoint__interval=2)
    _run(config)
    (tmp_path / "text" / "7.txt").write_text("one more document")
    config.training.steps = 4
    with pytest.raises(ValueError, match="data state is of other data"):
        _run(config)


# -- what stops a run -----------------------------------------------------------------------------------------------


def _poison(trainer: Trainer) -> None:
    with torch.no_grad():
        parameter = trainer.model.hf_model.model.norm.weight
        (parameter.to_local() if hasattr(parameter, "to_local") else parameter).fill_(float("nan"))


def test_a_nonfinite_loss_stops_and_names_step_and_rank(job):
    trainer = Trainer(job())
    trainer.train_step()
    _poison(trainer)
    with pytest.raises(FloatingPointError, match="step 2: loss nan, gradient norm nan") as caught:
        trainer.train_step()
    trainer.close()
    message = str(caught.value)
    assert "Non-finite loss on rank 0" in message
    assert "The weights are those of step 1" in message
    assert "debug.skip_nonfinite_steps" in message


def test_a_nonfinite_step_can_be_skipped(job, caplog: pytest.LogCaptureFixture):
    trainer = Trainer(job(debug__skip_nonfinite_steps=True))
    trainer.train_step()
    before = trainer.model.full_state_dict()
    forward_backward = trainer.model.forward_backward
    trainer.model.forward_backward = lambda *a, **k: forward_backward(*a, **k) * float("inf")
    with caplog.at_level(logging.WARNING):
        result = trainer.train_step()
    assert result.loss.isinf()
    assert trainer.step == 2
    assert "step 2: loss inf" in caplog.text
    assert "The step is skipped" in caplog.text
    after = trainer.model.full_state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer.model.forward_backward = forward_backward
    assert trainer.train_step().loss.isfinite()
    assert any(not torch.equal(trainer.model.full_state_dict()[name], value) for name, value in before.items())
    trainer.close()


def test_a_bad_config_starts_nothing(job):
    config = job(training__seq_len=0, optimizer__lr=-1.0)
    with pytest.raises(ValueError, match="Invalid configuration") as caught:
        Trainer(config)
    assert "training.seq_len = 0" in str(caught.value)
    assert "optimizer.lr = -1.0" in str(caught.value)
    assert not dist.is_initialized()
    assert not Path(config.job.dump_folder).exists()


def test_what_fails_during_set_up_ends_the_process_group(job):
    """Another trainer in the same process must not find the first one's group."""
    config = job()
    config.hf_transformers.config_overrides["vocab_size"] = 100  # fewer than the tokenizer's 384
    with pytest.raises(ValueError, match="the tokenizer has 384 tokens"):
        Trainer(config)
    assert not dist.is_initialized()


def test_garbage_collection_is_on_again_also_after_an_error(job):
    import gc

    trainer = Trainer(job())
    _poison(trainer)
    with pytest.raises(FloatingPointError):
        trainer.train()
    trainer.close()
    assert gc.isenabled()


# -- set-up ---------------------------------------------------------------------------------------------------------


def test_the_seed_decides(job):
    curves = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = job(folder, debug__seed=seed, training__steps=2)
        _run(config)
        curves.append(_curve(config))
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_mixed_precision_and_master_weights(job):
    trainer = Trainer(job(training__mixed_precision_param="bfloat16"))
    result = trainer.train_step()
    assert {p.dtype for p in trainer.model.hf_model.parameters()} == {torch.float32}
    state = trainer.optimizers[0].state
    assert {v["exp_avg"].dtype for v in state.values()} == {torch.float32}
    trainer.close()
    exact = Trainer(job("exact"))
    expected = exact.train_step()
    exact.close()
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=5e-3)
    assert result.loss.item() != expected.loss.item(), "computed in bf16"


def test_bfloat16_parameters(job):
    trainer = Trainer(job(training__dtype="bfloat16", training__mixed_precision_param="bfloat16"))
    assert trainer.train_step().loss.isfinite()
    assert {p.dtype for p in trainer.model.hf_model.parameters()} == {torch.bfloat16}
    trainer.close()


def test_offload_and_activation_checkpointing_change_no_number(job):
    plain = job("plain", training__steps=3)
    other = job("other", training__steps=3, training__enable_cpu_offload=True, activation_checkpoint__mode="full")
    _run(plain)
    _run(other)
    assert _curve(plain) == _curve(other)
