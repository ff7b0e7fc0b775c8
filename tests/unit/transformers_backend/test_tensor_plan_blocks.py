"""What a run of the twin says about blocks that are not plain attention and mlp: tables of recipes and plans."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from parallelize.tensor_parallel.plan import Region, Segment, Split, TensorPlan
from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.proof import example_batch
from transformers_backend.tensor_plan import Derived, derive, make_plan
from transformers_backend.tensor_plan.block import Block, ways_to_split, whole_way
from transformers_backend.tensor_plan.trace import trace
from transformers_backend.twin import build_twin


def twin_of(model_type: str, **fields):
    config, model_class = HFTransformerModelArgs(model_type=model_type).resolve()
    return build_twin(type(config)(**fields) if fields else config, model_class)


@functools.cache
def derived(model_type: str) -> Derived:
    twin = twin_of(model_type)
    return derive(twin, describe_decoder(twin), example_batch()[0])


def plan_of(model_type: str, degree: int, way: int = 0) -> TensorPlan:
    twin = twin_of(model_type)
    found = derived(model_type)
    recipe = found.with_ways([min(way, len(ways) - 2) for ways in found.blocks.values()])
    return make_plan(twin, describe_decoder(twin), recipe, degree)


def below(prefix: str, recipe: dict[str, str]) -> dict[str, str]:
    """The entries of a block, by their names inside it; its own as "."."""
    return {
        name.removeprefix(prefix).removeprefix(".") or ".": words
        for name, words in recipe.items()
        if name == prefix or name.startswith(f"{prefix}.")
    }


QKV = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
GATED = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


@pytest.mark.parametrize(
    ("model_type", "block", "expected"),
    [
        ("qwen3", "model.layers.*.self_attn", {**QKV, "q_norm": "replicate", "k_norm": "replicate"}),
        ("bitnet", "model.layers.*.self_attn", {**QKV, "attn_sub_norm": "norm_over_heads"}),
        ("bitnet", "model.layers.*.mlp", {**GATED, "ffn_sub_norm": "norm_over_heads"}),
        ("olmo2", "model.layers.*.self_attn", {**QKV, "q_norm": "norm_over_heads", "k_norm": "norm_over_heads"}),
        ("granite_swa", "model.layers.*.self_attn", {**QKV, "sinks": "split"}),
        (
            "gpt_neox_japanese",
            "gpt_neox_japanese.layers.*.attention",
            {"query_key_value": "colwise", "dense": "rowwise", "dense_bias": "outside"},
        ),
        (
            "gpt_neo",
            "transformer.h.*.attn.attention",
            {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "out_proj": "rowwise"},
        ),
        ("ctrl", "transformer.h.*.ffn", {"0": "colwise", "2": "rowwise"}),
        (
            "youtu",
            "model.layers.*.self_attn",
            {
                "q_a_proj": "colwise+gather", "q_a_layernorm": "replicate", "q_b_proj": "colwise",
                "kv_a_proj_with_mqa": "colwise+gather", "kv_a_layernorm": "replicate", "kv_b_proj": "colwise",
                "o_proj": "rowwise",
            },
        ),
        (
            "xlstm",
            "backbone.blocks.*.mlstm_layer",
            {
                "q": "colwise", "k": "colwise", "v": "colwise", "ogate_preact": "colwise", "igate_preact": "colwise",
                "fgate_preact": "colwise", "multihead_norm": "split", "out_proj": "rowwise",
            },
        ),
        (
            "hrm_text",
            "model.L_module.layers.*.self_attn",
            {**QKV, "gate_proj": "colwise"},
        ),
    ],
)  # fmt: skip
def test_first_way_to_split_a_block(model_type: str, block: str, expected: dict[str, str]) -> None:
    assert below(block, derived(model_type).blocks[block][0]) == {".": "region", **expected}


def test_linears_enter_a_region_themselves_where_the_blocks_input_goes_around_them() -> None:
    laurel = derived("gemma3n_text").blocks["model.layers.*.laurel"][0]
    assert below("model.layers.*.laurel", laurel) == {
        "linear_left": "colwise+region", "linear_right": "rowwise", "post_laurel_norm": "replicate",
    }  # fmt: skip


def test_what_is_called_by_other_methods_than_forward_is_not_split() -> None:
    (altup,) = derived("gemma3n_text").blocks["model.layers.*.altup"]
    assert below("model.layers.*.altup", altup) == {
        "correct_output_scale": "replicate",
        "correction_coefs": "replicate+direct",  # AltUp reads its weight and never calls it
        "prediction_coefs": "replicate",
        "modality_router": "replicate",
        "router_norm": "replicate",
    }


def test_per_layer_embeddings_are_split_over_the_vocabulary_and_positions_are_not() -> None:
    assert derived("gemma4_text").fixed["model.embed_tokens_per_layer"] == "vocabulary"
    assert derived("gpt_neo").fixed["transformer.wpe"] == "replicate"


def test_a_linear_that_yields_one_number_a_head_reads_those_of_all_heads() -> None:
    (attention, *_) = derived("doge").blocks["model.layers.*.self_attn"]
    way = below("model.layers.*.self_attn", attention)
    assert (way["v_proj"], way["dt_proj"], way["A"]) == ("colwise", "norm_over_heads", "split")
    assert derived("doge").fixed["model.layers.*.input_residual"] == "replicate"


def test_heads_in_pairs_of_both_halves_are_a_way() -> None:
    twin = twin_of("diffllama")
    found = derived("diffllama")
    (number,) = [
        index
        for index, way in enumerate(found.blocks["model.layers.*.self_attn"])
        if way["model.layers.*.self_attn.q_proj"] == "packed_halves"
    ]
    plan = make_plan(twin, describe_decoder(twin), found.with_ways([number, 0]), 2)
    assert plan.splits["model.layers.0.self_attn.q_proj"].segments == (Segment(32, 2), Segment(32, 2))
    assert plan.split_of("model.layers.0.self_attn.lambda_q1") == Split("replicate")
    with pytest.raises(ValueError, match=r"= 4: .*q_proj has 2 heads.*one of 1, 2\."):
        make_plan(twin, describe_decoder(twin), found.with_ways([number, 0]), 4)


def test_features_are_joined_for_statistics_over_all_of_them() -> None:
    joined = {"gate_proj": "colwise+join", "up_proj": "colwise+join", "down_proj": "rowwise+join", ".": "region"}
    sparse, dense = (derived(name).blocks["model.layers.*.mlp"] for name in ("gemma3n_text", "gemma3_text"))
    assert below("model.layers.*.mlp", sparse[0]) == joined
    assert below("model.layers.*.mlp", dense[0]) == {**GATED, ".": "region"}


def test_linears_of_the_layer_with_something_of_all_features_between_them_are_not_split() -> None:
    (replicated,) = derived("gemma4_text").blocks["model.layers.*"]
    assert below("model.layers.*", replicated) == {
        "per_layer_input_gate": "replicate",
        "per_layer_projection": "replicate",
    }
    assert below("model.decoder.layers.*", derived("opt").blocks["model.decoder.layers.*"][0]) == {
        "fc1": "colwise+region",
        "fc2": "rowwise",
    }


def test_a_convolution_is_split_by_channels_and_read_by_the_code_around_it() -> None:
    twin = twin_of("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    found = derive(twin, describe_decoder(twin), example_batch()[0])
    block = found.blocks["model.layers.*.conv"]
    assert below("model.layers.*.conv", block[0]) == {
        ".": "region", "in_proj": "packed_qkv", "conv": "split+direct", "out_proj": "rowwise",
    }  # fmt: skip
    assert below("model.layers.*.conv", block[-1]) == {
        ".": "whole_region", "in_proj": "whole", "conv": "whole+direct", "out_proj": "whole",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "region", "expected"),
    [
        (
            "bloom",
            "transformer.h.0.self_attention",
            Region(
                attributes={"hidden_size": 32, "num_heads": 2, "split_size": 32},
                head_arguments={"alibi": 4, "attention_mask": 4},
            ),
        ),
        (
            "xlstm",
            "backbone.blocks.0.mlstm_layer",
            Region(
                attributes={"v_dim": 32, "qk_dim": 16, "multihead_norm.num_heads": 2},
                config={"num_heads": 2},
            ),
        ),
        ("gpt_neo", "transformer.h.0.mlp", Region()),
    ],
)
def test_what_a_region_knows_of_its_heads(model_type: str, region: str, expected: Region) -> None:
    assert plan_of(model_type, 2).regions[region] == expected


def test_norm_over_fewer_heads_than_ranks() -> None:
    plan = plan_of("granite_swa", 4)
    assert plan.splits["model.layers.0.self_attn.sinks"] == Split("split", (Segment(4, 4),))
    norm = plan_of("olmo2", 4).splits["model.layers.0.self_attn.k_norm"]
    assert norm == Split("norm_over_heads", (Segment(64, 4),))


def test_a_degree_that_does_not_divide_the_heads_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"degree = 3: .*q_proj has 4 heads.*one of 1, 2, 4\."):
        plan_of("olmo2", 3)


def test_arguments_of_layers_that_travel_with_the_hidden_states() -> None:
    assert plan_of("gemma4_text", 2, way=0).sequence_arguments == ("per_layer_input",)
    assert plan_of("olmo2", 2).sequence_arguments == ()


# -- made-up blocks --------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """An mlp with what the test says around its two linears."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "norm before":
            return self.scale * self.down(self.up(self.norm(x)).relu())
        y = self.scale * self.norm(self.down(self.up(x).relu()))
        return x + y if self.kind == "residual inside" else y


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.ffn = Mlp(kind)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Layer(kind)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool):
        return SimpleNamespace(logits=self.layers[0].ffn(self.embed(input_ids)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "norm before",
            {".": "region", "up": "colwise", "down": "rowwise", "norm": "replicate", "scale": "outside"},
        ),
        ("norm behind", {".": "region", "up": "colwise", "down": "rowwise", "norm": "outside", "scale": "outside"}),
        ("residual inside", {"up": "colwise+region", "down": "rowwise"}),
    ],
)
def test_what_runs_behind_the_exit_is_outside(kind: str, expected: dict[str, str]) -> None:
    model = Model(kind)
    matrices = ["layers.0.ffn.up", "layers.0.ffn.down"]
    input_ids = torch.arange(6).view(1, 6)
    seen = trace(model, {"layers.0.ffn": matrices}, input_ids)
    assert seen.token_embeddings == ["embed"]
    parts = [*matrices, "layers.0.ffn.norm", "layers.0.ffn.scale"]
    decoder = Decoder("", "embed", ("layers",), ("layers.0",), None, None, "head", False, False)
    block = Block(model, decoder, "layers.0.ffn", matrices, parts, seen.blocks["layers.0.ffn"], seen.direct, input_ids)
    assert below("layers.*.ffn", ways_to_split(block)[0]) == expected
    assert whole_way(block) == {}  # it works token by token, on a part of the sequence as well
