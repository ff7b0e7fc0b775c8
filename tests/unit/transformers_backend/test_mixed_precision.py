"""Mixed precision on one data rank: what is cast where changes nothing but where gradients are added up in fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from parallelize.mixed_precision import parameters_cast_to
from transformers_backend.decoder import describe_decoder
from transformers_backend.loss import install_loss, shift_labels
from transformers_backend.model_args import find_model_class
from transformers_backend.proof import example_batch
from transformers_backend.twin import build_twin
from transformers_backend.verify.command import DENSE_MODEL_TYPES

# In bf16 their own code fails on a CPU, in plain Transformers, too.
NOT_IN_BF16 = ("openai-gpt", "xglm", "xlstm")


def _twin(model_type: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type]()
    return build_twin(config, find_model_class(config, model_type, False)).train()


def _loss(model: PreTrainedModel) -> torch.Tensor:
    input_ids, labels = example_batch()
    return model(input_ids=input_ids, targets=shift_labels(labels))


def _leaves_in_bf16(model: PreTrainedModel) -> None:
    """Every parameter as a leaf in bf16; tied ones stay tied, and buffers what they are."""
    leaves: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                leaf = nn.Parameter(parameter.detach().bfloat16(), parameter.requires_grad)
                module._parameters[name] = leaves.setdefault(id(parameter), leaf)


@pytest.mark.parametrize("model_type", [name for name in DENSE_MODEL_TYPES if name not in NOT_IN_BF16])
def test_the_loss_is_bit_equal_to_that_of_a_model_in_bf16(model_type: str):
    kept = _twin(model_type)
    cast = copy.deepcopy(kept)
    _leaves_in_bf16(cast)
    for model in (kept, cast):
        install_loss(model, describe_decoder(model), chunked=False)
    with parameters_cast_to(kept, torch.bfloat16):
        loss = _loss(kept)
        loss.backward()
    reference = _loss(cast)
    reference.backward()
    assert torch.equal(loss, reference)
    gradients = dict(cast.named_parameters())
    for name, parameter in kept.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.grad is None:
            assert gradients[name].grad is None, name
            continue
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - gradients[name].grad).norm() / parameter.grad.norm().clamp(min=1e-12)
        assert error < 1e-2, f"{name}: {error}"  # rows of an embedding are added up in fp32, there in bf16


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_gradients_of_the_head_are_not_rounded_once_they_are_summed(model_type: str):
    """Chunk by chunk they are bf16, as a matrix product returns them, and their sum is what the parameter gets."""
    model = _twin(model_type)
    decoder = describe_decoder(model)
    install_loss(model, decoder, chunked=True, chunk_elements=8 * model.get_submodule(decoder.head).weight.shape[0])
    with parameters_cast_to(model, torch.bfloat16):
        _loss(model).backward()
    grad = model.get_submodule(decoder.head).weight.grad
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.bfloat16().float())


def test_a_number_among_the_parameters_of_the_head():
    class ScaledHead(nn.Linear):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * self.logit_scale

    def run(dtype: torch.dtype | None) -> torch.Tensor:
        model = _twin("llama")
        model.lm_head.__class__ = ScaledHead
        model.lm_head.logit_scale = nn.Parameter(torch.tensor(2.0))
        install_loss(model, describe_decoder(model), chunked=True, chunk_elements=8 * len(model.lm_head.weight))
        with parameters_cast_to(model, dtype):
            _loss(model).backward()
        return model.lm_head.logit_scale.grad

    torch.testing.assert_close(run(torch.bfloat16), run(None), rtol=5e-2, atol=0)


def test_everything_is_as_it_was_afterwards():
    model = _twin("gemma2")
    parameters = dict(model.named_parameters())
    with pytest.raises(KeyError), parameters_cast_to(model, torch.bfloat16):
        raise KeyError
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())
    input_ids, _ = example_batch()
    assert model(input_ids=input_ids).logits.dtype == torch.float32
