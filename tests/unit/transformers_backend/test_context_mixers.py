"""Which modules mix tokens, and the shapes and hooks of those that run on the whole sequence."""

from __future__ import annotations

import pytest
import torch

from transformers_backend.context import summarize
from transformers_backend.context_mixers import find_mixers
from transformers_backend.decoder import describe_decoder
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.proof import example_batch
from transformers_backend.twin import build_twin


@pytest.mark.parametrize(
    ("model_type", "overrides", "expected"),
    [
        ("bloom", {}, {"self_attention"}),
        ("gptj", {}, {"attn"}),
        ("mpt", {}, {"attn"}),
        ("xlstm", {}, {"mlstm_layer"}),
        ("llama", {}, {"self_attn"}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, {"conv", "self_attn"}),
    ],
)
def test_the_modules_that_mix_tokens_are_found_in_every_layer(model_type, overrides, expected):
    twin = build_twin(*HFTransformerModelArgs(model_type=model_type, config_overrides=overrides).resolve())
    decoder = describe_decoder(twin)
    found = find_mixers(twin, decoder, example_batch()[0])
    assert len(found) == len(decoder.layers)
    assert [name.rpartition(".")[0] for name in found] == list(decoder.layers)
    assert {name.rpartition(".")[2] for name in found} == expected


def test_a_layer_that_mixes_in_its_own_forward_is_itself_found():
    twin = build_twin(*HFTransformerModelArgs(model_type="llama").resolve())
    decoder = describe_decoder(twin)
    first, *_others = (twin.get_submodule(name) for name in decoder.layers)
    plain_forward = first.mlp.forward
    first.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)  # mixes nothing
    first.forward = lambda hidden_states, **_: plain_forward(hidden_states.cumsum(1))
    assert find_mixers(twin, decoder, example_batch()[0])[0] == decoder.layers[0]


def test_a_model_that_mixes_nowhere_has_no_mixers():
    twin = build_twin(*HFTransformerModelArgs(model_type="llama").resolve())
    decoder = describe_decoder(twin)
    for name in decoder.layers:
        twin.get_submodule(name).self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    assert find_mixers(twin, decoder, example_batch()[0]) == ()


def test_names_are_summarized_by_layer():
    names = ["model.layers.0.conv", "model.layers.1.self_attn", "model.layers.12.conv"]
    assert summarize(names) == "model.layers.*.conv (2), model.layers.*.self_attn (1)"


def test_finding_changes_nothing():
    twin = build_twin(*HFTransformerModelArgs(model_type="bloom").resolve())
    input_ids = example_batch()[0]
    before = twin(input_ids=input_ids).logits
    find_mixers(twin, describe_decoder(twin), input_ids)
    assert torch.equal(twin(input_ids=input_ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
