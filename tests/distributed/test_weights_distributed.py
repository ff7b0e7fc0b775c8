"""Weights on several ranks: the same start whatever their number, loads and exports that no rank holds whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from parallelize.config import ParallelismConfig
from tests.distributed.workers import WorkerPool
from transformers_backend.model import HFTransformerModel, HFTransformerModelArgs
from transformers_backend.model_args import build_on_meta
from transformers_backend.twin import build_twin, twin_config

MODEL_TYPES = ["llama", "gpt2", "gemma4_text", "xlstm"]  # untied; tied; persistent buffers; structured initial values


@pytest.fixture(scope="module")
def three(two: WorkerPool) -> Iterator[WorkerPool]:
    two.stop()
    with WorkerPool(3) as pool:
        yield pool


def _fingerprints(state: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:12] for name, tensor in state.items()}


def _twin(model_type: str, seed: int = 0):
    config = CONFIG_MAPPING[model_type]()
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], seed=seed)


def _from_scratch(folders: list[str], seed: int, parallelism: dict) -> list[dict[str, str]]:
    found = []
    for folder in folders:
        model = HFTransformerModel(HFTransformerModelArgs(model=folder, init="scratch"))
        if dist.is_initialized():
            model.parallelize(ParallelismConfig(**parallelism), seed=seed)
            assert all(isinstance(parameter, DTensor) for parameter in model.hf_model.parameters())
        found.append(_fingerprints(model.full_state_dict()))
    return found


@pytest.fixture(scope="module")
def config_folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = []
    for model_type in MODEL_TYPES:
        folder = tmp_path_factory.mktemp(model_type)
        twin_config(CONFIG_MAPPING[model_type]()).save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def on_one_device(config_folders: list[str]) -> list[dict[str, str]]:
    return _from_scratch(config_folders, 0, {})


def test_two_ranks_start_from_the_weights_of_one(two: WorkerPool, config_folders, on_one_device):
    for parallelism in ({}, {"data_parallel_replicate_degree": 2}):
        for found in two.run(_from_scratch, config_folders, 0, parallelism):
            assert found == on_one_device
    other = two.run(_from_scratch, config_folders[:1], 1, {})
    assert other[0] == other[1]
    assert other[0][0]["lm_head.weight"] != on_one_device[0]["lm_head.weight"], "another seed"


def _pretrained(folder: str, export: str, **model_args) -> dict[str, str]:
    model = HFTransformerModel.from_pretrained(folder, **model_args).parallelize(ParallelismConfig())
    model.save_pretrained(export, max_file_size=100_000, tokenizer=ByT5Tokenizer())
    assert Path(export, "config.json").exists(), "on every rank the folder is whole when the call returns"
    return _fingerprints(model.full_state_dict())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "hrm_text"])
def test_two_ranks_load_and_export_bit_equal(two: WorkerPool, tmp_path: Path, model_type: str):
    twin = _twin(model_type, seed=3)
    twin.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    for found in two.run(_pretrained, str(tmp_path / "in"), str(tmp_path / "out")):
        assert found == _fingerprints(twin.state_dict())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert _fingerprints(exported.state_dict()) == _fingerprints(twin.state_dict())
    assert not list(tmp_path.glob("*.tmp"))


def test_bfloat16_files_into_sharded_fp32_parameters(two: WorkerPool, tmp_path: Path):
    twin = _twin("llama", seed=4).bfloat16()
    twin.save_pretrained(tmp_path / "in")
    for found in two.run(_pretrained, str(tmp_path / "in"), str(tmp_path / "out")):
        assert found == _fingerprints(twin.float().state_dict())


def _message(folder: str) -> str:
    model = HFTransformerModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="missing in the files") as caught:
        model.parallelize(ParallelismConfig())
    dist.barrier()  # no rank is left behind in a collective
    return str(caught.value)


def test_every_rank_gets_the_same_error(two: WorkerPool, tmp_path: Path):
    _twin("llama").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    messages = two.run(_message, str(tmp_path))
    assert messages[0] == messages[1]
    assert "1 missing in the files: model.layers.1.mlp.up_proj.weight" in messages[0]


def test_three_ranks_start_from_the_weights_of_one(three: WorkerPool, config_folders, on_one_device):
    """Three divides no dimension of the twins: shards are uneven, and small parameters leave ranks empty."""
    for found in three.run(_from_scratch, config_folders, 0, {}):
        assert found == on_one_device


def test_three_ranks_load_and_export_bit_equal(three: WorkerPool, tmp_path: Path):
    twin = _twin("gpt2", seed=5)
    twin.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    for found in three.run(_pretrained, str(tmp_path / "in"), str(tmp_path / "out")):
        assert found == _fingerprints(twin.state_dict())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert _fingerprints(exported.state_dict()) == _fingerprints(twin.state_dict())


# -- memory ---------------------------------------------------------------------------------------------------------

# About 1 GB in fp32: 13 layers of 67 MB, embedding and head of 64 MB each.
_LARGE = LlamaConfig(
    vocab_size=15625, hidden_size=1024, intermediate_size=4096, num_hidden_layers=13, num_attention_heads=8,
)  # fmt: skip
_FILES = 4


def _write_large_checkpoint(folder: Path) -> int:
    """Four files of equal size, each tensor filled with its own number; returns the bytes of all."""
    model = build_on_meta(_LARGE, MODEL_FOR_CAUSAL_LM_MAPPING[LlamaConfig], HFTransformerModelArgs(model_type="llama"))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    total = sum(4 * shape.numel() for shape in shapes.values())
    files: list[dict[str, torch.Tensor]] = [{}]
    weight_map, written = {}, 0
    for number, (name, shape) in enumerate(shapes.items()):
        if written >= total / _FILES * len(files):
            save_file(files[-1], folder / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
            files[-1] = {}
            files.append({})
        files[-1][name] = torch.full(shape, float(number))
        weight_map[name] = f"part-{len(files)}.safetensors"
        written += 4 * shape.numel()
    save_file(files[-1], folder / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _LARGE.save_pretrained(folder)
    return total


def _memory(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS (resident now) or VmHWM (its peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def _peak_of_load(small: str, large: str) -> int:
    # A small load first: what is imported and started on first use belongs to the baseline, not to the checkpoint.
    HFTransformerModel.from_pretrained(small).parallelize(ParallelismConfig())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    baseline = _memory("VmRSS")
    model = HFTransformerModel.from_pretrained(large).parallelize(ParallelismConfig())
    peak = _memory("VmHWM") - baseline
    for number, parameter in enumerate(model.hf_model.parameters()):
        local = parameter.to_local()
        assert (local == number).all(), "and it is what the files hold"
    return peak


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory with Linux's /proc")
def test_loading_needs_the_local_shards_and_one_file(tmp_path: Path):
    total = _write_large_checkpoint(tmp_path)
    files = sorted(tmp_path.glob("part-*.safetensors"))
    assert len(files) == _FILES
    assert 1.0e9 < total < 1.1e9
    (tmp_path / "small").mkdir()
    _twin("llama").save_pretrained(tmp_path / "small")
    with WorkerPool(2) as fresh:
        peaks = fresh.run(_peak_of_load, str(tmp_path / "small"), str(tmp_path))
    # Slack: the Python objects of a model on meta and its blueprint, and what the allocator keeps of them.
    slack = 30e6
    bound = total / 2 + max(file.stat().st_size for file in files) + slack
    assert all(0.9 * total / 2 < peak <= bound for peak in peaks), (peaks, bound)
