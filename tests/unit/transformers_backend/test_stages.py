"""Stages of a model on ranks that share nothing: loss and every gradient against plain Transformers, and what is left.

Weights that a rank does not hold are NaN here, so that a stage which reads one all the same does not pass.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.staged import StagedModel, weights_not_held
from transformers_backend.decoder import describe_decoder
from transformers_backend.proof import difference, example_batch, gradients
from transformers_backend.stage_proof import TallTwin
from transformers_backend.stages import LocalStages, StageSplit, replace_parameters, restore_parameters
from transformers_backend.twin import build_twin
from transformers_backend.verify import DENSE_MODEL_TYPES

LOOP, V_SHAPED = [[0, 2], [1, 3]], [[0, 3], [1, 2]]


def build(model_type: str, layers: int = 4) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type]()
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], minimum_layers=layers)


def plain_run(model_type: str, layers: int = 4) -> tuple[float, dict[str, torch.Tensor]]:
    twin = build(model_type, layers)
    input_ids, labels = example_batch()
    loss = twin(input_ids=input_ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.item(), gradients(twin)


def prove(model_type: str, begins: list[int] | None = None, layers: int = 4) -> StageSplit:
    """The split of a model type's twin whose later stages begin at these layers; None: two like halves."""
    twin = build(model_type, layers)
    tall = TallTwin(twin.config, type(twin), None)
    facts, names = tall.look_at_layers(), tall.decoder.layers
    if begins is None:
        allowed = [cut for cut in range(1, len(names)) if cut not in facts.forbidden_cuts]
        begins = [min(allowed, key=lambda cut: abs(2 * cut - len(names)))]
    ends = [*begins, len(names)]
    return tall.prove_stages([names[begin:end] for begin, end in zip([0, *begins], ends, strict=True)], facts)


# --- the promise


@pytest.mark.parametrize("model_type", [name for name in DENSE_MODEL_TYPES if name != "hrm_text"])
def test_every_dense_type_in_two_stages_is_plain_transformers(model_type: str):
    split = prove(model_type)
    staged = StagedModel(lambda: build(model_type), split, [[0], [1]])
    loss = staged.forward_backward(*example_batch())
    assert difference(plain_run(model_type), (loss, staged.gradients())) is None

    plain = build(model_type)
    names = {name for name, _ in plain.named_parameters()}
    held = [{name for name, _ in model.named_parameters()} for model in staged.models]
    assert held[0] | held[1] == {name for name in names if split.stages_of(name)}, "Transformers' own names"
    assert names - (held[0] | held[1]) <= _without_gradient(model_type), "only what has no use is nowhere"
    for stage, names_here in enumerate(held):
        assert names_here == {name for name in names if stage in split.stages_of(name)}


def _without_gradient(model_type: str) -> set[str]:
    return {name for name, _ in build(model_type).named_parameters()} - plain_run(model_type)[1].keys()


@pytest.mark.parametrize("stages_of_ranks", [LOOP, V_SHAPED, [[0], [1], [2], [3]], [[0, 1, 2, 3]]])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj", "openai-gpt", "ctrl", "gemma3_text", "bloom"])
def test_several_stages_a_rank_and_several_micro_batches(model_type: str, stages_of_ranks: list[list[int]]):
    split = prove(model_type, [1, 2, 3])
    staged = StagedModel(lambda: build(model_type), split, stages_of_ranks)
    loss = staged.forward_backward(*example_batch(), micro_batches=2)
    assert difference(plain_run(model_type), (loss, staged.gradients())) is None


class InPlaceLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states.add_(0.25), *args, **kwargs)


class ChangesItsInput(LlamaForCausalLM):
    """A model whose layers shift their input in place."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__ = InPlaceLayer


def test_layers_that_change_their_input_in_place():
    """What was received belongs to torch's schedule, and is a leaf, which autograd lets nobody change."""
    config = LlamaConfig(num_hidden_layers=4)

    def build_it() -> PreTrainedModel:
        return build_twin(config, ChangesItsInput, minimum_layers=4)

    (input_ids, labels), plain = example_batch(), build_it()
    loss = plain(input_ids=input_ids, labels=labels, use_cache=False).loss
    loss.backward()
    tall = TallTwin(config, ChangesItsInput, None)
    names = tall.decoder.layers
    staged = StagedModel(build_it, tall.prove_stages([names[:2], names[2:]], tall.look_at_layers()), [[0], [1]])
    ours = staged.forward_backward(input_ids, labels, micro_batches=2)
    assert difference((loss.item(), gradients(plain)), (ours, staged.gradients())) is None


def test_shared_keys_and_values_of_gemma3n_stay_within_a_stage():
    """Its last layers use what earlier ones computed; cut before those, in uneven parts, it is exact."""
    split = prove("gemma3n_text", [1, 2])
    staged = StagedModel(lambda: build("gemma3n_text"), split, [[0, 2], [1]])
    loss = staged.forward_backward(*example_batch(), micro_batches=2)
    assert difference(plain_run("gemma3n_text"), (loss, staged.gradients())) is None


def test_what_a_gradient_is_added_to_stays():
    staged = StagedModel(lambda: build("qwen3"), prove("qwen3"), [[0], [1]])
    staged.forward_backward(*example_batch())
    once = staged.gradients()
    staged.forward_backward(*example_batch())
    for name, gradient in staged.gradients().items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-5, atol=1e-8, msg=name)


# --- stand-ins


def stages_of(
    model_type: str, local: list[int], split: StageSplit | None = None
) -> tuple[PreTrainedModel, LocalStages]:
    twin = build(model_type)
    return twin, LocalStages(twin, describe_decoder(twin), split or prove(model_type), local)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gptj", "openai-gpt", "lfm2", "xlstm"])
def test_stand_ins_are_layers_without_weights(model_type: str):
    twin, stages = stages_of(model_type, [0])
    decoder, before = describe_decoder(twin), build(model_type)
    stages.drop_the_rest()
    assert stages.layers == list(stages.split.stages[0])
    layer_list = twin.get_submodule(decoder.layer_lists[0])
    assert isinstance(layer_list, nn.ModuleList)
    assert len(layer_list) == len(decoder.layers), "a layer keeps its number"
    for name in stages.split.stages[1]:
        stand_in, layer = twin.get_submodule(name), before.get_submodule(name)
        assert type(stand_in) is type(layer)
        assert list(stand_in.parameters()) == []
        assert list(stand_in.buffers()) == []
        for (path, module), (plain_path, plain) in zip(stand_in.named_modules(), layer.named_modules(), strict=True):
            assert path == plain_path
            assert type(module) is type(plain)
            assert plain_attributes(module) == plain_attributes(plain)
            assert vars(module).keys() - {"forward"} == vars(plain).keys()
    for name in stages.split.stages[0]:
        assert twin.get_submodule(name).state_dict().keys() == before.get_submodule(name).state_dict().keys()
        assert list(twin.get_submodule(name).parameters()) != []


def plain_attributes(module: nn.Module) -> dict:
    """What a model may read from a layer beside its modules and tensors (`attention_type`, `layer_idx`, `training`)."""
    return {
        name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str, tuple, list))
    }


@pytest.mark.parametrize(
    ("model_type", "container"), [("llama", None), ("gptj", (tuple, 2)), ("openai-gpt", (list, 1))]
)
def test_a_stand_in_returns_hidden_states_as_its_layer_does(model_type: str, container: tuple[type, int] | None):
    twin, stages = stages_of(model_type, [0])
    name = stages.split.stages[1][0]
    assert stages.split.containers[name] == container
    stages.drop_the_rest()
    hidden_states = torch.randn(2, 3, 64)
    output = twin.get_submodule(name)(hidden_states, attention_mask=None)
    if container is None:
        assert output is hidden_states
        return
    kind, length = container
    assert type(output) is kind
    assert len(output) == length
    assert output[0] is hidden_states
    assert all(value is None for value in output[1:])


def test_stand_ins_leave_hooks_and_the_real_layers_alone():
    twin = build("llama")
    calls = []
    for layer in twin.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
        layer.register_full_backward_hook(lambda *_: calls.append(1))
    stages = LocalStages(twin, describe_decoder(twin), prove("llama"), [0])
    expected = copy.deepcopy(twin.state_dict())
    stages.drop_the_rest()
    twin.model.layers[3](torch.randn(1, 2, 64, requires_grad=True)).sum().backward()
    assert calls == []
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_rank_knows_its_layers_and_whether_they_hand_on():
    split = prove("llama", [1, 2, 3])
    _, first = stages_of("llama", [0, 2], split)
    _, second = stages_of("llama", [3, 1], split)
    assert first.layers == ["model.layers.0", "model.layers.2"]
    assert second.layers == ["model.layers.1", "model.layers.3"]
    assert (first.has_last, second.has_last) == (False, True)
    assert [(stack.layers, stack.is_handed_on) for stack in second.stacks] == [
        (("model.layers.1",), True), (("model.layers.3",), False),
    ]  # fmt: skip


# --- weights beside the layers


def test_weights_that_are_not_held_have_no_memory_and_are_no_parameters():
    twin, stages = stages_of("phi", [0])
    shape = twin.lm_head.weight.shape
    stages.drop_the_rest()
    stages.place_stand_ins(torch.device("cpu"), torch.bfloat16)
    assert {id(module): name for module, name in weights_not_held(twin)}.keys() == {
        id(twin.lm_head), id(twin.model.final_layernorm)
    }  # fmt: skip
    for module, name in weights_not_held(twin):
        tensor = getattr(module, name)
        assert type(tensor) is torch.Tensor
        assert tensor.untyped_storage().nbytes() == torch.bfloat16.itemsize
        assert tensor.count_nonzero() == 0
    assert twin.lm_head.weight.shape == shape
    assert not any(name.startswith(("lm_head", "model.final")) for name in twin.state_dict())
    assert not any(name.startswith(("lm_head", "model.final")) for name, _ in twin.named_parameters())


def test_a_tied_weight_is_replaced_and_restored_at_both_of_its_places():
    twin = build("gpt2")
    names, weight = list(twin.state_dict()), twin.lm_head.weight
    replaced = replace_parameters(twin, ["transformer.wte.weight"], value=3.0)
    assert len(replaced) == 2
    for module in (twin.transformer.wte, twin.lm_head):
        assert (module.weight == 3.0).all()
        assert module.weight.shape == weight.shape
        assert module.weight.untyped_storage().nbytes() == weight.itemsize
    assert not {"transformer.wte.weight", "lm_head.weight"} & twin.state_dict().keys()
    assert twin.transformer.wpe.weight.requires_grad, "others are left alone"
    restore_parameters(replaced)
    assert twin.lm_head.weight is twin.transformer.wte.weight is weight
    assert sorted(twin.state_dict()) == sorted(names)


def test_the_tied_embedding_is_held_by_the_first_and_the_last_of_three_stages():
    split = prove("qwen2", [1, 3]), prove("gpt2", [1, 3])
    assert split[0].stages_of("model.embed_tokens.weight") == (0,)
    assert split[1].stages_of("transformer.wte.weight") == (0, 2)
    assert split[1].stages_of("transformer.h.1.attn.c_attn.weight") == (1,)


def test_numbers_of_layers_are_not_confused():
    """model.layers.1 is no prefix of model.layers.10's parameters."""
    split = StageSplit((("model.layers.1",), ("model.layers.10",)), (frozenset(), frozenset()), {})
    assert split.stages_of("model.layers.10.mlp.up_proj.weight") == (1,)


# --- calls


def test_a_call_by_itself_is_refused_in_words():
    _, stages = stages_of("llama", [0])
    stages.drop_the_rest()
    stages.install()
    with pytest.raises(ValueError, match="LlamaForCausalLM: with pipeline_parallel_degree > 1") as caught:
        stages._model(input_ids=torch.ones(1, 4, dtype=torch.long))
    for remedy in ("forward_backward", "evaluate", "save_pretrained"):
        assert remedy in str(caught.value)


@pytest.mark.parametrize("local", [[0], [1]])
@pytest.mark.parametrize("model_type", ["llama", "gemma3n_text", "gptj"])
def test_the_shape_of_what_travels_is_found_without_any_layer(model_type: str, local: list[int]):
    twin, stages = stages_of(model_type, local)
    layer = twin.get_submodule(stages.layers[0])
    stages.drop_the_rest()
    stages.place_stand_ins(torch.device("cpu"), torch.float32)
    ran = []
    layer.register_forward_hook(lambda *_: ran.append(1))
    stages.install()
    like = stages.hidden_states_like(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert ran == []
    assert like.shape == ((4, 2, 5, 64) if model_type == "gemma3n_text" else (2, 5, 64))
    assert like.dtype == torch.float32
    assert not like.requires_grad
    assert twin.get_submodule(stages.layers[0]) is layer, "the layers are back in their places"


def test_hooks_get_what_the_layers_get_and_give():
    """Registered last, on the layers at both sides of a cut; also what they change is sent on."""
    plain, split, (input_ids, labels) = build("llama"), prove("llama"), example_batch()
    expected, found = [], []
    staged = StagedModel(lambda: build("llama"), split, [[0], [1]])
    for seen, models in ((expected, [plain, plain]), (found, staged.models)):
        last, first = (models[stage].get_submodule(split.stages[stage][stage - 1]) for stage in (0, 1))
        last.register_forward_hook(lambda layer, args, output, seen=seen: seen.append(output.detach()) or 1.5 * output)
        first.register_forward_pre_hook(lambda layer, args, seen=seen: seen.append(args[0].detach()) or (args[0] + 1,))
    loss = plain(input_ids=input_ids, labels=labels, use_cache=False).loss
    loss.backward()
    ours = staged.forward_backward(input_ids, labels)
    assert len(found) == len(expected) == 2
    torch.testing.assert_close(found, expected)
    assert difference((loss.item(), gradients(plain)), (ours, staged.gradients())) is None


def test_layers_are_back_in_place_after_an_error():
    twin, stages = stages_of("llama", [0, 1])
    layers = list(twin.model.layers)
    stages.install()
    layers[0].register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        twin(stage=0, input_ids=torch.ones(1, 4, dtype=torch.long))
    assert list(twin.model.layers) == layers


def _fail(*_) -> None:
    raise RuntimeError("out of memory")
