"""What goes in and out of tensor-parallel models as users make them: weights, exports and checkpoints, 4 processes.

`test_packed_parameters.py` does the same with parameters that are split by hand. Here `parallelize` derives how, real
forwards and optimizer steps run in between, and the reference is a model on one device that was never parallelised.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from parallelize.config import ParallelismConfig
from tests.distributed.stored_run import StoredRun
from tests.distributed.workers import WorkerPool
from tests.jobs import restored_process, tiny_job
from transformers_backend import JobConfig, Trainer
from transformers_backend.export import main as export
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import HFTransformerModelArgs

# Four ranks share the two key and value heads; 27 tokens are 14 + 13 rows on two ranks and 7 + 7 + 7 + 6 on four.
_USUAL = {"vocab_size": 27, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 4, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "llama": {**_USUAL, "num_key_value_heads": 2},
    "phi3": {**_USUAL, "num_key_value_heads": 2, "pad_token_id": None},
    "gpt_neox": _USUAL,
    "gpt2": {"vocab_size": 27, "n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32, "bos_token_id": 0,
             "eos_token_id": 1, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}  # fmt: skip
MESHES = {"fsdp 2 x tp 2": (1, 2, 2), "replicas 2 x tp 2": (2, 1, 2), "tp 4": (1, 1, 4)}  # dp_replicate, dp_shard, tp


@pytest.fixture(scope="module")
def one() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


def _arguments(model_type: str, tied: bool) -> HFTransformerModelArgs:
    overrides = {**SIZES[model_type], "tie_word_embeddings": tied}
    return HFTransformerModelArgs(model_type=model_type, config_overrides=overrides)


def _split(model: HFTransformerModel, mesh_name: str, seed: int = 0) -> HFTransformerModel:
    replicate, shard, degree = MESHES[mesh_name]
    config = ParallelismConfig(
        data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard, tensor_parallel_degree=degree
    )
    model.parallelize(config, seed=seed)
    assert any(p.to_local().numel() < p.numel() for p in model.hf_model.parameters()), "something is split"
    return model


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in folder.iterdir()}


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert different == []


# -- weights and exports --------------------------------------------------------------------------------------------


def _export_drawn_and_loaded(model_type: str, tied: bool, folder: str) -> None:
    """What `parallelize` drew, and what it loaded from the folder "alone", each exported."""
    drawn = _split(HFTransformerModel(_arguments(model_type, tied)), "fsdp 2 x tp 2")
    drawn.save_pretrained(f"{folder}/drawn")
    loaded = _split(HFTransformerModel.from_pretrained(f"{folder}/alone"), "tp 4", seed=1)
    assert loaded.hf_model.config.tie_word_embeddings == tied
    loaded.save_pretrained(f"{folder}/loaded, in parts", max_file_size=5000)
    loaded.save_pretrained(f"{folder}/loaded, in bf16", dtype=torch.bfloat16)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", SIZES)
def test_an_export_is_that_of_one_device(four: WorkerPool, tmp_path: Path, model_type: str, tied: bool):
    """Byte by byte: weights do not depend on the degree, and neither do files or configs."""
    alone = HFTransformerModel(_arguments(model_type, tied))
    alone.save_pretrained(tmp_path / "alone")
    alone.save_pretrained(tmp_path / "alone, in parts", max_file_size=5000)
    alone.save_pretrained(tmp_path / "alone, in bf16", dtype=torch.bfloat16)
    four.run(_export_drawn_and_loaded, model_type, tied, str(tmp_path))
    assert _contents(tmp_path / "drawn") == _contents(tmp_path / "alone")
    assert _contents(tmp_path / "loaded, in parts") == _contents(tmp_path / "alone, in parts")
    assert _contents(tmp_path / "loaded, in bf16") == _contents(tmp_path / "alone, in bf16")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "loaded, in parts")
    _assert_equal(exported.state_dict(), alone.hf_model.state_dict())


# -- memory ---------------------------------------------------------------------------------------------------------

# 270 MB in fp32, nearly all of it in four layers, three quarters of that in fused parameters.
_LARGE = {**SIZES["phi3"], "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}


def _memory(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS (resident now) or VmHWM (its peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def _peaks(small: str, large: str) -> list[int]:
    """Of a load, and of drawing weights, after the same at a small size: what is imported on first use is no part."""
    peaks = []
    for build in (
        HFTransformerModel.from_pretrained,
        lambda folder: HFTransformerModel(HFTransformerModelArgs(model=folder, init="scratch")),
    ):
        _split(build(small), "tp 4")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
        baseline = _memory("VmRSS")
        model = _split(build(large), "tp 4")
        peaks.append(_memory("VmHWM") - baseline)
        assert all(parameter.to_local().isfinite().all() for parameter in model.hf_model.parameters())
        del model
    return peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory with Linux's /proc")
def test_no_rank_holds_the_whole_model(four: WorkerPool, tmp_path: Path):
    HFTransformerModel(_arguments("phi3", tied=False)).save_pretrained(tmp_path / "small")
    large = HFTransformerModel(HFTransformerModelArgs(model_type="phi3", config_overrides=_LARGE))
    large.save_pretrained(tmp_path / "large", max_file_size=70_000_000)
    total = sum(4 * parameter.numel() for parameter in large.hf_model.parameters())
    layer = sum(4 * parameter.numel() for parameter in large.hf_model.model.layers[0].parameters())
    assert layer > total / 5
    del large
    slack = 30e6  # the Python objects of a model on meta and its blueprint, and what the allocator keeps of them
    for of_load, of_drawing in four.run(_peaks, str(tmp_path / "small"), str(tmp_path / "large")):
        assert 0.9 * total / 4 < of_load < total / 4 + 70e6 + slack, "its shards, and one file"
        assert 0.9 * total / 4 < of_drawing < total / 4 + 2 * layer + slack, "its shards, and a layer as it is drawn"


# -- checkpoints ----------------------------------------------------------------------------------------------------


_Outcome = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def _train(model_type: str, mesh_name: str | None, folder: str, mode: str, first: int, last: int) -> _Outcome:
    """Losses of the steps first < step <= last, after the newest checkpoint, and weights and averages at the end.

    mesh_name: None trains on one device.
    """
    model = HFTransformerModel(_arguments(model_type, tied=model_type in ("gpt2", "gpt_neox")))
    if mesh_name is not None:
        _split(model, mesh_name)
    run = StoredRun(model, folder, mode=mode, accumulation_steps=2)
    assert (run.checkpointer.load(-1) or 0) == first
    losses = run.go_on(first, last)
    return losses, run.model.full_state_dict(), run.averages()


@pytest.mark.parametrize(
    ("model_type", "meshes", "mode"),
    [
        ("llama", ["replicas 2 x tp 2", "tp 4", None], "async"),
        ("phi3", ["fsdp 2 x tp 2", "tp 4", None], "disabled"),
        ("gpt2", ["tp 4", "fsdp 2 x tp 2", None], "async"),
        ("gpt_neox", [None, "tp 4", "replicas 2 x tp 2"], "disabled"),
    ],
)
def test_a_run_goes_on_on_another_mesh(
    four: WorkerPool, one: WorkerPool, tmp_path: Path, model_type: str, meshes: list[str | None], mode: str
):
    """Two steps on each mesh are six steps on one device: losses, weights, AdamW's averages."""
    ((expected, weights, averages),) = one.run(_train, model_type, None, str(tmp_path / "alone"), "disabled", 0, 6)
    losses = []
    for number, mesh_name in enumerate(meshes):
        arguments = (model_type, mesh_name, str(tmp_path / "parts"), mode, 2 * number, 2 * number + 2)
        outcomes = (one if mesh_name is None else four).run(_train, *arguments)
        assert all(outcome[0] == outcomes[0][0] for outcome in outcomes), "every rank has the same losses"
        losses += outcomes[0][0]
    assert losses == pytest.approx(expected, rel=1e-5)
    for _, found_weights, found_averages in outcomes:
        torch.testing.assert_close(found_weights, weights, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found_averages, averages, rtol=1e-3, atol=1e-5)


# -- whole runs -----------------------------------------------------------------------------------------------------


def _job(folder: Path, name: str, *, steps: int, degree: int = 1) -> JobConfig:
    config = tiny_job(
        folder, name, training__steps=steps, training__local_batch_size=4, lr_scheduler__total_steps=6,
        hf_transformers__model_type="phi3", checkpoint__enable=True, checkpoint__interval=2,
        checkpoint__async_mode="async", checkpoint__last_save_model_only=False,
    )  # fmt: skip
    config.hf_transformers.config_overrides |= {"pad_token_id": None}
    config.parallelism.tensor_parallel_degree = degree
    return config


def _run_job(config: JobConfig, live: str) -> None:
    with contextlib.closing(Trainer(config)) as trainer:
        trainer.train()
        trainer.model.save_pretrained(live, tokenizer=trainer.tokenizer)


def _losses(config: JobConfig) -> list[float]:
    lines = (Path(config.job.dump_folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_job_on_four_ranks_is_exported_and_goes_on_on_one(four: WorkerPool, tmp_path: Path):
    """The export of its checkpoint is that of the live model; its loss curve goes on as that of one rank."""
    (tmp_path / "text").mkdir()
    for number in range(8):
        text = "".join(f"{number}: line {line} of some text\n" for line in range(12))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    four.run(_run_job, _job(tmp_path, "parts", steps=3, degree=4), str(tmp_path / "live"))
    with restored_process():
        assert export([str(tmp_path / "parts" / "checkpoint" / "step-3"), str(tmp_path / "exported")]) == 0
        assert _contents(tmp_path / "exported") == _contents(tmp_path / "live")
        for name in ("parts", "alone"):
            _run_job(_job(tmp_path, name, steps=6), str(tmp_path / f"{name}-hf"))
    losses = _losses(_job(tmp_path, "parts", steps=6))
    assert losses == pytest.approx(_losses(_job(tmp_path, "alone", steps=6)), rel=1e-5)
