"""Recipes and plans of fused and transposed matrices, the search for a recipe, and whose recipe goes first."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parallelize.tensor_parallel.plan import Segment
from transformers_backend.decoder import describe_decoder
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.proof import example_batch
from transformers_backend.tensor_plan import (
    DegreeError,
    Derived,
    check_users_recipe,
    derive,
    make_plan,
    recipe_of_transformers,
    search,
)
from transformers_backend.tensor_plan.fused import fused_layouts
from transformers_backend.twin import build_twin


def twin_of(model_type: str, *, degree: int = 2, **overrides):
    arguments = HFTransformerModelArgs(model_type=model_type, config_overrides=overrides)
    return build_twin(*arguments.resolve(), degree=degree)


def best_recipe(twin) -> dict[str, str]:
    return derive(twin, describe_decoder(twin), example_batch()[0]).first()


def plan_of(twin, degree: int, recipe: dict[str, str] | None = None):
    return make_plan(twin, describe_decoder(twin), recipe or best_recipe(twin), degree)


@pytest.mark.parametrize(
    ("model_type", "overrides", "styles"),
    [
        # [q | k | v], and [gate | up]
        ("phi3", {}, {"self_attn.qkv_proj": "packed_qkv", "mlp.gate_up_proj": "packed_gate_up"}),
        ("glm", {}, {"self_attn.q_proj": "colwise", "mlp.gate_up_proj": "packed_gate_up"}),
        ("modernbert-decoder", {}, {"mlp.Wi": "packed_gate_up", "mlp.Wo": "rowwise"}),
        ("gpt2", {}, {"attn.c_attn": "packed_qkv", "attn.c_proj": "rowwise", "mlp.c_fc": "colwise"}),
        # a single key and value head
        ("gpt_bigcode", {}, {"attn.c_attn": "packed_qkv"}),
        ("falcon", {}, {"self_attention.query_key_value": "packed_qkv"}),
        # [q k v of head 0 | of head 1 | ...], and groups of queries beside their key and value
        ("gpt_bigcode", {"multi_query": False}, {"attn.c_attn": "colwise"}),
        ("falcon", {"multi_query": False}, {"self_attention.query_key_value": "colwise"}),
        (
            "falcon",
            {"new_decoder_architecture": True, "num_kv_heads": 8},
            {"self_attention.query_key_value": "colwise"},
        ),
        ("gpt_neox", {}, {"attention.query_key_value": "colwise", "attention.dense": "rowwise"}),
        ("bloom", {}, {"self_attention.query_key_value": "colwise"}),
    ],
)
def test_the_layout_of_a_fused_matrix_is_read_off_the_twin(model_type, overrides, styles):
    recipe = best_recipe(twin_of(model_type, **overrides))
    found = {pattern.partition(".*.")[2]: words for pattern, words in recipe.items() if ".*." in pattern}
    assert {name: found[name] for name in styles} == styles


def test_codegen_has_its_heads_in_four_blocks():
    twin = twin_of("codegen", degree=4)  # 8 heads: the 4 of a smaller twin make blocks of a single one
    plan = plan_of(twin, 2)
    attention = f"{describe_decoder(twin).layers[0]}.attn"
    assert plan.splits[f"{attention}.qkv_proj"].segments == (Segment(32, 2),) * 12
    assert plan.splits[f"{attention}.out_proj"].segments == (Segment(32, 2),) * 4
    with pytest.raises(DegreeError, match=r"has 2 heads, which it does not divide. Use one of 1, 2\."):
        plan_of(twin, 4)


@pytest.mark.parametrize(
    ("model_type", "name", "degree", "segments", "attributes"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj", 2, [(64, 4), (64, 4), (64, 4)], {}),
        ("phi3", "model.layers.0.mlp.gate_up_proj", 2, [(96, None), (96, None)], {}),
        ("gpt2", "transformer.h.0.attn.c_attn", 2, [(64, 4), (64, 4), (64, 4)], {"nf": 96}),
        ("gpt2", "transformer.h.1.mlp.c_fc", 4, [(256, None)], {"nf": 64}),
        ("gpt_bigcode", "transformer.h.0.attn.c_attn", 2, [(64, 4), (16, 1), (16, 1)], {}),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", 4, [(192, 4)], {}),
    ],
)
def test_segments_of_a_fused_matrix(model_type, name, degree, segments, attributes):
    split = plan_of(twin_of(model_type), degree).splits[name]
    assert split.segments == tuple(Segment(*segment) for segment in segments)
    assert split.attributes == attributes


def test_attributes_of_a_single_key_value_head():
    region = plan_of(twin_of("gpt_bigcode"), 4).regions["transformer.h.0.attn"]
    local = {"num_heads": 1, "kv_heads": 1, "kv_dim": 16, "embed_dim": 16, "num_key_value_groups": 1}
    assert region.attributes.items() >= local.items()


def test_groups_of_heads_are_not_cut():
    twin = twin_of("falcon", new_decoder_architecture=True, num_kv_heads=8)  # 2 groups of 2 queries in the twin
    with pytest.raises(DegreeError, match=r"degree = 4: transformer.h.0.*has 2 heads.*Use one of 1, 2\."):
        plan_of(twin, 4)


def test_the_degrees_of_a_refusal_fit_the_whole_model():
    def refusal(degree: int, **sizes) -> str:
        config = LlamaConfig(hidden_size=96, vocab_size=64, num_hidden_layers=1, **sizes)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        with pytest.raises(DegreeError) as caught:
            plan_of(model, degree, recipe=best_recipe(twin_of("llama")))
        return str(caught.value)

    # 3 key and value heads are shared by 6 and 12 ranks; 49 and 7 divide the features, but not the heads
    sizes = {"num_attention_heads": 12, "intermediate_size": 96}
    assert refusal(2, num_key_value_heads=3, **sizes).endswith("Use one of 1, 3, 6, 12.")
    assert refusal(4, num_attention_heads=12, intermediate_size=49).endswith("Use one of 1.")


class _Interleaved(torch.nn.Module):
    """An mlp whose gate and up alternate in pairs, which no word describes for two ranks but "colwise"."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        pairs = self.both(input_ids.float()).unflatten(-1, (8, 2))
        return self.down(torch.sigmoid(pairs[..., 0]) * pairs[..., 1])


def test_only_layouts_that_compute_the_same_are_found():
    assert fused_layouts(_Interleaved(), "both", "down", None, torch.rand(2, 3, 8)) == [("colwise", "rowwise")]


# -- whose recipe ---------------------------------------------------------------------------------------------------


def test_transformers_plan_says_what_is_derived_for_llama():
    twin = twin_of("llama")
    recipe = recipe_of_transformers(twin, describe_decoder(twin))
    derived = derive(twin, describe_decoder(twin), example_batch()[0])
    assert recipe == {
        **{f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    assert derived.preferring(recipe) == derived


def test_entries_that_gather_are_left_to_the_derived_recipe():
    twin = twin_of("phi3")
    assert recipe_of_transformers(twin, describe_decoder(twin)) == {}


def test_a_preferred_style_goes_before_the_derived_one():
    derived = Derived({}, {"mlp": [{"mlp.a": "colwise+region", "mlp.b": "rowwise"}, {"mlp.a": "replicate"}]})
    preferred = derived.preferring({"mlp.a": "packed_gate_up", "mlp.b": "rowwise"})
    assert preferred.blocks["mlp"] == [
        {"mlp.a": "packed_gate_up+region", "mlp.b": "rowwise"},
        *derived.blocks["mlp"],
    ]


def test_an_unknown_name_in_the_users_plan():
    with pytest.raises(ValueError, match=r"names \"model.layers.\*.mlp.up_porj\".*near ones: model.layers.\*.mlp.up_p"):
        check_users_recipe({"model.layers.*.mlp.up_porj": "colwise"}, ["model.layers.0.mlp.up_proj", "lm_head"])


def test_an_unknown_style_in_the_users_plan():
    with pytest.raises(ValueError, match=r"there is no style \"column\"; near ones: colwise"):
        check_users_recipe({"model.layers.*.mlp.up_proj": "column"}, ["model.layers.0.mlp.up_proj"])


# -- search ---------------------------------------------------------------------------------------------------------

_DERIVED = Derived({"head": "vocabulary"}, {block: [{block: "a"}, {block: "b"}, {block: "whole"}] for block in "xyz"})


def _search(exact) -> tuple[str, int]:
    trials = []
    recipe = search(
        lambda recipe: trials.append(recipe) or exact(**{block: recipe[block] for block in "xyz"}), _DERIVED
    )
    assert recipe["head"] == "vocabulary"
    return " ".join(recipe[block] for block in "xyz"), len(trials)


def test_search_takes_the_first_ways_where_they_are_exact():
    assert _search(lambda x, y, z: True) == ("a a a", 1)


def test_search_finds_the_way_of_every_block():
    assert _search(lambda x, y, z: x != "a" and z not in "ab") == ("b a whole", 8)


def test_search_leaves_out_what_is_not_exact_with_the_others():
    assert _search(lambda x, y, z: not (x == "a" and z == "a"))[0] == "a a whole"


def test_search_refuses_where_nothing_is_exact():
    with pytest.raises(ValueError, match="not even with every block"):
        _search(lambda x, y, z: False)
