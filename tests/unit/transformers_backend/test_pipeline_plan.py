"""The plan of a pipeline: which layers, parameters and costs each stage has, on which rank, and what is refused."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from parallelize.config import ParallelismConfig
from transformers_backend.decoder import describe_decoder
from transformers_backend.pipeline_plan import PipelinePlan, plan_pipeline
from transformers_backend.stages import LocalStages

SIZES = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
SMALL_HEAD = LlamaConfig(**{**SIZES, "vocab_size": 8}, num_hidden_layers=8)
TIED = Qwen3Config(**SIZES, num_hidden_layers=4, tie_word_embeddings=True)


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def plan(model: PreTrainedConfig | PreTrainedModel, degree: int = 2, seq_len: int = 64, **keys) -> PipelinePlan:
    """keys: of ParallelismConfig, those of pipelines without their beginning."""
    model = on_meta(model) if isinstance(model, PreTrainedConfig) else model
    keys = {key if key == "module_fqns_per_model_part" else f"pipeline_parallel_{key}": keys[key] for key in keys}
    parallelism = ParallelismConfig(pipeline_parallel_degree=degree, **keys)
    assert parallelism.problems() == []
    return plan_pipeline(model, describe_decoder(model), None, parallelism, seq_len)


def sizes(made: PipelinePlan) -> list[int]:
    assert [share.layers for share in made.shares] == [
        range(a, b) for a, b in itertools.pairwise([0, *itertools.accumulate(len(s.layers) for s in made.shares)])
    ]
    numbers = [[int(name.rpartition(".")[2]) for name in layers] for layers in made.split.stages]
    assert numbers == [list(share.layers) for share in made.shares], "the table says what the stages have"
    return [len(layers) for layers in numbers]


def test_without_a_pipeline_there_is_no_plan():
    assert plan(SMALL_HEAD, degree=1) is None


# --- where stages are


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [
        ("GPipe", (0, 1)), ("1F1B", (0, 1)), ("interleaved1f1b", (0, 1, 0, 1)), ("LoopedBFS", (0, 1, 0, 1)),
        ("InterleavedZeroBubble", (0, 1, 0, 1)), ("ZBVZeroBubble", (0, 1, 1, 0)), ("DualPipeV", (0, 1, 1, 0)),
    ],
)  # fmt: skip
def test_schedules_place_stages(schedule: str, ranks: tuple[int, ...]):
    made = plan(SMALL_HEAD, schedule=schedule)
    assert made.rank_of_stage == ranks
    assert sizes(made) == [8 // len(ranks)] * len(ranks)
    for rank in (0, 1):
        assert made.stages_of_rank(rank) == [stage for stage, owner in enumerate(ranks) if owner == rank]


def test_a_file_places_stages(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("0F0,2F0,2B0,0B0\n1F0,3F0,3B0,1B0\n")
    assert plan(SMALL_HEAD, schedule_csv=str(path)).rank_of_stage == (0, 1, 0, 1)


def test_layers_per_stage():
    made = plan(SMALL_HEAD, schedule="Interleaved1F1B", layers_per_stage=1)
    assert made.rank_of_stage == (0, 1) * 4
    assert sizes(made) == [1] * 8


# --- which layers


def test_a_head_that_costs_as_much_as_layers_is_balanced():
    """4 equal layers and a head of about two; torchtitan's keys say otherwise."""
    config = LlamaConfig(**{**SIZES, "vocab_size": 2 * (3 * 64 * 32 + 3 * 32 * 32) // 32}, num_hidden_layers=4)
    assert sizes(plan(config, seq_len=1)) == [3, 1]
    assert sizes(plan(config, seq_len=1, last_stage_less_layers=0)) == [2, 2]
    assert sizes(plan(SMALL_HEAD)) == [4, 4]
    assert sizes(plan(SMALL_HEAD, last_stage_less_layers=2)) == [5, 3]
    assert sizes(plan(SMALL_HEAD, first_stage_less_layers=4)) == [2, 6]


def test_stages_by_name():
    parts = [["model.embed_tokens", "model.layers.0", "model.rotary_emb"],
             [f"model.layers.{number}" for number in range(1, 8)] + ["model.norm", "lm_head"]]  # fmt: skip
    assert sizes(plan(SMALL_HEAD, module_fqns_per_model_part=parts)) == [1, 7]


def test_named_parts_say_how_many_stages_there_are():
    parts = [[f"model.layers.{number}"] for number in range(5)] + [
        ["model.layers.5", "model.layers.6", "model.layers.7"]
    ]
    made = plan(SMALL_HEAD, schedule="Interleaved1F1B", layers_per_stage=4, module_fqns_per_model_part=parts)
    assert sizes(made) == [1, 1, 1, 1, 1, 3]
    assert made.rank_of_stage == (0, 1, 0, 1, 0, 1)
    with pytest.raises(ValueError, match=r"has 6 parts. .*must be exactly 4, two for each rank"):
        plan(SMALL_HEAD, schedule="ZBVZeroBubble", module_fqns_per_model_part=parts)


@pytest.mark.parametrize(("first", "last", "named"), [(9, -1, "first"), (0, 9, "last"), (-1, 100, "last")])
def test_more_layers_less_than_a_stage_has_are_refused(first: int, last: int, named: str):
    assert sum(sizes(plan(SMALL_HEAD, first_stage_less_layers=8))) == 8, "(8 + 8) / 2 is the most"
    with pytest.raises(ValueError, match=rf"_{named}_stage_less_layers = \d+: must be at most .*lower it, or set -1"):
        plan(SMALL_HEAD, first_stage_less_layers=first, last_stage_less_layers=last)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([["model.layers.0", "lm_head"], ["model.layers.1"]], 'part 0 names "lm_head", which runs in the last part'),
        ([["model.layers.0"], ["model.layers.1", "model.embed_tokens"]], "runs in the first part"),
        ([["model.layers.0"], ["model.layers.2"]], "every layer must be named once, in order"),
        ([["layers.0"], ["model.layers.1"]], 'part 0 names "layers.0", which is no layer'),
    ],
)
def test_names_that_do_not_fit_are_told(parts: list[list[str]], message: str):
    with pytest.raises(ValueError, match=r"^parallelism\.module_fqns_per_model_part: ") as caught:
        plan(TIED, module_fqns_per_model_part=parts)
    assert message in str(caught.value)


def test_layers_that_share_keys_and_values_are_not_cut():
    """gemma3n's layers 18 to 34 need what layers before them computed: all of them are in the last stage."""
    config = CONFIG_MAPPING["gemma3n_text"]()
    for degree in (2, 4):
        made = plan(config, degree=degree)
        assert sizes(made)[-1] >= 16
        assert sum(sizes(made)) == config.num_hidden_layers
    layers = [f"model.layers.{number}" for number in range(config.num_hidden_layers)]
    with pytest.raises(ValueError, match=r"part 1 begins with model\.layers\.25, which must stay with the layer bef"):
        plan(config, module_fqns_per_model_part=[layers[:25], layers[25:]])
    with pytest.raises(ValueError, match="these 35 layers can only be cut into 19, because some must stay"):
        plan(config, degree=20)


# --- what they hold and cost


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("config", [SMALL_HEAD, TIED])
def test_the_counts_are_those_of_the_models_that_are_cut(config: PreTrainedConfig, schedule: str):
    made = plan(config, schedule=schedule)
    for stage, share in enumerate(made.shares):
        hf_model = on_meta(config)
        LocalStages(hf_model, describe_decoder(hf_model), made.split, [stage]).drop_the_rest()
        assert share.parameters == sum(p.numel() for p in hf_model.parameters())
        for name, _ in on_meta(config).named_parameters():
            is_here = name in dict(hf_model.named_parameters())
            assert is_here == (stage in made.split.stages_of(name)), name
    assert sum(share.share for share in made.shares) == pytest.approx(1)


def test_ranks_of_a_parameter():
    three = plan(TIED, degree=3)
    assert three.ranks_of("model.embed_tokens.weight") == (0, 2)
    assert three.ranks_of("model.norm.weight") == (2,)
    assert three.ranks_of("model.layers.0.mlp.up_proj.weight") == (0,)
    v_shaped = plan(TIED, schedule="ZBVZeroBubble")
    assert v_shaped.ranks_of("model.embed_tokens.weight") == (0,), "its first and last stage are on one rank"
    assert v_shaped.ranks_of("model.layers.2.mlp.up_proj.weight") == (1,)


def test_a_plan_changes_nothing_and_is_the_same_for_weights_on_meta():
    hf_model = on_meta(TIED)
    before = {name: id(parameter) for name, parameter in hf_model.named_parameters()}
    made = plan(hf_model)
    assert {name: id(parameter) for name, parameter in hf_model.named_parameters()} == before
    assert plan(AutoModelForCausalLM.from_config(TIED)) == made


# --- what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"degree": 5}, "makes 5 stages on pipeline_parallel_degree = 5 ranks, and the model has 4 layers"),
        ({"degree": 3, "schedule": "LoopedBFS"}, "makes 6 stages on pipeline_parallel_degree = 3 ranks"),
        ({"schedule": "Interleaved1F1B", "layers_per_stage": 2}, "the number of stages is 2, and must be a multiple"),
        ({"layers_per_stage": 1}, "the number of stages is 4, and must be exactly 2, one for each rank"),
    ],
)
def test_too_many_or_too_few_stages_are_told(keys: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(TIED, **keys)


def test_layers_that_run_several_times_are_refused():
    with pytest.raises(ValueError, match="HrmTextForCausalLM does not run its layers once, one after the other"):
        plan(CONFIG_MAPPING["hrm_text"]())


class SharesAnMlp(LlamaForCausalLM):
    """A model two of whose layers are partly one, as Zamba's."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[2].mlp = self.model.layers[1].mlp


def test_parameters_of_layers_in_different_stages_are_refused_by_name():
    config = LlamaConfig(**{**SIZES, "vocab_size": 8}, num_hidden_layers=4)
    with pytest.raises(ValueError, match="SharesAnMlp: ") as caught:
        plan(SharesAnMlp(config))
    for part in ("model.layers.1.mlp.gate_proj.weight and model.layers.2.mlp.gate_proj.weight are one parameter",
                 "parallelism.module_fqns_per_model_part", "parallelism.pipeline_parallel_degree = 1"):  # fmt: skip
        assert part in str(caught.value)
    layers = [f"model.layers.{number}" for number in range(4)]
    together = [layers[:3], layers[3:]]
    assert sizes(plan(SharesAnMlp(config), module_fqns_per_model_part=together)) == [3, 1]


def test_hooks_that_would_get_what_stands_for_other_layers_are_refused():
    model = on_meta(SMALL_HEAD)
    for layer in (0, 3, 5):
        model.model.layers[layer].register_forward_pre_hook(lambda *_: None)
    assert sizes(plan(model)) == [4, 4]
    model.model.layers[4].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"model\.layers\.4 begins a stage .* has a forward pre-hook.* after parallelize"
    ):
        plan(model)


def test_gradient_checkpointing_of_transformers_is_refused():
    model = on_meta(SMALL_HEAD)
    for layer in model.model.layers:  # as gradient_checkpointing_enable() does, whose name changes
        layer.gradient_checkpointing = True
    with pytest.raises(ValueError, match=r'gradient_checkpointing_disable\(\) .*activation_checkpoint\.mode = "full"'):
        plan(model)


def test_a_parameter_shared_by_hand_with_the_head_is_refused():
    """The twin of a class does not know what was done to one instance."""
    hf_model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 64}, num_hidden_layers=4))
    hf_model.model.layers[1].mlp.up_proj.weight = hf_model.lm_head.weight
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight and lm_head\.weight are one parameter"):
        plan(hf_model)
