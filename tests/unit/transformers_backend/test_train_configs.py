"""Every recipe in train_configs/ loads, and the model that it names has the size that its makers publish.

The configs of hub models stand in tests/assets/configs/<recipe>/config.json, so that nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from transformers_backend.job_config import HFTransformers, load_job_config, validate

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "train_configs").glob("*.toml"))

# Tied embeddings count once. Those of model types, by hand: embedding + layers x (attention + MLP + norms) + norm.
PARAMETERS = {
    "default": 384 * 256 + 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256) + 256,
    "llama3_1_405b": 405_853_388_800,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
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
