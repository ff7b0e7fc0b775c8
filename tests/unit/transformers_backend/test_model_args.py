"""Which config and class a model name leads to, what is refused, and that the HF config stays what it was."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, LlamaForCausalLM

from transformers_backend.job_config import HFTransformers, JobConfig
from transformers_backend.model_args import HFTransformerModelArgs, build_on_meta, override_config
from transformers_backend.verify import DENSE_MODEL_TYPES

TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _folder(folder: Path, config) -> str:
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_every_dense_type_is_found_and_its_config_is_used_as_it_is(model_type: str):
    model_args = HFTransformerModelArgs(model_type=model_type)
    assert model_args.init == "scratch"
    hf_config, model_class = model_args.resolve()
    default = CONFIG_MAPPING[model_type]()
    assert hf_config.to_dict() == default.to_dict()
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    assert model_class.__name__ == names
    changed = HFTransformerModelArgs(model_type=model_type, config_overrides={"vocab_size": 999}).resolve()[0]
    assert changed.to_dict() == {**default.to_dict(), "vocab_size": 999}, "nothing but the override"


def test_a_folder_by_its_architecture(tmp_path: Path):
    config = LlamaConfig(
        **TINY, architectures=["LlamaForCausalLM"], attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        initializer_range=0.037, head_dim=12, pretraining_tp=1,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 12345.0},
    )  # fmt: skip
    model_args = HFTransformerModelArgs(model=_folder(tmp_path / "llama", config))
    assert model_args.init == "pretrained"
    hf_config, model_class = model_args.resolve()
    assert model_class is LlamaForCausalLM
    before = AutoConfig.from_pretrained(tmp_path / "llama").to_dict()
    assert hf_config.to_dict() == before
    model = build_on_meta(hf_config, model_class, model_args)
    assert all(parameter.is_meta for parameter in model.parameters())
    after = {**model.config.to_dict(), "dtype": before["dtype"]}
    assert after == before, "building changes nothing"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.bias.shape == (24,)
    assert model.config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 12345.0}


@pytest.mark.parametrize("architectures", [None, ["LlamaModel"]])
def test_a_folder_without_a_causal_architecture_but_a_body(tmp_path: Path, architectures: list[str] | None):
    name = _folder(tmp_path / "body", LlamaConfig(**TINY, architectures=architectures))
    assert HFTransformerModelArgs(model=name).resolve()[1] is LlamaForCausalLM


def test_the_second_causal_class_of_a_type_is_taken_by_name(tmp_path: Path):
    config = transformers.BertConfig(architectures=["BertLMHeadModel"], is_decoder=True)
    assert HFTransformerModelArgs(model=_folder(tmp_path / "b", config)).resolve()[1].__name__ == "BertLMHeadModel"


@pytest.mark.parametrize(
    ("model_type", "architecture", "sentence"),
    [
        ("t5", "T5ForConditionalGeneration", "t5 is an encoder-decoder model, which is trained on pairs"),
        ("whisper", "WhisperForConditionalGeneration", "whisper is an encoder-decoder model"),
        ("bert", "BertForMaskedLM", "its architecture is BertForMaskedLM, which is not a causal language model"),
        ("vit", "ViTForImageClassification", "vit has no causal language model in Transformers"),
        ("clip", "CLIPModel", "has no causal language model in Transformers"),
        ("llama", "LlamaForSequenceClassification", "its architecture is LlamaForSequenceClassification, which is not"),
    ],
)
def test_what_is_not_a_causal_model_is_refused_by_name(
    tmp_path: Path, model_type: str, architecture: str, sentence: str
):
    config = CONFIG_MAPPING[model_type](architectures=[architecture])
    name = _folder(tmp_path / "model", config)
    with pytest.raises(ValueError, match="causal language model") as caught:
        HFTransformerModelArgs(model=name).resolve()
    assert str(caught.value).startswith(name)
    assert sentence in str(caught.value)
    if model_type in ("bert", "llama"):
        assert f'set hf_transformers.model_type = "{model_type}"' in str(caught.value)


@pytest.mark.parametrize("model_args", [{}, {"model": "a/b", "model_type": "llama"}])
def test_exactly_one_name(model_args: dict):
    with pytest.raises(ValueError, match="exactly one of them names the model; set one") as caught:
        HFTransformerModelArgs(**model_args).resolve()
    assert f"model = {model_args.get('model')!r}" in str(caught.value)


def test_an_unknown_type_names_the_nearest():
    with pytest.raises(ValueError, match=r'model_type = "qwen33".*has no such model type.*qwen3'):
        HFTransformerModelArgs(model_type="qwen33").resolve()


def _gemma3() -> transformers.Gemma3Config:
    return transformers.Gemma3Config(
        text_config={**TINY, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 7.0},
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        architectures=["Gemma3ForConditionalGeneration"],
    )


def _qwen2_5_vl() -> transformers.Qwen2_5_VLConfig:
    text = {**TINY, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=text, architectures=["Qwen2_5_VLForConditionalGeneration"])


def test_a_composite_config_uses_its_text_config(tmp_path: Path):
    hf_config, model_class = HFTransformerModelArgs(model=_folder(tmp_path / "gemma3", _gemma3())).resolve()
    assert model_class.__name__ == "Gemma3ForCausalLM"
    assert hf_config.model_type == "gemma3_text"
    assert (hf_config.hidden_size, hf_config.final_logit_softcapping) == (16, 7.0)


def test_overrides_reach_the_text_config_of_a_composite(tmp_path: Path):
    name = _folder(tmp_path / "gemma3", _gemma3())
    hf_config, _ = HFTransformerModelArgs(model=name, config_overrides={"intermediate_size": 40}).resolve()
    assert hf_config.model_type == "gemma3_text"
    assert hf_config.intermediate_size == 40


def test_a_composite_without_a_causal_text_class_is_refused_by_name(tmp_path: Path):
    name = _folder(tmp_path / "qwen", _qwen2_5_vl())
    with pytest.raises(ValueError, match="qwen2_5_vl has no causal language model") as caught:
        HFTransformerModelArgs(model=name).resolve()
    assert "Qwen2_5_VLForConditionalGeneration" in str(caught.value)


def test_an_unknown_override_names_the_nearest():
    with pytest.raises(ValueError, match='config_overrides has "num_layers": LlamaConfig has no such field') as caught:
        override_config(LlamaConfig(**TINY), {"num_layers": 3})
    assert 'did you mean "' in str(caught.value)
    with pytest.raises(ValueError, match='did you mean "num_hidden_layers"'):
        override_config(LlamaConfig(**TINY), {"num_hiden_layers": 3})
    with pytest.raises(ValueError, match=r'"zzzzzzzz": LlamaConfig has no such field\.$'):
        override_config(LlamaConfig(**TINY), {"zzzzzzzz": 3})


def test_a_value_that_the_config_class_refuses_is_a_clear_error():
    with pytest.raises(ValueError, match="num_hidden_layers"):
        override_config(LlamaConfig(**TINY), {"num_hidden_layers": "two"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": "big"}, "LlamaConfig refuses it"),
        ({"num_hidden_layers": 0}, 'config_overrides has "num_hidden_layers" = 0: must be at least 1.'),
        ({"num_attention_heads": 0}, 'config_overrides has "num_attention_heads" = 0: must be at least 1.'),
        ({"vocab_size": -5}, 'config_overrides has "vocab_size" = -5: must be at least 1.'),
        ({"dtype": "float16"}, 'has "dtype", which is not changed there: set training.dtype (weights) and training.m'),
        ({"model_type": "qwen3"}, 'has "model_type", which is not changed there: set hf_transformers.model_type'),
        ({"attn_implementation": "eager"}, "set hf_transformers.attn_implementation and remove it."),
        ({"hidden_act": "geluu"}, "LlamaForCausalLM cannot be built with it (KeyError: 'geluu'). Correct the value."),
    ],
    ids=str,
)
def test_a_bad_override_is_explained(overrides: dict, message: str):
    model_args = HFTransformerModelArgs(model_type="llama", config_overrides={**TINY, **overrides})
    with pytest.raises(ValueError, match="config_overrides") as caught:
        build_on_meta(*model_args.resolve(), model_args)
    assert message in str(caught.value)


def test_more_layers_than_the_model_has_need_new_weights():
    config = CONFIG_MAPPING["qwen3"](num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"More layers than the model's 2 need its lists") as caught:
        override_config(config, {"num_hidden_layers": 3})
    assert 'hf_transformers.init = "scratch", because the files hold no weights for them.' in str(caught.value)


def test_an_unknown_attention_is_refused_with_the_choice():
    model_args = HFTransformerModelArgs(model_type="llama", config_overrides=dict(TINY), attn_implementation="flashy")
    with pytest.raises(ValueError, match='attn_implementation = "flashy": LlamaForCausalLM has no such attention') as e:
        build_on_meta(*model_args.resolve(), model_args)
    assert 'set "sdpa" or "eager"' in str(e.value)


def test_a_model_that_cannot_be_fetched_is_named():
    with pytest.raises(OSError, match=r'hf_transformers\.model = "no/thing": its config cannot be read'):
        HFTransformerModelArgs(model="no/thing").resolve()


def test_overrides_are_logged_with_old_and_new(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="transformers_backend"):
        override_config(LlamaConfig(**TINY), {"hidden_size": 32})
    assert "HF config override: hidden_size = 32 (was 16)" in caplog.text


def test_overrides_make_a_new_config_and_keep_the_rest():
    config = LlamaConfig(**TINY, attention_bias=True, initializer_range=0.5, architectures=["LlamaForCausalLM"])
    before = config.to_dict()
    changed = override_config(config, {"vocab_size": 70})
    assert config.to_dict() == before
    assert changed.to_dict() == {**before, "vocab_size": 70}
    assert override_config(config, {}) is config


def test_lists_of_one_value_a_layer_are_cut():
    config = CONFIG_MAPPING["gemma3_text"]()
    small = override_config(config, {"num_hidden_layers": 7})
    assert small.layer_types == config.layer_types[:7]
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    smollm3 = override_config(CONFIG_MAPPING["smollm3"](), {"num_hidden_layers": 5})
    assert len(smollm3.no_rope_layers) == len(smollm3.layer_types) == 5
    given = override_config(config, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    assert given.layer_types == ["full_attention"] * 2


def test_tables_are_merged():
    config = LlamaConfig(**TINY, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 12345.0})
    changed = override_config(config, {"rope_parameters": {"factor": 8.0}})
    assert changed.rope_parameters == {"rope_type": "linear", "factor": 8.0, "rope_theta": 12345.0}
    assert config.rope_parameters["factor"] == 4.0


def test_a_derived_head_dim_follows_and_an_explicit_one_stays():
    assert override_config(LlamaConfig(**TINY), {"hidden_size": 64}).head_dim == 32
    assert override_config(LlamaConfig(**TINY), {"num_attention_heads": 4}).head_dim == 4
    assert override_config(LlamaConfig(**TINY), {"hidden_size": 64, "head_dim": 6}).head_dim == 6


def test_an_independent_head_dim_survives_an_override_of_the_width():
    """Mistral-Nemo: hidden 5120, 32 heads of 128 (not 160). A narrower one keeps its heads unless told otherwise."""
    config = CONFIG_MAPPING["mistral"](**TINY, head_dim=24, num_key_value_heads=2)
    assert config.head_dim == 24
    assert override_config(config, {"hidden_size": 32}).head_dim == 24


def test_update_from_config_takes_everything_over():
    job_config = JobConfig()
    job_config.hf_transformers = HFTransformers(
        model_type="llama", revision="main", trust_remote_code=True, config_overrides=dict(TINY),
        attn_implementation="eager",
    )  # fmt: skip
    job_config.training.dtype = "bfloat16"
    model_args = HFTransformerModelArgs().update_from_config(job_config)
    assert model_args == HFTransformerModelArgs(
        model_type="llama", revision="main", trust_remote_code=True, config_overrides=TINY, init="scratch",
        attn_implementation="eager", dtype=torch.bfloat16,
    )  # fmt: skip
    assert model_args.config_overrides is not job_config.hf_transformers.config_overrides
    model = build_on_meta(*model_args.resolve(), model_args)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_update_from_config_can_load_or_start_from_scratch(tmp_path: Path):
    job_config = JobConfig()
    job_config.hf_transformers = HFTransformers(model=_folder(tmp_path / "x", LlamaConfig(**TINY)))
    assert HFTransformerModelArgs().update_from_config(job_config).init == "pretrained"
    job_config.hf_transformers.init = "scratch"
    assert HFTransformerModelArgs().update_from_config(job_config).init == "scratch"


_CONFIGURATION = """
from transformers import LlamaConfig
class ToyConfig(LlamaConfig):
    model_type = "toy-of-the-tests"
"""
_MODELING = """
from transformers import LlamaForCausalLM
from .configuration_toy import ToyConfig
class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
"""


def test_remote_code_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "configuration_toy.py").write_text(_CONFIGURATION)
    (folder / "modeling_toy.py").write_text(_MODELING)
    auto_map = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
    config = {**TINY, "model_type": "toy-of-the-tests", "auto_map": auto_map, "architectures": ["ToyForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    hf_config, model_class = HFTransformerModelArgs(model=str(folder), trust_remote_code=True).resolve()
    assert (type(hf_config).__name__, model_class.__name__) == ("ToyConfig", "ToyForCausalLM")
    assert hf_config.hidden_size == 16
    with pytest.raises(ValueError, match="trust_remote_code"):
        HFTransformerModelArgs(model=str(folder)).resolve()


def test_an_override_leaves_the_head_size_alone():
    """Qwen3's class default is 128, whatever the other sizes are."""
    config = CONFIG_MAPPING["qwen3"](hidden_size=64, num_attention_heads=4, head_dim=16)
    assert override_config(config, {"intermediate_size": 96}).head_dim == 16
    assert override_config(config, {"hidden_size": 128}).head_dim == 32
    assert override_config(config, {"hidden_size": 128, "head_dim": 8}).head_dim == 8
