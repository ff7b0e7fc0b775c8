"""Documents that share a row: each gets the logits and gradients that it gets alone, or the proof says that not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from parallelize.activation_checkpoint import apply_activation_checkpointing
from parallelize.compile import apply_compile
from transformers_backend.attention import segment_attention, stand_in_for_flash
from transformers_backend.decoder import describe_decoder
from transformers_backend.isolation import (
    Isolation,
    document_mask,
    find_isolation,
    join_rows,
    packed_inputs,
    takes_joined_rows,
)
from transformers_backend.model import HFTransformerModel
from transformers_backend.twin import build_twin
from transformers_backend.verify import DENSE_MODEL_TYPES

LENGTHS = ((5, 12, 1, 2), (20,), (3, 17))  # of the documents in each row
# Where positions do not tell documents apart, with "eager": what does.
OTHER_WAYS = {
    **dict.fromkeys(("biogpt", "falcon", "mpt", "opt", "xglm"), "mask"),
    **dict.fromkeys(("bloom", "doge", "openai-gpt", "xlstm"), None),
}


def _twin(model_type: str, attn_implementation: str | None = None) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type]()
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], attn_implementation=attn_implementation)


def _packed_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels (-100 at each document's start) and positions, all (3, 20)."""
    input_ids = torch.randint(3, 250, (len(LENGTHS), 20), generator=torch.Generator().manual_seed(5))
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return input_ids, input_ids.masked_fill(position_ids == 0, -100), position_ids


def _documents(input_ids: torch.Tensor) -> list[torch.Tensor]:
    return [document for row, lengths in zip(input_ids, LENGTHS, strict=True) for document in row.split(lengths)]


def _alone(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all targets and its gradients, of plain Transformers with one document at a time."""
    documents = [document[None] for document in _documents(input_ids) if len(document) > 1]
    targets = sum(document.shape[1] - 1 for document in documents)
    total = 0.0
    for document in documents:
        loss = model(input_ids=document, labels=document, use_cache=False, num_items_in_batch=targets).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_packed_equals_alone(model: HFTransformerModel, reference: PreTrainedModel) -> None:
    input_ids, labels, position_ids = _packed_batch()
    expected_loss, expected = _alone(reference.train(), input_ids)
    loss = model.forward_backward(input_ids, labels, position_ids=position_ids)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    found = model.full_gradients()
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values()).item()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


# --- on every architecture


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_how_each_dense_type_keeps_documents_apart(model_type: str, attn_implementation: str):
    """What docs/PACKING.md says. Where a new Transformers knows more ways, write it again by its command."""
    config = CONFIG_MAPPING[model_type]()
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    found = find_isolation(config, model_class, attn_implementation)
    if attn_implementation == "sdpa" and not model_class._supports_sdpa:
        assert f"{model_class.__name__} does not run on packed documents (ValueError: " in found.reason
        return
    assert found.way == OTHER_WAYS.get(model_type, "positions"), found.reason
    assert (found.reason is None) == (found.way is not None)


def test_the_written_table_says_the_same():
    table = (Path(__file__).parents[3] / "docs" / "PACKING.md").read_text()
    cells = {
        model: [cell.strip(" *") for cell in rest.split("|")[:3]]
        for model, rest in re.findall(r"^\| ([\w-]+) \|(.*)\|$", table, re.MULTILINE)
        if model != "model"
    }
    assert {model: eager for model, (_, eager, _) in cells.items() if model != "---"} == {
        model: OTHER_WAYS.get(model, "positions") or "crosses" for model in DENSE_MODEL_TYPES
    }
    for attention, column in (("sdpa", 0), ("flash_attention_2", 2)):
        for model in ("llama", "opt", "doge"):
            config = CONFIG_MAPPING[model]()
            found = find_isolation(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], attention)
            assert cells[model][column] in (found.way or "crosses", "-"), (model, attention)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gemma3_text", "mistral", "olmo2", "phi3", "opt"])
def test_logits_loss_and_gradients_are_those_of_each_document_alone(model_type: str, attn_implementation: str):
    model = HFTransformerModel.wrap(_twin(model_type, attn_implementation))
    isolation = model.isolate_documents()
    assert isolation.way is not None
    reference = _twin(model_type, attn_implementation)
    input_ids, _, position_ids = _packed_batch()
    with torch.no_grad():
        inputs = packed_inputs(
            isolation.way, input_ids, position_ids, accepts_position_ids=True, dtype=torch.float32
        )  # fmt: skip
        packed = model.hf_model(**inputs, use_cache=False).logits
        alone = [reference(input_ids=document[None], use_cache=False).logits[0] for document in _documents(input_ids)]
    expected = torch.cat(alone)
    assert (packed.flatten(0, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()
    _assert_packed_equals_alone(model, reference)


@pytest.mark.parametrize("model_type", ["mpt", "falcon", "gpt_neo", "gemma2", "codegen"])
def test_packed_documents_train_as_alone_where_attention_is_eager_only(model_type: str):
    model = HFTransformerModel.wrap(_twin(model_type))
    assert model.isolate_documents().way is not None
    _assert_packed_equals_alone(model, _twin(model_type))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "opt"])
def test_flash_attention_gets_one_row_with_bounds(model_type: str):
    """With the stand-in for the kernels, which takes the same arguments: the model hands them on through all layers."""
    model = HFTransformerModel.wrap(_twin(model_type, stand_in_for_flash()))
    config = CONFIG_MAPPING[model_type]()
    model._isolation = find_isolation(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "flash_attention_2")
    assert model._isolation == Isolation("joined rows")
    _assert_packed_equals_alone(model, _twin(model_type, "eager"))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_layers_keep_documents_apart(mode: str):
    hf_model = _twin("llama")
    layers = [hf_model.get_submodule(name) for name in describe_decoder(hf_model).layers]
    apply_activation_checkpointing(layers, mode=mode, selective_option="op", preserve_rng_state=True)
    model = HFTransformerModel.wrap(hf_model)
    model.isolate_documents()
    _assert_packed_equals_alone(model, _twin("llama"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_compiled_layers_are_compiled_once_for_all_packings(model_type: str):
    torch._dynamo.reset()
    hf_model = _twin(model_type)
    apply_compile([hf_model.get_submodule(name) for name in describe_decoder(hf_model).layers], backend="aot_eager")
    model = HFTransformerModel.wrap(hf_model)
    model.isolate_documents()
    input_ids, labels, _ = _packed_batch()
    graphs = []
    for length in (3, 4, 5, 7, 10):
        position_ids = torch.arange(20).remainder(length).expand(3, -1)
        model.forward_backward(input_ids, labels, position_ids=position_ids)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, f"compiled again: {graphs}"
    hf_model.zero_grad()
    _assert_packed_equals_alone(model, _twin(model_type))
    torch._dynamo.reset()


# --- what does not stay apart is told


class IgnoresPositions(LlamaForCausalLM):
    """A model that takes positions and masks, and then attends to whatever is there."""

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


class LeaksInBackward(LlamaForCausalLM):
    """A model whose predictions are right, while later documents add to the gradients of earlier ones."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        leak = output.logits.cumsum(1)
        output.logits = output.logits + leak - leak.detach()
        return output


LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def test_a_leak_is_told_with_its_size():
    found = find_isolation(LLAMA, IgnoresPositions, "sdpa")
    assert found.way is None
    assert found.reason.startswith("IgnoresPositions mixes documents: logits of one change by ")
    assert found.reason.endswith("(relative) with what stands beside it")


def test_a_leak_of_gradients_only_is_told():
    found = find_isolation(LLAMA, LeaksInBackward, "sdpa")
    assert found.way is None
    assert "LeaksInBackward mixes documents: the gradient of " in found.reason


def test_a_model_that_cannot_isolate_trains_all_the_same():
    """Its positions are left out; the loss is that of one long row, without the targets at starts."""
    model = HFTransformerModel.wrap(_twin("bloom"))
    assert model.isolate_documents() == Isolation(None, "BloomForCausalLM takes no position_ids")
    input_ids, labels, position_ids = _packed_batch()
    expected = _twin("bloom")(input_ids=input_ids, labels=labels, use_cache=False).loss
    loss = model.forward_backward(input_ids, labels, position_ids=position_ids)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_positions_without_isolate_documents_mean_what_transformers_means():
    input_ids, labels, position_ids = _packed_batch()
    expected = _twin("opt")(input_ids=input_ids, labels=labels, position_ids=position_ids, use_cache=False).loss
    loss = HFTransformerModel.wrap(_twin("opt")).forward_backward(input_ids, labels, position_ids=position_ids)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


# --- the pieces


def test_rows_are_joined_with_the_bounds_of_documents():
    position_ids = torch.tensor([[0, 1, 2, 0, 1], [4, 5, 0, 0, 1]])  # the second row goes on with a document
    joined = join_rows(torch.arange(10).view(2, 5), position_ids)
    assert joined["input_ids"].tolist() == [list(range(10))]
    assert joined["position_ids"].tolist() == [[0, 1, 2, 0, 1, 4, 5, 0, 0, 1]]
    assert joined["cu_seq_lens_q"].dtype == torch.int32
    assert joined["cu_seq_lens_q"].tolist() == joined["cu_seq_lens_k"].tolist() == [0, 3, 5, 7, 8, 10]
    assert joined["max_length_q"] == joined["max_length_k"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_lets_each_token_see_its_document(dtype: torch.dtype):
    mask = document_mask(torch.tensor([[0, 1, 0, 1, 2]]), dtype)
    assert (mask.shape, mask.dtype) == ((1, 1, 5, 5), dtype)
    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert (mask[0, 0] == 0).int().tolist() == seen
    assert mask.to(torch.bfloat16).isfinite().all()


@pytest.mark.parametrize(
    ("name", "joined"),
    [("flash_attention_2", True), ("kernels-community/vllm-flash-attn3", True), ("sdpa", False), (None, False)],
)
def test_which_implementations_take_joined_rows(name: str | None, joined: bool):
    assert takes_joined_rows(name) is joined


@pytest.mark.parametrize("window", [None, 3])
def test_the_stand_in_is_attention_inside_segments(window: int | None):
    """Against torch's own attention with a mask; query heads share keys and values two by two."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    found, _ = segment_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=bounds
    )
    segment = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2])
    distance = torch.arange(9)[:, None] - torch.arange(9)[None, :]
    mask = (segment[:, None] == segment[None, :]) & (distance >= 0) & (distance < (window or 9))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_the_stand_in_takes_positions_of_a_single_row_for_bounds():
    """As the kernels' caller in Transformers does, for models that hand on positions only."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 6, 8, generator=generator) for _ in range(3))
    position_ids = torch.tensor([[0, 1, 0, 1, 2, 0]])
    one = [tensor[:1] for tensor in (query, key, value)]
    expected, _ = segment_attention(torch.nn.Module(), *one, None, cu_seq_lens_q=torch.tensor([0, 2, 5, 6]))
    found, _ = segment_attention(torch.nn.Module(), *one, None, position_ids=position_ids)
    assert torch.equal(found, expected)
    several, _ = segment_attention(torch.nn.Module(), query, key, value, None, position_ids=position_ids.expand(2, -1))
    assert not torch.allclose(several[:1], expected), "in several rows positions are ignored, silently"


def test_the_stand_in_has_soft_caps_and_sinks():
    """A cap of nearly nothing makes all scores equal; a huge sink takes nearly all attention."""
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    means, _ = segment_attention(torch.nn.Module(), query, key, value, None, softcap=1e-6)
    torch.testing.assert_close(means[0, -1], value[0].mean(1), rtol=1e-4, atol=1e-4)
    drained, _ = segment_attention(torch.nn.Module(), query, key, value, None, s_aux=torch.full((2,), 50.0))
    assert drained.abs().max() < 1e-6
    with pytest.raises(ValueError, match="Module makes a mask of its own, which flash kernels do not take"):
        segment_attention(torch.nn.Module(), query, key, value, torch.zeros(1, 1, 4, 4))
