"""Every recipe in train_configs/ loads, and the model that it names has the size that its makers publish.

The configs of hub models stand in tests/assets/configs/<recipe>/config.json, so that nothing is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from parallelize.context_parallel.layout import sequence_length_problems
from parallelize.costs import activation_bytes_per_token
from transformers_backend.decoder import describe_decoder
from transformers_backend.job_config import HFTransformers, load_job_config, validate
from transformers_backend.loss import count_chunks
from transformers_backend.memory import layer_widths

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "train_configs").glob("*.toml"))

# Tied embeddings count once. Those of model types, by hand: embedding + layers x (attention + MLP + norms) + norm.
PARAMETERS = {
    "default": 384 * 256 + 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256) + 256,
    "llama3_1_405b": 405_853_388_800,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_8b_128k": 8_030_261_248,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "smollm_1_7b": 1_711_376_384,
    "wikitext103_109m": 50257 * 768 + 12 * (4 * 768 * 768 + 3 * 768 * 1536 + 2 * 768) + 768,
}


def hf_config_of(recipe: str, choice: HFTransformers) -> PreTrainedConfig:
    if choice.model_type is not None:
        return AutoConfig.for_model(choice.model_type, **choice.config_overrides)
    return AutoConfig.from_pretrained(ROOT / "tests" / "assets" / "configs" / recipe, **choice.config_overrides)


def test_every_recipe_has_a_known_size() -> None:
    assert [path.stem for path in RECIPES] == sorted(PARAMETERS)
    assert 109_000_000 < PARAMETERS["wikitext103_109m"] < 110_000_000


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_builds(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_job_config([str(path)])
    mesh = config.parallelism
    validate(config, world_size=8 * mesh.tensor_parallel_degree * mesh.pipeline_parallel_degree)
    assert sequence_length_problems("", config.training.seq_len, mesh.context_parallel_degree) == []
    assert caplog.text == ""  # no key without meaning
    hf_config = hf_config_of(path.stem, config.hf_transformers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[path.stem]
    assert config.training.seq_len <= hf_config.max_position_embeddings


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_is_and_how_to_run_it(path: Path) -> None:
    comment = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    command = "scripts/train.sh" if path.stem == "default" else f"scripts/train.sh train_configs/{path.name}"
    assert comment.endswith(f"#     {command}")
    assert load_job_config([str(path)]).job.dump_folder == f"./outputs/{path.stem}"


def test_the_memory_budget_of_long_sequences_is_right() -> None:
    """Each line of it, from the sizes of the model; GiB on one of 8 GPUs."""
    path = ROOT / "train_configs" / "llama3_1_8b_128k.toml"
    config = load_job_config([str(path)])
    hf_config = hf_config_of(path.stem, config.hf_transformers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    ranks = config.parallelism.context_parallel_degree
    tokens = config.training.seq_len // ranks
    decoder = describe_decoder(model)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()
    activations = activation_bytes_per_token(
        layer_widths(model, decoder), itemsize=2, seq_len=tokens, recompute=config.activation_checkpoint.mode
    )
    keys_and_values = 2 * hf_config.num_key_value_heads * hf_config.head_dim
    queries = hf_config.num_attention_heads * hf_config.head_dim
    chunk = tokens / count_chunks(tokens, hf_config.vocab_size, "cuda")
    expected = [
        16 * PARAMETERS[path.stem] / ranks,
        2 * (2 * layer + head),
        (2 + 4) * layer,
        tokens * activations.kept,
        tokens * activations.recomputed,
        # In the backward: two visits in bf16; in fp32 the gradients of a visit, of those that arrive, and of one's own
        # keys and values, and of the queries; and the output.
        tokens * (keys_and_values * (2 * 2 + 3 * 4) + queries * (4 + 4)),
        chunk * hf_config.vocab_size * (2 + 8) + head * (4 + 2),
    ]
    expected.append(sum(expected))
    budget = re.findall(r"^#     .* ([\d.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert [float(line) for line in budget] == [pytest.approx(size / 2**30, abs=0.051) for size in expected]
    assert f"would take {tokens * ranks * activations.together / 2**30:.0f} with every" in path.read_text()
    assert 0.75 < attention_share(hf_config, config.training.seq_len) < 0.85, "four fifths"


def attention_share(hf_config: PreTrainedConfig, seq_len: int) -> float:
    """Of the work of a forward, counted as MFU counts it, without a discount for the causal mask."""
    pairs = 4 * hf_config.num_attention_heads * hf_config.head_dim * seq_len * hf_config.num_hidden_layers
    return pairs / (pairs + 2 * PARAMETERS["llama3_1_8b"])
