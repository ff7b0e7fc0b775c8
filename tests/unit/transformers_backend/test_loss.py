"""The one loss: in chunks, on full logits and as plain Transformers computes it, values and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from transformers_backend.decoder import describe_decoder
from transformers_backend.loss import build_head, count_targets, install_loss, shift_labels, sum_cross_entropy
from transformers_backend.proof import gradients
from transformers_backend.twin import VOCABULARY_SIZE, build_twin

# Softcap; logit scale; divided logits; tied; bias; bias and partial rotary; a dense layer and a norm before the head.
HEADS = ["gemma2", "cohere", "granite", "gpt2", "gptj", "phi", "modernbert-decoder", "minicpm3", "gemma3n_text"]
ROWS, SEQUENCE = 3, 17  # 51 tokens: no number of chunks that is tried divides it, but 1


def _twin(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type](**fields)
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], seed=seed, dtype=dtype)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(3, VOCABULARY_SIZE - 3, (ROWS, SEQUENCE), generator=generator)
    labels = input_ids.clone()
    labels[0, :9] = -100
    labels[1, 4] = -100
    return input_ids, labels


def _install(model: PreTrainedModel, chunks: int | None) -> PreTrainedModel:
    """None: the full logits; else as many chunks of the example batch's tokens."""
    chunk_elements = None if chunks is None else -(-ROWS * SEQUENCE * VOCABULARY_SIZE // chunks)
    install_loss(model, describe_decoder(model), chunked=chunks is not None, chunk_elements=chunk_elements)
    return model


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _ours(model: PreTrainedModel, labels: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    input_ids, default_labels = _batch()
    labels = default_labels if labels is None else labels
    loss = model(input_ids=input_ids, targets=shift_labels(labels)) / count_targets(labels)
    loss.backward()
    return loss.detach(), _gradients(model)


def _plain(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    input_ids, labels = _batch()
    loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), _gradients(model)


def _assert_same(value: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Every gradient, its error relative to the largest entry (and not to rounding in one that is zero anyway)."""
    assert value.keys() == reference.keys()
    largest = max(gradient.abs().max() for gradient in reference.values())
    for name, gradient in reference.items():
        scale = max(gradient.abs().max(), 1e-3 * largest)
        assert (value[name].float() - gradient.float()).abs().max() <= tolerance * scale, name


def test_labels_are_shifted_once():
    labels = torch.tensor([[1, 2, 3], [4, -100, 6]])
    assert shift_labels(labels).tolist() == [[2, 3, -100], [-100, 6, -100]]
    assert count_targets(labels).item() == 3
    assert count_targets(torch.full((2, 4), -100)).item() == 0
    assert shift_labels(torch.tensor([[7]])).tolist() == [[-100]], "a single token predicts nothing"


def test_sum_cross_entropy_is_in_fp32():
    logits = torch.randn(2, 3, 5).bfloat16()
    targets = torch.tensor([[1, -100, 4], [0, 2, -100]])
    expected = -sum(
        logits[i, j].float().log_softmax(-1)[targets[i, j]] for i in range(2) for j in range(3) if targets[i, j] >= 0
    )
    loss = sum_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("model_type", HEADS)
def test_chunked_full_and_plain_agree(model_type: str):
    expected_loss, expected = _plain(_twin(model_type))
    for chunks in (None, 1, 2, 7, ROWS * SEQUENCE):
        loss, gradients = _ours(_install(_twin(model_type), chunks))
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0, msg=f"{chunks} chunks")
        _assert_same(gradients, expected)


@pytest.mark.parametrize(("fields", "changes"), [({}, True), ({"final_logit_softcapping": None}, False)])
def test_the_softcap_is_really_there(fields: dict, changes: bool):
    """Guards the test above: with a cap of 30 small logits would not show its absence, so compare against none."""
    twin = _twin("gemma2", **fields)
    with torch.no_grad():
        twin.lm_head.weight.mul_(500)
    head = build_head(twin, describe_decoder(twin))
    hidden_states = torch.randn(1, 4, 64)
    logits = head.forward(inputs_embeds=hidden_states, use_cache=False).logits
    linear = F.linear(hidden_states, twin.lm_head.weight)
    assert linear.abs().max() > 100
    assert torch.allclose(logits, linear) is not changes
    torch.testing.assert_close(logits, 30 * torch.tanh(linear / 30) if changes else linear)


def test_the_head_shares_every_parameter_and_changes_nothing():
    twin = _twin("modernbert-decoder")
    before = {name: id(module) for name, module in twin.named_modules()}
    head = build_head(twin, describe_decoder(twin))
    names = {name for name, _ in head.named_parameters()}
    assert names == {"lm_head.dense.weight", "lm_head.norm.weight", "decoder.weight", "decoder.bias"}
    assert all(parameter is twin.get_parameter(name) for name, parameter in head.named_parameters())
    assert {name: id(module) for name, module in twin.named_modules()} == before


def test_opts_nested_body_is_replaced_without_touching_the_model():
    twin = _twin("opt")
    decoder = twin.model.decoder
    head = build_head(twin, describe_decoder(twin))
    assert twin.model.decoder is decoder
    assert {name for name, _ in head.named_parameters()} == {"lm_head.weight"}


def test_a_chunk_without_targets_and_a_batch_without_targets():
    input_ids, labels = _batch()
    labels[1] = -100  # the second of three chunks has none
    plain = _twin("qwen2")
    F.cross_entropy(
        plain(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    model = _install(_twin("qwen2"), 3)
    _, gradients = _ours(model, labels)
    _assert_same(gradients, _gradients(plain))

    for chunks in (None, 1, 3):
        model = _install(_twin("qwen2"), chunks)
        loss = model(input_ids=input_ids, targets=torch.full_like(input_ids, -100))
        loss.backward()
        assert loss.item() == 0.0
        assert all((gradient == 0).all() for gradient in _gradients(model).values()), "zero, and not nan"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", ["head", "body", "embedding", "all but one bias"])
def test_frozen_parts_get_no_gradient_and_the_rest_is_exact(frozen: str, tied: bool):
    def freeze(model: PreTrainedModel) -> PreTrainedModel:
        parts = {"head": model.lm_head, "body": model.model, "embedding": model.model.embed_tokens}
        parts["all but one bias"] = model
        parts[frozen].requires_grad_(False)
        if frozen == "body" and tied:
            model.lm_head.weight.requires_grad_(True)
        if frozen == "all but one bias":
            model.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
        return model

    expected_loss, expected = _plain(freeze(_twin("qwen2", tie_word_embeddings=tied)))
    assert 0 < len(expected) < len(list(_twin("qwen2", tie_word_embeddings=tied).parameters()))
    for chunks in (None, 5):
        loss, gradients = _ours(_install(freeze(_twin("qwen2", tie_word_embeddings=tied)), chunks))
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
        _assert_same(gradients, expected)


@pytest.mark.parametrize("chunks", [None, 1, 4])
def test_without_gradients(chunks: int | None):
    input_ids, labels = _batch()
    expected, _ = _plain(_twin("gemma2"))
    model = _install(_twin("gemma2"), chunks)
    with torch.no_grad():
        loss = model(input_ids=input_ids, targets=shift_labels(labels)) / count_targets(labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    model.requires_grad_(False)
    loss = model(input_ids=input_ids, targets=shift_labels(labels)) / count_targets(labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_bfloat16_parameters(model_type: str):
    """The bf16 chunked gradients are as near to fp32's as plain bf16 Transformers is: chunks add no rounding."""
    reference = _twin(model_type)
    low = {name: p.detach().bfloat16() for name, p in reference.named_parameters()}
    reference.load_state_dict(low, strict=False)
    reference_loss, exact = _plain(reference)

    def in_bfloat16() -> PreTrainedModel:
        model = _twin(model_type).bfloat16()
        model.load_state_dict(low, strict=False)
        return model

    plain_loss, plain = _plain(in_bfloat16())
    loss, gradients = _ours(_install(in_bfloat16(), 17))
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain_loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss, reference_loss, rtol=1e-2, atol=0)  # bf16 has 8 bits: 0.4 % a rounding
    for name, gradient in exact.items():
        error, plain_error = ((g[name].float() - gradient).norm() for g in (gradients, plain))
        assert error <= 1.25 * plain_error + 1e-3 * gradient.norm(), name


def test_head_gradients_of_many_chunks_are_summed_in_fp32():
    """Added up in bf16, the 51 one-token gradients of a row would lose most of the small ones."""
    model = _install(_twin("llama").bfloat16(), ROWS * SEQUENCE)
    _, chunked = _ours(model)
    _, full = _ours(_install(_twin("llama").bfloat16(), 1))
    difference = (chunked["lm_head.weight"].float() - full["lm_head.weight"].float()).norm()
    assert difference <= 2**-8 * full["lm_head.weight"].float().norm()


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.parametrize(("tied", "with_gradients"), [(True, True), (False, True), (True, False)])
def test_full_logits_never_exist(tied: bool, with_gradients: bool):
    vocabulary, batch, seq, chunks = 2048, 4, 64, 8
    config = CONFIG_MAPPING["llama"](
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    logits = batch * seq * vocabulary
    labels = torch.randint(0, vocabulary, (batch, seq))
    largest = {}
    for chunked in (True, False):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).requires_grad_(with_gradients)
        install_loss(model, describe_decoder(model), chunked=chunked, chunk_elements=logits // chunks)
        with _LargestTensor() as recorded:
            loss = model(input_ids=labels, targets=shift_labels(labels))
            if with_gradients:
                loss.backward()
        largest[chunked] = recorded.elements
    assert largest[False] == logits, "the full logits are what is saved"
    assert largest[True] == logits // chunks


def test_the_default_budget_bounds_a_chunk():
    """Without chunk_elements a CPU chunk has at most 2**24 logits: 16384 tokens of 2048 words fit in two chunks."""
    config = CONFIG_MAPPING["llama"](
        vocab_size=2048, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    install_loss(model, describe_decoder(model), chunked=True)
    input_ids = torch.zeros(128, 128, dtype=torch.int64)
    with _LargestTensor() as recorded, torch.no_grad():
        model(input_ids=input_ids, targets=shift_labels(input_ids))
    assert recorded.elements == 2**24


@pytest.mark.parametrize("chunks", [None, 1, 4])
def test_a_second_backward_raises(chunks: int | None):
    """The gradients of the chunks are scaled in place, so a second use must not go unnoticed."""
    input_ids, labels = _batch()
    model = _install(_twin("llama"), chunks)
    loss = model(input_ids=input_ids, targets=shift_labels(labels))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_retained_graph_runs_backward_again():
    """Zero-bubble schedules of a pipeline run it for the gradients of inputs, and then for those of weights."""
    input_ids, labels = _batch()
    model = _install(_twin("llama"), 4)
    loss = model(input_ids=input_ids, targets=shift_labels(labels)) / 10
    loss.backward(retain_graph=True)
    first = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, first[name]), name


@pytest.mark.parametrize("chunks", [None, 4])
def test_plain_calls_and_generation_stay(chunks: int | None):
    input_ids, labels = _batch()
    untouched, model = _twin("llama").eval(), _install(_twin("llama").eval(), chunks)
    expected = untouched(input_ids=input_ids, labels=labels)
    output = model(input_ids=input_ids, labels=labels)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert output.past_key_values.get_seq_length() == SEQUENCE
    assert torch.equal(model(input_ids).logits, expected.logits), "also by position"
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(input_ids)}
    assert torch.equal(model.generate(input_ids, **options), untouched.generate(input_ids, **options))


@pytest.mark.parametrize("chunks", [None, 1, 4])
def test_position_ids_reach_the_body(chunks: int | None):
    input_ids, labels = _batch()
    position_ids = torch.arange(SEQUENCE).remainder(6).expand(ROWS, -1)
    logits = _twin("gpt2")(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    model = _install(_twin("gpt2"), chunks)
    loss = model(input_ids=input_ids, position_ids=position_ids, targets=shift_labels(labels))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_compiled_chunks_agree():
    expected_loss, expected = _plain(_twin("gemma2"))
    model = _twin("gemma2")
    install_loss(
        model, describe_decoder(model), chunked=True, compile_backend="aot_eager", chunk_elements=20 * VOCABULARY_SIZE
    )
    loss, gradients = _ours(model)
    torch._dynamo.reset()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    _assert_same(gradients, expected)
