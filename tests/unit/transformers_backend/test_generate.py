"""The sample at the end of a run: what it continues, that seeds decide, and that it changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from transformers_backend.generate import sample_text
from transformers_backend.model import HFTransformerModel

CONFIG = LlamaConfig(
    vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, attention_dropout=0.5,
)  # fmt: skip


@pytest.fixture
def model() -> HFTransformerModel:
    torch.manual_seed(0)
    return HFTransformerModel.wrap(LlamaForCausalLM(CONFIG).train())


def _says(model: HFTransformerModel, text: str) -> None:
    """Make a model that says `text` after anything: each byte is followed by the next one of it."""
    hf_model = model.hf_model
    with torch.no_grad():
        for parameter in hf_model.model.layers.parameters():
            parameter.zero_()  # the residual stream is the embedding alone
        hf_model.model.embed_tokens.weight.zero_()
        hf_model.lm_head.weight.zero_()
        for place, (here, there) in enumerate(itertools.pairwise(text)):
            hf_model.model.embed_tokens.weight[ord(here) + 3, place] = 1.0
            hf_model.lm_head.weight[ord(there) + 3, place] = 100.0


def test_the_prompt_is_continued(model: HFTransformerModel):
    _says(model, "abcdefghij")
    assert sample_text(model, ByT5Tokenizer(), "abc", new_tokens=5) == "abcdefgh"
    assert sample_text(model, ByT5Tokenizer(), "d", new_tokens=1) == "de"


def test_it_ends_with_the_end_token(model: HFTransformerModel):
    _says(model, "abc")
    eos = ByT5Tokenizer().eos_token_id
    with torch.no_grad():
        model.hf_model.model.embed_tokens.weight[ord("c") + 3, 31] = 1.0
        model.hf_model.lm_head.weight[eos, 31] = 100.0
    assert sample_text(model, ByT5Tokenizer(), "a", new_tokens=20) == "abc"


def test_the_seed_decides_and_nothing_else_changes(model: HFTransformerModel):
    state, weights = torch.get_rng_state(), model.full_state_dict()
    model.hf_model.train()
    texts = [sample_text(model, ByT5Tokenizer(), "x", new_tokens=12, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state), "a resumed run must not depend on whether it sampled"
    assert model.hf_model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.full_state_dict().items())
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())


def test_temperature(model: HFTransformerModel):
    greedy = {sample_text(model, ByT5Tokenizer(), "x", new_tokens=8, seed=s, temperature=1e-4) for s in range(3)}
    assert len(greedy) == 1, "near zero the most likely token is always taken"
    logits = model.hf_model.eval()(input_ids=torch.tensor([[ord("x") + 3]])).logits[0, -1]
    first = int(logits.argmax())
    assert sample_text(model, ByT5Tokenizer(), "x", new_tokens=1, temperature=1e-4) == ByT5Tokenizer().decode(
        [ord("x") + 3, first]
    )
