"""Which heads linear cross-entropy may compute the loss of, and that it then is the head's own loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)  # fmt: skip

from parallelize.config import KernelConfig
from transformers_backend.decoder import describe_decoder
from transformers_backend.head_kernel import find_linear_head
from transformers_backend.kernel_plan import enabled_kernels, find_kernels
from transformers_backend.loss import LinearHead
from transformers_backend.proof import difference, example_batch, loss_and_gradients
from transformers_backend.twin import build_twin

CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(), LinearHead(1.0, None)),
    "llama, tied": (LlamaForCausalLM, LlamaConfig(tie_word_embeddings=True), LinearHead(1.0, None)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(final_logit_softcapping=12.5), LinearHead(1.0, 12.5)),
    "granite": (GraniteForCausalLM, GraniteConfig(logits_scaling=13.0), LinearHead(1 / 13, None)),
    "phi": (PhiForCausalLM, PhiConfig(), LinearHead(1.0, None)),
    "cohere": (CohereForCausalLM, CohereConfig(logit_scale=0.3), LinearHead(0.3, None)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_heads_own(name: str):
    model_class, config, expected = CASES[name]
    found = find_linear_head(build_twin(config, model_class))
    assert isinstance(found, LinearHead)
    assert found.softcap == expected.softcap
    assert found.scale == pytest.approx(expected.scale, rel=1e-9)
    own, ours = (build_twin(config, model_class) for _ in range(2))
    batch = example_batch()
    without = loss_and_gradients(own, *batch, chunked=False)
    assert difference(without, loss_and_gradients(ours, *batch, chunked=False, linear_head=found)) is None
    # A call without targets still returns logits.
    torch.testing.assert_close(ours(input_ids=batch[0]).logits, own(input_ids=batch[0]).logits)


def test_the_scale_is_the_models_and_not_the_twins():
    config = MiniCPM3Config(
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=8,
        dim_model_base=32,
        num_hidden_layers=2,
        vocab_size=100,
    )
    with torch.device("meta"):
        model = MiniCPM3ForCausalLM(config)
    assert find_linear_head(model) == LinearHead(0.125, None)


def test_a_head_with_a_dense_layer_is_refused():
    model = build_twin(ModernBertDecoderConfig(), ModernBertDecoderForCausalLM)
    assert find_linear_head(model) == "the head has more than its matrix: lm_head.dense.weight, lm_head.norm.weight"


def test_other_heads_are_refused():
    class NoLinear(nn.Linear):
        def forward(self, hidden_states):
            return super().forward(hidden_states).sigmoid()

    class Bent(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.01 * output.logits.abs()
            return output

    model = build_twin(LlamaConfig(), LlamaForCausalLM)
    model.lm_head = NoLinear(64, 260, bias=False)
    assert find_linear_head(model) == "its NoLinear is no nn.Linear"
    model = build_twin(LlamaConfig(), LlamaForCausalLM)
    watched = model.lm_head.register_forward_hook(lambda module, args, logits: logits - logits.mean(-1, keepdim=True))
    assert find_linear_head(model) == "it has hooks, or a forward that is not its class's"
    watched.remove()
    model.lm_head.forward = lambda hidden_states: 2 * nn.Linear.forward(model.lm_head, hidden_states)
    assert find_linear_head(model) == "it has hooks, or a forward that is not its class's"
    assert "not those of one matrix product" in find_linear_head(build_twin(LlamaConfig(), Bent))


def test_only_by_name():
    model = build_twin(LlamaConfig(), LlamaForCausalLM)
    assert describe_decoder(model).head == "lm_head"
    plan = find_kernels(model, ["linear_cross_entropy"])
    assert plan.linear_head == LinearHead(1.0, None)
    assert plan.kinds["lm_head", "linear_cross_entropy"] == 1
    for device in ("cpu", "cuda"):
        names = enabled_kernels(KernelConfig(), torch.device(device), is_compiled=False)
        assert "linear_cross_entropy" not in names
    refused = find_kernels(
        build_twin(ModernBertDecoderConfig(), ModernBertDecoderForCausalLM), ["linear_cross_entropy"]
    )
    assert refused.linear_head is None
    assert any("more than its matrix" in reason for _, reason in refused.kinds)
