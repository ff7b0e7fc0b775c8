"""The description of a causal LM, against descriptions written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForMaskedLM, BertConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.twin import build_twin
from transformers_backend.verify import DENSE_MODEL_TYPES

EXPECTED = {
    "llama": Decoder(
        base="model",
        embedding="model.embed_tokens",
        layer_lists=("model.layers",),
        layers=("model.layers.0", "model.layers.1"),
        final_norm="model.norm",
        rotary="model.rotary_emb",
        head="lm_head",
        embedding_is_tied=False,
        accepts_position_ids=True,
    ),
    "gpt2": Decoder(
        base="transformer",
        embedding="transformer.wte",
        layer_lists=("transformer.h",),
        layers=("transformer.h.0", "transformer.h.1"),
        final_norm="transformer.ln_f",
        rotary=None,
        head="lm_head",
        embedding_is_tied=True,
        accepts_position_ids=True,
    ),
    "opt": Decoder(
        base="model.decoder",
        embedding="model.decoder.embed_tokens",
        layer_lists=("model.decoder.layers",),
        layers=("model.decoder.layers.0", "model.decoder.layers.1"),
        final_norm="model.decoder.final_layer_norm",
        rotary=None,
        head="lm_head",
        embedding_is_tied=True,
        accepts_position_ids=True,
    ),
    "gpt_neox": Decoder(
        base="gpt_neox",
        embedding="gpt_neox.embed_in",
        layer_lists=("gpt_neox.layers",),
        layers=("gpt_neox.layers.0", "gpt_neox.layers.1"),
        final_norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
        head="lm_head",
        embedding_is_tied=False,
        accepts_position_ids=True,
    ),
    "hrm_text": Decoder(
        base="model",
        embedding="model.embed_tokens",
        layer_lists=("model.L_module.layers", "model.H_module.layers"),
        layers=(
            "model.L_module.layers.0",
            "model.L_module.layers.1",
            "model.H_module.layers.0",
            "model.H_module.layers.1",
        ),
        final_norm=None,  # each of its two stacks has one
        rotary="model.rotary_emb",
        head="lm_head",
        embedding_is_tied=False,
        accepts_position_ids=True,
    ),
    "modernbert-decoder": Decoder(
        base="model",
        embedding="model.embeddings.tok_embeddings",
        layer_lists=("model.layers",),
        layers=("model.layers.0", "model.layers.1"),
        final_norm="model.final_norm",
        rotary="model.rotary_emb",
        head="decoder",
        embedding_is_tied=True,
        accepts_position_ids=True,
    ),
    "gemma3n_text": Decoder(
        base="model",
        embedding="model.embed_tokens",
        layer_lists=("model.layers",),
        layers=tuple(f"model.layers.{index}" for index in range(6)),
        final_norm="model.norm",
        rotary="model.rotary_emb",
        head="lm_head",
        embedding_is_tied=True,
        accepts_position_ids=True,
    ),
    "openai-gpt": Decoder(
        base="transformer",
        embedding="transformer.tokens_embed",
        layer_lists=("transformer.h",),
        layers=("transformer.h.0", "transformer.h.1"),
        final_norm=None,
        rotary=None,
        head="lm_head",
        embedding_is_tied=True,
        accepts_position_ids=True,
    ),
}
WITHOUT_POSITIONS = {"bloom", "mpt", "xlstm"}


def _twin(model_type: str):
    config = CONFIG_MAPPING[model_type]()
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


@pytest.mark.parametrize("model_type", EXPECTED)
def test_description(model_type: str):
    assert describe_decoder(_twin(model_type)) == EXPECTED[model_type]


def _tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_meta_models_are_described_alike():
    with torch.device("meta"):
        on_meta = _tiny_llama()
    assert describe_decoder(on_meta) == describe_decoder(_tiny_llama()) == EXPECTED["llama"]


@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_every_part_is_what_runs(model_type: str):
    """Names lead to modules that run in the order declared: embedding, layers, final norm, head."""
    twin = _twin(model_type)
    decoder = describe_decoder(twin)
    order: list[str] = []
    parts = [decoder.embedding, *decoder.layers, decoder.final_norm, decoder.head]
    for name in filter(None, parts):
        twin.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    input_ids = torch.arange(3, 23)[None]
    logits = twin(input_ids=input_ids, use_cache=False).logits
    assert order[0] == decoder.embedding
    assert order[-1] == decoder.head
    if decoder.final_norm is not None:
        assert order[-2] == decoder.final_norm, "the final norm runs right before the head"
    if len(decoder.layer_lists) == 1:
        assert [name for name in order if name in decoder.layers] == list(decoder.layers)
    assert set(decoder.layers) <= set(order)
    tied = twin.get_submodule(decoder.head).weight is twin.get_submodule(decoder.embedding).weight
    assert decoder.embedding_is_tied is tied is bool(twin.config.to_dict()["tie_word_embeddings"])
    assert decoder.accepts_position_ids is (model_type not in WITHOUT_POSITIONS)
    hidden_states = twin.get_submodule(decoder.base)(input_ids=input_ids, use_cache=False)[0]
    assert hidden_states.shape[:2] == logits.shape[:2]


def _tiny_bert() -> BertConfig:
    return BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel: no list of decoder layers below a head was found") as caught:
        describe_decoder(_tiny_llama().model)
    assert "AutoModelForCausalLM" in str(caught.value)
    with pytest.raises(ValueError, match=r"BertModel: .*AutoModelForCausalLM"):
        describe_decoder(AutoModel.from_config(_tiny_bert()))


def test_a_missing_embedding_or_head_is_named():
    model = _tiny_llama()
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="LlamaForCausalLM: the model declares no output head"):
        describe_decoder(model)
    model.get_input_embeddings = lambda: None
    with pytest.raises(ValueError, match="LlamaForCausalLM: the model declares no input embedding"):
        describe_decoder(model)


def test_an_encoder_is_described_so_that_the_proof_can_judge_it():
    decoder = describe_decoder(AutoModelForMaskedLM.from_config(_tiny_bert()))
    assert decoder.layer_lists == ("bert.encoder.layer",)


def test_untied_values_of_the_same_size_are_not_tied():
    model = _tiny_llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    assert describe_decoder(model).embedding_is_tied is False
    model.lm_head.weight = model.model.embed_tokens.weight
    assert describe_decoder(model).embedding_is_tied is True
