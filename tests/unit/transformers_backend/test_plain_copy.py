"""Copies of a model that trains are plain Transformers models with weights of their own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parallelize.config import KERNELS, ActivationCheckpointConfig, CompileConfig, KernelConfig, ParallelismConfig
from parallelize.distributed import initialize, shutdown
from parallelize.float8 import Float8Linears, apply_float8, is_float8
from transformers_backend.model import HFTransformerModel
from transformers_backend.plain_copy import give_plain_copies, refuse_copies


def _saved(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def one_rank() -> Iterator[None]:
    initialize(torch.device("cpu"), timeout_seconds=60)
    yield
    shutdown()


def _trained(hf_model: LlamaForCausalLM) -> HFTransformerModel:
    return HFTransformerModel.wrap(hf_model)


def _changed(hf_model: LlamaForCausalLM) -> HFTransformerModel:
    """Everything that forwards are replaced by on one rank."""
    return HFTransformerModel.wrap(hf_model).parallelize(
        ParallelismConfig(), activation_checkpoint=ActivationCheckpointConfig("full"),
        compile=CompileConfig(enable=True, backend="eager"), kernels=KernelConfig(list(KERNELS)),
    )  # fmt: skip


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("prepare", [_trained, _changed])
@pytest.mark.parametrize("make_copy", [copy.deepcopy, _saved])
def test_a_copy_computes_with_its_own_weights(prepare: Callable, make_copy: Callable):
    model, reference = prepare(_llama()), _llama()
    input_ids = torch.randint(0, 120, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = model.forward_backward(input_ids, input_ids)
    found = make_copy(model.hf_model)

    assert not [name for name, module in found.named_modules() if "forward" in vars(module)]
    assert type(found) is LlamaForCausalLM
    assert found.lm_head.weight is found.model.embed_tokens.weight, "tied"
    assert {p.data_ptr() for p in found.parameters()}.isdisjoint(p.data_ptr() for p in model.hf_model.parameters())
    with torch.no_grad():
        for one in (found, reference):
            one.model.norm.weight *= 3
            one.model.layers[0].mlp.down_proj.weight += 0.1
        assert torch.equal(found(input_ids).logits, reference(input_ids).logits)
    again = HFTransformerModel.wrap(found).forward_backward(input_ids, input_ids)
    assert abs(again - loss) > 1e-3
    torch.testing.assert_close(model.forward_backward(input_ids, input_ids), loss)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("make_copy", [copy.deepcopy, _saved])
def test_a_copy_of_a_part_computes_with_its_own_weights(make_copy: Callable):
    model, hidden_states = _changed(_llama()), torch.randn(2, 3, 32)
    model.forward_backward(*[torch.ones(1, 5, dtype=torch.long)] * 2)
    body = make_copy(model.hf_model.model)
    mlp = make_copy(model.hf_model.model.layers[0].mlp)
    position_embeddings = body.rotary_emb(hidden_states, torch.arange(3)[None])
    with torch.no_grad():
        for parameter in (*body.parameters(), *mlp.parameters()):
            parameter.zero_()
        assert torch.equal(body.layers[0](hidden_states, position_embeddings=position_embeddings), hidden_states)
        assert not mlp(hidden_states).any()


def test_what_trains_already_is_not_changed_again():
    """The copy of a model that is wrapped twice would have the first one's loss, and the original's weights."""
    hf_model, batch = _llama(), [torch.ones(1, 5, dtype=torch.long)] * 2
    first, second = HFTransformerModel.wrap(hf_model), HFTransformerModel.wrap(hf_model)
    first.forward_backward(*batch)
    for train in (lambda: second.forward_backward(*batch), lambda: second.parallelize(ParallelismConfig())):
        with pytest.raises(ValueError, match="LlamaForCausalLM: an HFTransformerModel has changed this model already"):
            train()
    first.forward_backward(*batch)
    HFTransformerModel.wrap(copy.deepcopy(hf_model)).forward_backward(*batch)


@pytest.mark.usefixtures("one_rank")
def test_what_failed_half_way_is_not_changed_again(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("no such file")

    model = HFTransformerModel.wrap(_llama())
    with pytest.raises(ValueError, match="tensor_parallel_degree = 3"):  # nothing is changed yet
        model.parallelize(ParallelismConfig(tensor_parallel_degree=3))
    monkeypatch.setattr(HFTransformerModel, "_fill", fail)
    with pytest.raises(OSError, match="no such file"):
        model.parallelize(ParallelismConfig())
    with pytest.raises(ValueError, match="or an error left it half-way"):
        model.parallelize(ParallelismConfig())
    with pytest.raises(ValueError, match="An error left this model half-way parallelised"):
        model.forward_backward(*[torch.ones(1, 5, dtype=torch.long)] * 2)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, _saved])
def test_the_wrapper_of_a_model_that_trains_is_not_copied(make_copy: Callable):
    model = HFTransformerModel.wrap(_llama())
    make_copy(model)
    model.forward_backward(*[torch.ones(1, 5, dtype=torch.long)] * 2)
    with pytest.raises(ValueError, match=r"HFTransformerModel that trains cannot be copied or pickled.* its hf_mode"):
        make_copy(model)


def test_a_forward_that_the_model_came_with_comes_along():
    hf_model = _llama()
    hf_model.model.norm.forward = torch.tanh
    model = _trained(hf_model)
    model.forward_backward(*[torch.ones(1, 5, dtype=torch.long)] * 2)
    assert copy.deepcopy(hf_model).model.norm.forward is torch.tanh


@pytest.mark.parametrize("make_copy", [copy.deepcopy, _saved])
def test_what_ranks_have_parts_of_is_not_copied(make_copy: Callable):
    hf_model = _llama()
    refuse_copies(hf_model)
    for part in (hf_model, hf_model.model.layers[0]):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM: parallelised over several .* Use save_pretrained"):
            make_copy(part)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, _saved])
@pytest.mark.usefixtures("torchao")
def test_a_copy_of_linears_in_float8_has_plain_ones(make_copy: Callable):
    hf_model, plain = _llama(), _llama()
    apply_float8(hf_model, Float8Linears(frozenset({"model.layers.0.mlp.up_proj"}), "rowwise", emulate=True))
    give_plain_copies(hf_model, {})
    copied = make_copy(hf_model)
    assert is_float8(hf_model.model.layers[0].mlp.up_proj)
    assert str(copied) == str(plain)
    input_ids = torch.arange(8)[None]
    assert torch.equal(copied(input_ids=input_ids).logits, plain(input_ids=input_ids).logits)
    with torch.no_grad():
        hf_model.model.layers[0].mlp.up_proj.weight.zero_()
    assert copied.model.layers[0].mlp.up_proj.weight.abs().sum() > 0
