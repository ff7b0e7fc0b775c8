"""The table at a run's start: what it says, and that it fits on a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallelize.parallel_dims import ParallelDims
from tests.jobs import tiny_job
from transformers_backend import JobConfig
from transformers_backend.decisions import TensorParallelism
from transformers_backend.model import HFTransformerModel, HFTransformerModelArgs
from transformers_backend.run_summary import WIDTH, describe_run, estimate_run_memory, parameter_table


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    return tiny_job(tmp_path, "run")


def _model(config: JobConfig) -> HFTransformerModel:
    return HFTransformerModel(HFTransformerModelArgs().update_from_config(config))


def _describe(config: JobConfig, **changes) -> str:
    model = _model(config)
    options = {
        "optimizers": [torch.optim.AdamW(model.hf_model.parameters())], "computes_in": torch.bfloat16,
        "accumulation_steps": 2, "tokens_per_step": 4096, "flops_per_token": 1.5e9, "data_name": 'dataset = "text"',
    }  # fmt: skip
    return describe_run(config, model, **(options | changes))


def _section(text: str, label: str) -> str:
    """The text beside a label, in one line."""
    found = re.search(rf"^{label} +(.*(?:\n  +.*)*)", text, re.MULTILINE)
    assert found, f"{label} in\n{text}"
    return " ".join(found.group(1).split())


def test_every_part_is_said(config):
    config.job.description = "a first try"
    text = _describe(config)
    assert _section(text, "run") == f"a first try writes to {config.job.dump_folder}"
    assert _section(text, "model") == (
        "LlamaForCausalLM: 40,096 parameters, all trained; weights: new, random embedding model.embed_tokens, 2 layers "
        "at model.layers, norm model.norm, head lm_head (untied) attention sdpa"
    )
    assert "mesh of one rank; weights kept in float32, computation in bfloat16" in _section(text, "mesh")
    assert _section(text, "data").startswith('dataset = "text" 4,096 tokens a step: 2 sequences of 32 on each of 1 ')
    assert _section(text, "schedule") == (
        "6 steps of AdamW, learning rate 0.01: warm-up over 2 steps, then linear decay over 4 steps to 0 gradient norm "
        "clipped to 1"
    )
    assert _section(text, "checkpoints").startswith("none: checkpoint.enable = true")
    assert _section(text, "figures") == "every step to metrics.jsonl"


def test_what_is_switched_on_is_said(config):
    config.checkpoint.enable = config.checkpoint.last_save_in_hf = True
    config.checkpoint.interval, config.checkpoint.keep_latest_k = 1000, 3
    config.validation.enable, config.validation.freq = True, 50
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = True
    config.activation_checkpoint.mode = "full"
    config.compile.enable = True
    config.lr_scheduler.decay_ratio, config.lr_scheduler.min_lr_factor = 0.5, 0.1
    text = _describe(config)
    folder = f"{config.job.dump_folder}/checkpoint"
    assert _section(text, "checkpoints") == (
        f"every 1,000 steps to {folder}, the newest 3 are kept at the end exported in float32 to {folder}/step-6-hf"
    )
    config.checkpoint.folder = "s3://bucket/run/"
    assert _section(_describe(config), "checkpoints") == (
        "every 1,000 steps to s3://bucket/run, the newest 3 are kept "
        f"at the end exported in float32 to {folder}/step-6-hf"
    ), "exports are always local"
    assert _section(text, "data").endswith("validation every 50 steps")
    assert _section(text, "figures") == "every step to metrics.jsonl, TensorBoard, W&B"
    assert _section(text, "mesh").endswith("compiled: model, loss; computed again in the backward: every layer")
    assert "warm-up over 2 steps, then constant for 1 steps, then linear decay over 3 steps to 0.001" in _section(
        text, "schedule"
    )


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_no_line_is_longer_than_a_page_is_wide(config, mode: str):
    config.job.description = "words " * 60
    config.hf_transformers.config_overrides["tie_word_embeddings"] = True
    config.activation_checkpoint.mode = mode
    lines = _describe(config, tokens_per_step=10**9).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert all(line == line.rstrip() for line in lines)
    starts = [re.match(r"\w+ +|  +", line).end() for line in lines]
    assert {start for line, start in zip(lines, starts, strict=True) if line[0] != " "} == {12}, "labels are aligned"


def test_parameters_by_kind(config):
    rows = [line.split() for line in parameter_table(_model(config))]
    assert {row[0]: (row[2], row[3], row[4]) for row in rows[1:-1]} == {
        "embedding": ("float32", "1", "12,288"),
        "attention": ("float32", "8", "6,144"),
        "mlp": ("float32", "6", "9,216"),
        "norms": ("float32", "5", "160"),
        "head": ("float32", "1", "12,288"),
    }
    assert rows[-1][:3] == ["together", "21", "40,096"]


@pytest.mark.parametrize(
    ("model_type", "overrides", "kinds"),
    [
        # name: number of tensors. Tied embeddings have no head of their own.
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 384},
         {"embedding": 2, "attention": 8, "mlp": 8, "norms": 10}),
        ("qwen3", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 384},
         {"embedding": 1, "attention": 8, "mlp": 6, "norms": 9, "head": 1}),
        ("opt", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 384,
                 "word_embed_proj_dim": 32},
         {"embedding": 2, "attention": 8, "mlp": 4, "norms": 6}),
    ],
)  # fmt: skip
def test_kinds_of_other_architectures(config, model_type: str, overrides: dict, kinds: dict):
    config.hf_transformers.model_type, config.hf_transformers.config_overrides = model_type, overrides
    rows = [line.split() for line in parameter_table(_model(config))]
    assert {row[0]: int(row[3]) for row in rows[1:-1] if row[2] == "float32"} == kinds
    assert any("tied" in line for line in parameter_table(_model(config))) is ("head" not in kinds)


# --- tensor parallelism


class _Plan:
    def lines(self) -> list[str]:
        return ["model.embed_tokens                 vocabulary", "model.layers.*.self_attn.q_proj    colwise"]


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """Of which only the first is there."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


def _split(model: HFTransformerModel, *, is_sharded: bool) -> None:
    model.dims = ParallelDims(pp=1, dp_replicate=1, dp_shard=2, cp=1, tp=2)
    model.mesh = model.dims.build_mesh("cpu")
    model.tensor_parallelism = TensorParallelism(_Plan(), {}, True, None)
    for module in model.hf_model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if parameter.ndim == 2 else Replicate()
            value = distribute_tensor(parameter.detach(), model.mesh["tp"], [placement], src_data_rank=None)
            setattr(module, key, torch.nn.Parameter(value))
    if is_sharded:
        fully_shard(model.hf_model, mesh=model.mesh["dp_shard"])


@pytest.mark.usefixtures("four_ranks")
def test_placements_have_a_column_for_each_dimension(config):
    model = _model(config)
    _split(model, is_sharded=True)
    rows = [line.split() for line in parameter_table(model)]
    assert rows[0][:3] == ["kind", "dp_shard", "tp"]
    assert {row[0]: row[1:3] for row in rows[1:-1]} == {
        "embedding": ["Shard(0)", "Shard(0)"], "attention": ["Shard(0)", "Shard(0)"], "mlp": ["Shard(0)", "Shard(0)"],
        "norms": ["Shard(0)", "Replicate"], "head": ["Shard(0)", "Shard(0)"],
    }  # fmt: skip
    assert rows[1][-2:] == ["12,288", "0.01"], "all numbers, and MiB of a quarter of them"


@pytest.mark.usefixtures("four_ranks")
def test_the_plan_is_told_and_whether_the_sequence_is_shared(config):
    assert "\nplan " not in _describe(config)
    model = _model(config)
    _split(model, is_sharded=False)
    activations = {}
    for shares, reason, told in (
        (True, None, "sequence parallel between regions"),
        (False, "norms differ", "not sequence parallel: norms"),
        (False, None, "not sequence parallel"),
    ):
        model.tensor_parallelism = TensorParallelism(_Plan(), {}, shares, reason)
        text = describe_run(
            config, model, optimizers=[torch.optim.AdamW(model.hf_model.parameters())], computes_in=torch.float32,
            accumulation_steps=1, tokens_per_step=64, flops_per_token=1e9, data_name="text",
        )  # fmt: skip
        assert _section(text, "plan").startswith(f"tensor parallel over 2 ranks; {told}")
        assert _section(text, "plan").endswith("model.layers.*.self_attn.q_proj colwise")
        assert "mesh dp_shard 2 x tp 2" in text
        assert "on each of 2 data ranks" in _section(text, "data")
        assert next(line for line in text.splitlines() if line.startswith("parameters")).split()[1:3] == ["kind", "tp"]
        activations[shares] = estimate_run_memory(
            config, model, optimizers=[], computes_in=torch.float32, accumulates=False
        ).activations
    assert activations[True] < activations[False]
