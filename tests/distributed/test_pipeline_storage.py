"""What goes in and out of models that are cut into pipeline stages: weights, exports and checkpoints, 4 processes.

A rank has some of the parameters only, and the embedding of a tied model is on two. The reference is a model on one
device that was never cut.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from parallelize.config import ParallelismConfig
from tests.distributed.stored_run import StoredRun
from tests.distributed.workers import Messages, WorkerPool
from tests.jobs import tiny_job
from transformers_backend import JobConfig, Trainer
from transformers_backend.export import main as export
from transformers_backend.generate import load_generator
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import HFTransformerModelArgs

_USUAL = {"vocab_size": 27, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
          "num_attention_heads": 4, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
_GEMMA3N = {
    **_USUAL, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 5, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", *["full_attention", "sliding_attention"] * 2], "laurel_rank": 4,
    "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 27, "activation_sparsity_pattern": [0.0] * 5,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "llama": {**_USUAL, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {**_USUAL, "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": True},
    "gpt2": {"vocab_size": 27, "n_embd": 16, "n_head": 4, "n_layer": 4, "n_positions": 32, "bos_token_id": 0,
             "eos_token_id": 1, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "phi3": {**_USUAL, "num_key_value_heads": 2, "pad_token_id": None},
    "apertus": {**_USUAL, "num_key_value_heads": 2, "pad_token_id": None},
    "gemma3n_text": _GEMMA3N,
}  # fmt: skip
MESHES: dict[str, dict[str, Any]] = {
    "pp 4": {"pipeline_parallel_degree": 4},
    "pp 2 x tp 2": {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2},
    "pp 2 x fsdp 2": {"pipeline_parallel_degree": 2},
    "pp 2 x replicas 2": {"pipeline_parallel_degree": 2, "data_parallel_replicate_degree": 2},
    "v x fsdp 2": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
    "tp 2 x fsdp 2": {"tensor_parallel_degree": 2},
}


@pytest.fixture(scope="module")
def one() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


def _arguments(model_type: str) -> HFTransformerModelArgs:
    return HFTransformerModelArgs(model_type=model_type, config_overrides=SIZES[model_type])


def _split(model: HFTransformerModel, mesh_name: str, seed: int = 0) -> HFTransformerModel:
    return model.parallelize(ParallelismConfig(**MESHES[mesh_name]), seed=seed)


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in folder.iterdir()}


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert different == []


# -- weights and exports --------------------------------------------------------------------------------------------


def _export_drawn_and_loaded(model_type: str, mesh_name: str, folder: str) -> dict[str, torch.Tensor]:
    """What `parallelize` drew, and what it loaded from the folder "alone", each exported."""
    drawn = _split(HFTransformerModel(_arguments(model_type)), mesh_name)
    drawn.save_pretrained(f"{folder}/drawn")
    loaded = _split(HFTransformerModel.from_pretrained(f"{folder}/alone"), mesh_name, seed=1)
    loaded.save_pretrained(f"{folder}/loaded, in parts", max_file_size=5000, dtype=torch.bfloat16)
    return drawn.full_state_dict()


@pytest.mark.parametrize(
    ("model_type", "mesh_name"),
    [
        ("llama", "pp 4"),
        ("qwen3", "pp 4"),
        ("gpt2", "pp 2 x fsdp 2"),
        ("phi3", "pp 2 x tp 2"),
        ("apertus", "pp 4"),
        ("gemma3n_text", "pp 2 x fsdp 2"),
    ],
)
def test_an_export_is_that_of_one_device(four: WorkerPool, tmp_path: Path, model_type: str, mesh_name: str):
    """Byte by byte: weights do not depend on the degree, and neither do files or configs."""
    alone = HFTransformerModel(_arguments(model_type))
    alone.save_pretrained(tmp_path / "alone")
    alone.save_pretrained(tmp_path / "alone, in parts", max_file_size=5000, dtype=torch.bfloat16)
    for state in four.run(_export_drawn_and_loaded, model_type, mesh_name, str(tmp_path)):
        _assert_equal(state, alone.full_state_dict())
    assert _contents(tmp_path / "drawn") == _contents(tmp_path / "alone")
    assert _contents(tmp_path / "loaded, in parts") == _contents(tmp_path / "alone, in parts")


# -- memory ---------------------------------------------------------------------------------------------------------

# 176 MB in fp32: four layers of 38 MB, and an embedding of 25 MB that is the head, too.
_LARGE = {**SIZES["qwen3"], "hidden_size": 768, "intermediate_size": 3072, "head_dim": 192, "num_key_value_heads": 4,
          "vocab_size": 8192}  # fmt: skip


def _memory(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS (resident now) or VmHWM (its peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def _peaks(small: str, large: str) -> list[tuple[int, int]]:
    """Bytes held after, and more at the peak of: a load, drawing weights, an export. First all at a small size, so that
    what is imported on first use is no part."""

    def act(source: str) -> Iterator[HFTransformerModel]:
        yield _split(HFTransformerModel(HFTransformerModelArgs(model=source, init="scratch")), "pp 4")
        model = _split(HFTransformerModel.from_pretrained(source), "pp 4")
        yield model
        model.save_pretrained(f"{source} again", max_file_size=40_000_000)
        yield model

    for _ in act(small):
        pass
    gc.collect()
    peaks, actions = [], act(large)
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
        baseline = _memory("VmRSS")
        model = next(actions)
        held = sum(parameter.nbytes for parameter in model.hf_model.parameters())
        peaks.append((held, _memory("VmHWM") - baseline))
        del model
        gc.collect()
    return peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory with Linux's /proc")
def test_no_rank_holds_what_other_stages_do(four: WorkerPool, tmp_path: Path):
    HFTransformerModel(_arguments("qwen3")).save_pretrained(tmp_path / "small")
    large = HFTransformerModel(HFTransformerModelArgs(model_type="qwen3", config_overrides=_LARGE))
    large.save_pretrained(tmp_path / "large", max_file_size=40_000_000)
    parameters = {name: parameter.nbytes for name, parameter in large.hf_model.named_parameters()}
    file, slack = 40e6, 30e6  # the Python objects of a model on meta, and what the allocator keeps of them
    layer = sum(size for name, size in parameters.items() if ".layers.0." in name)
    tensor = max(parameters.values())
    del large
    outcomes = four.run(_peaks, str(tmp_path / "small"), str(tmp_path / "large"))
    assert sum(held for (held, _), *_ in outcomes) == sum(parameters.values()) + parameters["model.embed_tokens.weight"]
    for (held, of_drawing), (_, of_load), (_, of_export) in outcomes:
        assert held < layer + tensor + 1e6
        assert 0.9 * held < of_drawing < held + 2 * layer + slack, "its stage, and a layer as it is drawn"
        assert 0.9 * held < of_load < held + file + slack, "its stage, and one file"
        assert of_export < file + tensor + slack, "one file, and a tensor that goes to another rank"
    assert _contents(tmp_path / "large again") == _contents(tmp_path / "large")


# -- checkpoints ----------------------------------------------------------------------------------------------------

_Tensors = dict[str, torch.Tensor]


def _train(
    model_type: str, mesh_name: str | None, optimizer: str, folder: str, mode: str, first: int, last: int
) -> tuple[list[float], _Tensors, _Tensors]:
    """Losses of the steps first < step <= last, after the newest checkpoint, and the state before and after them.

    mesh_name: None trains on one device.
    """
    model = HFTransformerModel(_arguments(model_type))
    run = StoredRun(model if mesh_name is None else _split(model, mesh_name), folder, mode=mode, optimizer=optimizer)
    assert (run.checkpointer.load(-1) or 0) == first
    before = _state(run) if first > 0 else {}
    losses = run.go_on(first, last)
    return losses, before, _state(run)


def _state(run: StoredRun) -> _Tensors:
    return run.model.full_state_dict() | run.averages()


@pytest.mark.parametrize(
    ("model_type", "optimizer", "meshes", "mode"),
    [
        ("phi3", "AdamW", [None, "pp 2 x tp 2", "pp 4", None], "async"),
        ("gpt2", "Muon", ["pp 2 x fsdp 2", "v x fsdp 2", "tp 2 x fsdp 2"], "async_with_pinned_mem"),
    ],
)
def test_a_run_goes_on_on_another_mesh(
    four: WorkerPool, one: WorkerPool, tmp_path: Path, model_type: str, optimizer: str, meshes: list, mode: str
):
    """Each mesh begins with the very weights and averages that the last one ended with; losses are one device's."""
    arguments = (model_type, None, optimizer, str(tmp_path / "alone"), "disabled", 0, 2 * len(meshes))
    ((expected, *_),) = one.run(_train, *arguments)
    losses, after = [], {}
    for number, mesh_name in enumerate(meshes):
        steps = (2 * number, 2 * number + 2)
        pool = one if mesh_name is None else four
        outcomes = pool.run(_train, model_type, mesh_name, optimizer, str(tmp_path / "parts"), mode, *steps)
        for of_rank, before, state in outcomes:
            assert of_rank == outcomes[0][0], "every rank has the same losses"
            _assert_equal(before, after)
            _assert_equal(state, outcomes[0][2])
        losses, after = losses + of_rank, state
    # Muon computes its updates in bfloat16.
    assert losses == pytest.approx(expected, rel=1e-5 if optimizer == "AdamW" else 1e-3)


def _stop_and_go_on(folder: str) -> None:
    """Steps 3 and 4 after a resume, and without one; and then what another split makes of the checkpoint."""
    mesh_name = "pp 2 x fsdp 2"
    straight = StoredRun(_split(HFTransformerModel(_arguments("qwen3")), mesh_name), f"{folder}/straight")
    expected = [straight.train(step) for step in (1, 2, 3, 4)]
    first = StoredRun(_split(HFTransformerModel(_arguments("qwen3")), mesh_name), folder)
    found = [first.train(step) for step in (1, 2)]
    torch.manual_seed(100 + dist.get_rank())
    first.checkpointer.save_last(2)
    drawn = torch.rand(3)
    resumed = StoredRun(_split(HFTransformerModel(_arguments("qwen3")), mesh_name), folder)
    assert _messages_of(lambda: resumed.checkpointer.load(-1)) == [f"resumed from {folder}/step-2"]
    assert torch.equal(torch.rand(3), drawn), "each stage has the random numbers of its own"
    assert [scheduler.last_epoch for scheduler in resumed.schedulers] == [2]
    assert found + [resumed.train(step) for step in (3, 4)] == expected
    _assert_equal(_state(resumed), _state(straight))

    other = StoredRun(_split(HFTransformerModel(_arguments("qwen3")), "pp 4"), folder)
    message, _ = _messages_of(lambda: other.checkpointer.load(-1))
    assert "holds the random states of 4 ranks, and this run has 4 others: those without one" in message


def _messages_of(action: Callable[[], object]) -> list[str]:
    logger = logging.getLogger("transformers_backend")
    logger.setLevel(logging.INFO)
    with Messages(logger.name) as messages:
        action()
    logger.setLevel(logging.NOTSET)
    return messages.texts


def test_a_resume_is_bit_equal(four: WorkerPool, tmp_path: Path):
    four.run(_stop_and_go_on, str(tmp_path))
    keys = {key.split(".")[0] for key in FileSystemReader(tmp_path / "step-2").read_metadata().state_dict_metadata}
    assert {key for key in keys if "rank" in key} == {
        "data_rank_0", "data_rank_1", *(f"random_rank_{data}_pipeline_{stage}" for data in (0, 1) for stage in (0, 1))
    }  # fmt: skip


def _unlike_ranks(folder: str) -> list[str]:
    """Ranks with no and with other numbers of optimizers, and models of another size; messages of refused resumes."""

    def build(layers: int, optimizer: str) -> StoredRun:
        arguments = _arguments("llama")
        arguments.config_overrides = {**arguments.config_overrides, "num_hidden_layers": layers}
        model = _split(HFTransformerModel(arguments), "pp 4")
        if dist.get_rank() == 0:
            model.hf_model.requires_grad_(False)
        return StoredRun(model, folder, optimizer=optimizer)

    run = build(6, "Muon")
    assert len(run.optimizers) == (2 if dist.get_rank() > 0 else 0)
    for scheduler in run.schedulers:
        scheduler.last_epoch = 7
    run.checkpointer.save_last(7)
    resumed = build(6, "Muon")
    assert resumed.checkpointer.load(-1) == 7
    assert [scheduler.last_epoch for scheduler in resumed.schedulers] == [7] * len(resumed.optimizers)
    _assert_equal(_state(resumed), _state(run))
    messages = []
    for layers, optimizer in ((7, "Muon"), (5, "Muon"), (6, "AdamW")):
        with pytest.raises(ValueError, match="cannot be resumed from") as caught:
            build(layers, optimizer).checkpointer.load(-1)
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_one_stage_is_refused_on_all(four: WorkerPool, tmp_path: Path):
    messages, *others = four.run(_unlike_ranks, str(tmp_path))
    assert all(other == messages for other in others)
    larger, smaller, optimizer = messages
    assert "values that it does not have: model.model.layers.6.input_layernorm.weight" in larger
    assert "9 weights that the model does not have: model.model.layers.5.input_layernorm.weight" in smaller
    assert "values that it does not have: optimizer." in optimizer


def _wrap(folder: str) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: weakref.ref(parameter) for name, parameter in hf_model.named_parameters()}
    model = _split(HFTransformerModel.wrap(hf_model), "pp 4")
    here = {name for name, _ in hf_model.named_parameters()}
    gc.collect()
    assert {name for name, parameter in before.items() if parameter() is not None} == here
    assert 0 < len(here) < len(before)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    _assert_equal(model.full_state_dict(), dict(expected))


def test_a_wrapped_model_lets_the_weights_of_other_stages_go(four: WorkerPool, tmp_path: Path):
    HFTransformerModel(_arguments("qwen3")).save_pretrained(tmp_path)
    four.run(_wrap, str(tmp_path))


# -- whole jobs -----------------------------------------------------------------------------------------------------


def _job(folder: str, name: str, *, steps: int, degree: int = 1, **changes: Any) -> JobConfig:
    """Its model is tied, and has to go on to six steps of four sequences."""
    config = tiny_job(
        folder, name, training__steps=steps, training__local_batch_size=4, lr_scheduler__total_steps=6,
        checkpoint__enable=True, checkpoint__interval=2, checkpoint__async_mode="async", **changes,
    )  # fmt: skip
    config.hf_transformers.config_overrides |= {"num_hidden_layers": 4, "tie_word_embeddings": True}
    config.parallelism.pipeline_parallel_degree = degree
    config.parallelism.tensor_parallel_degree = 2 if degree == 2 else 1  # one data rank, with the same batches
    return config


def _run(config: JobConfig, live: str | None = None) -> None:
    with contextlib.closing(Trainer(config)) as trainer:
        trainer.train()
        if live is not None:
            trainer.model.save_pretrained(live, tokenizer=trainer.tokenizer)


def _losses(config: JobConfig) -> list[float]:
    lines = (Path(config.job.dump_folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_jobs_begin_and_end_in_every_way(four: WorkerPool, one: WorkerPool, folder: str):
    """A seed, a run of a pipeline, its end on one rank; another run from its middle; one from its export."""
    whole, last_only = {"checkpoint__last_save_model_only": False}, {"checkpoint__last_save_model_only": True}
    one.run(_run, _job(folder, "parts", steps=6, checkpoint__create_seed_checkpoint=True))
    four.run(_run, _job(folder, "parts", steps=3, degree=4, **whole), f"{folder}/live")
    middle = f"{folder}/parts/checkpoint/step-3"
    from_middle = _job(
        folder, "from middle", steps=4, degree=2, checkpoint__initial_load_path=middle,
        checkpoint__initial_load_model_only=False, **last_only,
    )  # fmt: skip
    four.run(_run, from_middle)
    from_export = _job(
        folder, "from export", steps=1, degree=4, checkpoint__initial_load_path=f"{folder}/live",
        checkpoint__initial_load_in_hf=True, **whole,
    )  # fmt: skip
    four.run(_run, from_export)
    one.run(_run, _job(folder, "parts", steps=6))
    one.run(_run, alone := _job(folder, "alone", steps=6))

    expected = _losses(alone)
    assert _losses(_job(folder, "parts", steps=6)) == pytest.approx(expected, rel=1e-5)
    assert _losses(from_middle) == pytest.approx(expected[3:4], rel=1e-5)
    assert export([middle, f"{folder}/exported"]) == 0
    assert _contents(Path(folder, "exported")) == _contents(Path(folder, "live"))
    model, _ = load_generator(f"{folder}/from middle/checkpoint/step-4-model")
    whole_model, _ = load_generator(f"{folder}/parts/checkpoint/step-4")
    torch.testing.assert_close(model.state_dict(), whole_model.state_dict(), rtol=1e-3, atol=1e-5)
