"""What goes in and out of models that are cut into pipeline stages: weights, exports and checkpoints, 4 processes.

A rank has some of the parameters only, and the embedding of a tied model is on two. The reference is a model on one
device that was never cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from parallelize.config import ParallelismConfig
from tests.distributed.stored_run import StoredRun
from tests.distributed.workers import WorkerPool
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import HFTransformerModelArgs

_USUAL = {"vocab_size": 27, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
          "num_attention_heads": 4, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
_GEMMA3N = {
    **_USUAL, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 8, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 4, "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 27, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 8,
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
MESHES = {  # by keys of ParallelismConfig without their endings
    "pp 2": {"pipeline": 2},
    "pp 4": {"pipeline": 4},
    "pp 2 x tp 2": {"pipeline": 2, "tensor": 2},
    "pp 2 x fsdp 2": {"pipeline": 2, "data_parallel_shard": 2},
    "pp 2 x replicas 2": {"pipeline": 2, "data_parallel_replicate": 2},
    "v": {"pipeline": 2},
    "tp 2": {"tensor": 2},
}


@pytest.fixture(scope="module")
def one() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


def _arguments(model_type: str) -> HFTransformerModelArgs:
    return HFTransformerModelArgs(model_type=model_type, config_overrides=SIZES[model_type])


def _parallelism(mesh_name: str) -> ParallelismConfig:
    degrees = {
        f"{key}_parallel_degree" if "data" not in key else f"{key}_degree": n for key, n in MESHES[mesh_name].items()
    }
    schedule = "ZBVZeroBubble" if mesh_name == "v" else "1F1B"
    return ParallelismConfig(**{"pipeline_parallel_schedule": schedule, **degrees})


def _split(model: HFTransformerModel, mesh_name: str, seed: int = 0) -> HFTransformerModel:
    whole = sum(parameter.numel() for parameter in model.hf_model.parameters())
    model.parallelize(_parallelism(mesh_name), seed=seed)
    assert sum(parameter.numel() for parameter in model.hf_model.parameters()) < whole, "something is elsewhere"
    return model


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
