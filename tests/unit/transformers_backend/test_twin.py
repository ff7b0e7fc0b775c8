"""The twin: every dense type builds small and keeps what makes its architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from transformers_backend.twin import POSITIONS, VOCABULARY_SIZE, build_twin, twin_config
from transformers_backend.verify import DENSE_MODEL_TYPES

REAL_CONFIGS = sorted((Path(__file__).parents[2] / "assets" / "configs").iterdir())
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
LAYER_COUNTS = ("num_layers_per_stack", "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
TWIN_OPTIONS = [{}, {"all_layers": True}, {"repeat": 2}, {"minimum_layers": 4}, {"repeat": 2, "minimum_layers": 5}]


def _default(model_type: str, **fields) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**fields)


def _class(config: PreTrainedConfig):
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _first(fields: dict, names: tuple[str, ...]) -> int:
    return next(fields[name] for name in names if isinstance(fields.get(name), int))


@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_every_dense_type_builds_runs_and_keeps_its_structure(model_type: str):
    config = _default(model_type)
    before = config.to_dict()
    twin = build_twin(config, _class(config))
    assert config.to_dict() == before, "the config that a twin is made of stays"
    assert type(twin) is _class(config)
    assert twin.training
    assert sum(parameter.numel() for parameter in twin.parameters()) < 1_000_000

    small = twin.config.to_dict()
    assert small["vocab_size"] == VOCABULARY_SIZE == twin.get_input_embeddings().weight.shape[0]
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "hidden_activation", "rms_norm_eps",
                "final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "parallel_attn", "alibi",
                "use_parallel_residual", "do_layer_norm_before", "multi_query", "rotary_pct", "norm_eps",
                "initializer_range", "embedding_multiplier", "partial_rotary_factor", "scale_embedding"):  # fmt: skip
        assert small.get(key) == before.get(key), key
    _assert_layer_kinds_kept(before, small)
    _assert_head_relation_kept(before, small)

    input_ids = torch.randint(3, VOCABULARY_SIZE - 3, (2, POSITIONS // 2))
    loss = twin(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    without = {name for name, parameter in twin.named_parameters() if parameter.grad is None}
    assert without <= {"model.z_L_init"}, "nothing else is unused"


def _assert_layer_kinds_kept(fields: dict, small: dict) -> None:
    layers, kept = _first(fields, LAYER_COUNTS), _first(small, LAYER_COUNTS)
    assert 2 <= kept <= 6
    for key in ("layer_types", "no_rope_layers", "attention_layers", "activation_sparsity_pattern"):
        if isinstance(fields.get(key), list) and len(fields[key]) == layers:
            assert len(small[key]) == kept, key
            assert set(map(str, small[key])) == set(map(str, fields[key])), f"every kind of {key}"
    assert bool(fields.get("num_kv_shared_layers")) == bool(small.get("num_kv_shared_layers"))
    assert (small.get("num_kv_shared_layers") or 0) < kept


def _assert_head_relation_kept(fields: dict, small: dict) -> None:
    for key in ("num_key_value_heads", "num_kv_heads"):
        if fields.get(key) and any(fields.get(name) for name in HEAD_COUNTS):
            assert _relation(fields[key], _first(fields, HEAD_COUNTS)) == _relation(
                small[key], _first(small, HEAD_COUNTS)
            )


def _relation(key_value_heads: int, heads: int) -> str:
    return "all" if key_value_heads == heads else "one" if key_value_heads == 1 else "grouped"


@pytest.mark.parametrize("options", TWIN_OPTIONS, ids=str)
@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_twin_of_a_twin_is_the_twin(model_type: str, options: dict):
    once = twin_config(_default(model_type), **options)
    assert twin_config(once, **options).to_dict() == once.to_dict()


@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_a_tall_twin_has_every_layer_under_its_own_number(model_type: str):
    config = _default(model_type)
    fields, small = config.to_dict(), twin_config(config, all_layers=True).to_dict()
    for key in ("layer_types", "no_rope_layers", "attention_layers", "activation_sparsity_pattern", "layer_rope_theta",
                "full_attn_idxs", "num_kv_shared_layers", "num_layers_per_stack", *LAYER_COUNTS):  # fmt: skip
        assert small.get(key) == fields.get(key), key
    assert (fields.get("per_layer_config") or {}).keys() == (small.get("per_layer_config") or {}).keys()


@pytest.mark.parametrize("model_type", ["llama", "gemma3n_text", "gemma4_text", "gpt_neo", "hrm_text", "lfm2", "xlstm"])
def test_a_tall_twins_parameters_are_named_as_the_models(model_type: str):
    config = _default(model_type)
    with torch.device("meta"):
        model, twin = _class(config)(config), _class(config)(twin_config(config, all_layers=True))
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_a_minimum_of_layers_is_had_by_every_dense_type_and_runs(model_type: str):
    config = _default(model_type)
    twin = build_twin(config, _class(config), minimum_layers=4)
    assert 4 <= _first(twin.config.to_dict(), LAYER_COUNTS) <= 6
    input_ids = torch.arange(3, 28)[None]
    assert torch.isfinite(twin(input_ids=input_ids, labels=input_ids, use_cache=False).loss)


def test_kinds_are_repeated_evenly_and_in_order():
    config = _default("gemma3_text")  # every sixth layer attends to all tokens: 5, 11, 17, 23 of 26
    slides, full = "sliding_attention", "full_attention"
    assert twin_config(config, repeat=2).layer_types == [slides, slides, full, full]
    assert twin_config(config, minimum_layers=5).layer_types == [slides, slides, slides, full, full, full]
    assert twin_config(config, repeat=2, minimum_layers=3).layer_types == [slides, slides, full, full]
    assert twin_config(config, repeat=5).layer_types == [slides] * 5 + [full] * 4, "there are no more"
    assert twin_config(config, minimum_layers=40).layer_types == config.layer_types
    assert twin_config(_default("gpt_neo"), repeat=2).attention_layers == ["global", "local"] * 2
    assert twin_config(_default("gpt_neo"), minimum_layers=24).attention_layers == ["global", "local"] * 12


def test_layers_that_reuse_keys_and_values_stay_behind_those_they_reuse():
    config = _default("gemma3n_text")  # 20 layers with keys and values of their own, 15 that reuse them
    small = twin_config(config, repeat=2)
    assert (small.num_hidden_layers, small.num_kv_shared_layers) == (12, 4)
    assert set(small.layer_types[:8]) == set(small.layer_types[8:]) == {"sliding_attention", "full_attention"}
    twin = build_twin(config, _class(config), repeat=2)
    input_ids = torch.arange(3, 28)[None]
    assert torch.isfinite(twin(input_ids=input_ids, labels=input_ids, use_cache=False).loss)


@pytest.mark.parametrize(("minimum_layers", "expected"), [(None, 1), (1, 1), (2, 2), (4, 4)])
def test_a_model_of_few_layers_grows_only_when_asked(minimum_layers: int | None, expected: int):
    config = _default("llama", num_hidden_layers=1, eos_token_id=[1])
    assert twin_config(config, minimum_layers=minimum_layers).num_hidden_layers == expected


def test_a_model_whose_config_says_something_of_single_layers_does_not_grow():
    config = _default("gemma2", num_hidden_layers=2)
    assert twin_config(config, minimum_layers=4).layer_types == config.layer_types


def test_special_tokens_are_no_entries_of_layers():
    config = _default("llama", num_hidden_layers=3, eos_token_id=[1, 2, 3])
    small = twin_config(config)
    assert small.num_hidden_layers == 2
    assert small.eos_token_id == [1, 2, 3]


@pytest.mark.parametrize(("heads", "key_value_heads", "expected"), [(32, 32, 4), (32, 8, 2), (32, 31, 2), (32, 1, 1)])
def test_head_relations(heads: int, key_value_heads: int, expected: int):
    config = _default("llama", num_attention_heads=heads, num_key_value_heads=key_value_heads)
    small = twin_config(config)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, expected)


@pytest.mark.parametrize(("key_value_heads", "expected"), [(1, 1), (2, 2), (3, 4), (9, 8)])
def test_fewer_key_value_heads_than_ranks(key_value_heads: int, expected: int):
    sizes = {"hidden_size": 576, "num_attention_heads": 9}  # of SmolLM, which has 3 for keys and values
    config = _default("llama", num_key_value_heads=key_value_heads, **sizes)
    small = twin_config(config, degree=4)
    assert (small.num_attention_heads, small.num_key_value_heads) == (8, expected)


def test_qkv_biases_and_qk_norms_stay():
    names = dict(build_twin(_default("qwen2"), _class(_default("qwen2"))).named_parameters())
    assert "model.layers.0.self_attn.q_proj.bias" in names
    assert "model.layers.0.self_attn.o_proj.bias" not in names
    names = dict(build_twin(_default("qwen3"), _class(_default("qwen3"))).named_parameters())
    assert names["model.layers.1.self_attn.q_norm.weight"].shape == (16,)


@pytest.mark.parametrize("tied", [True, False])
def test_tying_stays(tied: bool):
    twin = build_twin(_default("llama", tie_word_embeddings=tied), _class(_default("llama")))
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) is tied


def test_convolution_layers_of_lfm2_stay():
    types = ["conv", "conv", "full_attention", "conv", "full_attention"]
    config = _default("lfm2", num_hidden_layers=5, layer_types=types)
    twin = build_twin(config, _class(config))
    assert set(twin.config.layer_types) == {"conv", "full_attention"}
    assert sum(name.endswith("conv.conv.weight") for name, _ in twin.named_parameters()) >= 1


def test_per_frequency_rope_factors_are_cut():
    factors = [1.0 + 0.1 * i for i in range(48)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors,
            "factor": 2.0, "original_max_position_embeddings": 4096}  # fmt: skip
    config = _default("phi3", rope_parameters=rope)
    twin = build_twin(config, _class(config))
    assert twin.config.rope_parameters["rope_type"] == "longrope"
    assert twin.config.rope_parameters["short_factor"] == factors[:8]
    assert twin(input_ids=torch.arange(24)[None], use_cache=False).logits.isfinite().all()


def test_projections_around_opts_decoder_stay():
    """facebook/opt-350m: embeddings of another width than the layers, and a projection on each side."""
    config = _default("opt", hidden_size=1024, word_embed_proj_dim=512, do_layer_norm_before=False)
    names = dict(build_twin(config, _class(config)).named_parameters())
    assert "model.decoder.project_in.weight" in names
    assert "model.decoder.project_out.weight" in names


def test_dropout_is_off_and_the_seed_decides():
    config = _default("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    state = torch.get_rng_state()
    one, same, other = (build_twin(config, _class(config), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are not used up"
    input_ids = torch.arange(10)[None]
    logits = [twin(input_ids=input_ids, use_cache=False).logits for twin in (one, same, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_no_weight_is_left_at_zero_or_one():
    """A dropped bias or a norm applied twice would not show otherwise."""
    for name, parameter in build_twin(_default("gpt2"), _class(_default("gpt2"))).named_parameters():
        assert not ((parameter == 0) | (parameter == 1)).any(), name


@pytest.mark.parametrize("folder", REAL_CONFIGS, ids=lambda folder: folder.name)
def test_real_configs(folder: Path):
    config = AutoConfig.from_pretrained(folder)
    twin = build_twin(config, _class(config), dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.bfloat16}
    assert twin.config._attn_implementation == "eager"
    assert twin.config.tie_word_embeddings == config.tie_word_embeddings
    assert twin.config.rope_parameters == config.rope_parameters, "rope scaling stays as the checkpoint has it"
    _assert_head_relation_kept(config.to_dict(), twin.config.to_dict())
    assert twin(input_ids=torch.arange(24)[None], use_cache=False).logits.isfinite().all()
