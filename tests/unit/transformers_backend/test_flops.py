"""FLOPs of a model: against torch's own operator counter, and layer by layer for windows and odd attention shapes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from parallelize.costs import AttentionCost
from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.flops import (
    ModelFlops,
    attention_costs,
    count_matmul_parameters,
    layer_flops,
    model_flops_per_token,
)
from transformers_backend.twin import WINDOW, build_twin

SEQUENCE = 40


def _twin(model_type: str, **fields) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type](**fields)
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], attn_implementation="eager")


def _costs(model_type: str, layers: int | None = None, **fields) -> list[AttentionCost]:
    config = CONFIG_MAPPING[model_type](**fields)
    return attention_costs(config, layers or config.num_hidden_layers)


@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen3", "gpt2", "gpt_neox", "gptj", "phi", "opt", "olmo2", "granite", "helium", "stablelm", "nemotron",
     "gemma", "glm", "bloom", "falcon", "youtu", "minicpm3", "codegen", "gpt_bigcode", "hrm_text"],
)  # fmt: skip
def test_against_torchs_counter(model_type: str):
    """The counter sees matrix products; the 6 N convention also counts vectors (norms, biases): under 3 % of a twin."""
    twin = _twin(model_type)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(input_ids=torch.zeros(1, SEQUENCE, dtype=torch.int64), use_cache=False)
    counted = counter.get_total_flops() / SEQUENCE
    ours = model_flops_per_token(twin, describe_decoder(twin), SEQUENCE) / 3  # forward alone
    assert ours == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *((name, {}) for name in ["llama", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt2", "gpt_neox",
                                  "granite", "bloom", "opt", "xglm", "youtu", "modernbert-decoder", "hrm_text"]),
        ("opt", {"word_embed_proj_dim": 512, "hidden_size": 1024, "do_layer_norm_before": False}),
        ("lfm2", {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    ],
    ids=str,
)  # fmt: skip
def test_every_layer_and_what_is_beside_them_against_torchs_counter(model_type: str, fields: dict):
    """At a sequence of one window, where eager attention computes no more than the window."""
    twin = _twin(model_type, **fields)
    decoder = describe_decoder(twin)
    ours, counted = layer_flops(twin, decoder, WINDOW), _counted(twin, decoder.layers)
    for mine, torchs in zip((*ours.layers, *ours[1:]), (*counted.layers, *counted[1:]), strict=True):
        assert mine == pytest.approx(torchs, rel=0.03, abs=0.002 * counted.total)
    assert ours.total == model_flops_per_token(twin, decoder, WINDOW)


def _counted(twin: PreTrainedModel, layer_names: tuple[str, ...]) -> ModelFlops:
    """What torch counts in the forward of one sequence, times 3, a token: of each layer, before and after them."""
    marks, layers, began = [], dict.fromkeys(layer_names, 0), [0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():

        def begin(*_):
            began[0] = counter.get_total_flops()
            marks.append(began[0])

        def end(name: str):
            layers[name] += counter.get_total_flops() - began[0]
            marks.append(counter.get_total_flops())

        for name in layer_names:
            layer = twin.get_submodule(name)
            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(lambda *_, name=name: end(name))
        twin(input_ids=torch.zeros(1, WINDOW, dtype=torch.int64), use_cache=False)
    scale = 3 / WINDOW
    after = counter.get_total_flops() - marks[-1]
    return ModelFlops([flops * scale for flops in layers.values()], marks[0] * scale, after * scale)


def test_by_hand():
    """Llama with grouped-query attention, sizes small enough to count."""
    fields = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}  # fmt: skip
    config = CONFIG_MAPPING["llama"](**fields)
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    decoder = describe_decoder(model)
    attention = 16 * 24 + 2 * 16 * 12 + 24 * 16
    layer = attention + 3 * 16 * 24 + 2 * 16
    assert count_matmul_parameters(model, decoder) == 3 * layer + 16 + 16 * 100
    per_token = 6 * (3 * layer + 16 + 1600) + 3 * 12 * 4 * 6 * 10
    assert model_flops_per_token(model, decoder, 10) == per_token
    flops = layer_flops(model, decoder, 10)
    assert flops.layers == [6 * layer + 12 * 4 * 6 * 10] * 3
    assert (flops.before_layers, flops.after_layers) == (0, 6 * (16 + 1600))


def test_projections_and_norms_beside_the_layers_count_where_they_run():
    """On models without memory: OPT-350m's projections, BLOOM's norm behind the embedding."""
    config = CONFIG_MAPPING["opt"](
        hidden_size=1024, word_embed_proj_dim=512, num_attention_heads=16, num_hidden_layers=2, vocab_size=1000
    )
    flops = layer_flops(*_on_meta(config), 10)
    assert (flops.before_layers, flops.after_layers) == (6 * 1024 * 512, 6 * (2 * 1024 + 1024 * 512 + 512 * 1000))
    config = CONFIG_MAPPING["bloom"](hidden_size=64, n_layer=2, vocab_size=1000)
    flops = layer_flops(*_on_meta(config), 10)
    assert (flops.before_layers, flops.after_layers) == (6 * 2 * 64, 6 * (2 * 64 + 64 * 1000))


def test_layers_that_slide_cost_less_in_long_sequences():
    model, decoder = _on_meta(CONFIG_MAPPING["gemma3_text"](num_hidden_layers=6, sliding_window=512))
    flops = layer_flops(model, decoder, 8192)
    assert len(set(flops.layers[:5])) == 1
    heads, head_dim = model.config.num_attention_heads, model.config.head_dim
    assert flops.layers[5] - flops.layers[0] == 12 * heads * head_dim * (8192 - 512)


def _on_meta(config: PreTrainedConfig) -> tuple[PreTrainedModel, Decoder]:
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return model, describe_decoder(model)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_a_tied_table_counts_once_as_the_head(model_type: str):
    tied, untied = (_twin(model_type, tie_word_embeddings=tie) for tie in (True, False))
    counts = [count_matmul_parameters(twin, describe_decoder(twin)) for twin in (tied, untied)]
    assert counts[0] == counts[1]


def test_learned_positions_and_per_layer_tables_are_looked_up():
    gpt2 = _twin("gpt2")
    everything = sum(parameter.numel() for parameter in gpt2.parameters())
    assert count_matmul_parameters(gpt2, describe_decoder(gpt2)) == everything - gpt2.transformer.wpe.weight.numel()
    gemma3n = _twin("gemma3n_text")
    everything = sum(parameter.numel() for parameter in gemma3n.parameters())
    table = gemma3n.model.embed_tokens_per_layer.weight.numel()
    assert count_matmul_parameters(gemma3n, describe_decoder(gemma3n)) == everything - table


def test_heads_and_sizes():
    assert _costs("llama", num_hidden_layers=2) == [AttentionCost(32, 128, 128, None)] * 2
    assert _costs("qwen3", num_hidden_layers=1, num_attention_heads=16, head_dim=128, hidden_size=1024) == [
        AttentionCost(heads=16, query_key_dim=128, value_dim=128, window=None)
    ]
    assert _costs("gpt2", 1) == [AttentionCost(12, 64, 64, None)]
    assert _costs("mpt", 1) == [AttentionCost(16, 128, 128, None)]


@pytest.mark.parametrize("model_type", ["youtu", "minicpm3"])
def test_latent_attention_has_another_value_size(model_type: str):
    config = CONFIG_MAPPING[model_type]()
    (cost,) = attention_costs(config, 1)
    assert cost.query_key_dim == config.qk_nope_head_dim + config.qk_rope_head_dim
    assert cost.value_dim == config.v_head_dim


def test_layers_that_slide_have_the_window_and_others_none():
    config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=6)
    windows = [cost.window for cost in attention_costs(config, 6)]
    assert windows == [config.sliding_window] * 5 + [None]
    assert {cost.window for cost in _costs("mistral")} == {4096}
    assert {cost.window for cost in _costs("mistral", sliding_window=None)} == {None}
    assert {cost.window for cost in _costs("qwen2", sliding_window=64, use_sliding_window=False)} == {None}
    config = CONFIG_MAPPING["olmo3"](num_hidden_layers=4)
    assert [cost.window for cost in attention_costs(config, 4)] == [4096, 4096, 4096, None]


def test_modernbert_decoders_local_layers_have_their_window():
    config = CONFIG_MAPPING["modernbert-decoder"](num_hidden_layers=3)
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    windows = [cost.window for cost in attention_costs(config, 3)]
    assert windows == [None, config.sliding_window, config.sliding_window]
    assert config.sliding_window is not None


def test_gpt_neos_local_layers_have_their_window():
    config = CONFIG_MAPPING["gpt_neo"]()
    assert config.attention_layers[:2] == ["global", "local"]
    assert [cost.window for cost in attention_costs(config, 24)][:4] == [None, config.window_size] * 2


def test_layers_with_a_head_size_of_their_own():
    config = CONFIG_MAPPING["gemma4_text"]()
    costs = attention_costs(config, config.num_hidden_layers)
    own = {int(layer): s["head_dim"] for layer, s in config.to_dict()["per_layer_config"].items() if "head_dim" in s}
    assert own
    for layer, cost in enumerate(costs):
        assert cost.query_key_dim == own.get(layer, config.to_dict()["head_dim"])


def test_convolution_layers_have_no_attention():
    types = ["conv", "conv", "full_attention", "conv"]
    costs = _costs("lfm2", num_hidden_layers=4, layer_types=types)
    assert sum(cost.heads * cost.query_key_dim for cost in costs) == 2560 * 1, "one layer's heads of 32 x 80"


def test_longer_sequences_cost_more_until_the_window():
    twin = _twin("mistral")  # a window of 8
    decoder = describe_decoder(twin)
    at = [model_flops_per_token(twin, decoder, seq_len) for seq_len in (4, 8, 64)]
    assert at[0] < at[1] == at[2]
