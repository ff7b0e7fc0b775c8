"""What attention over shared sequences is told by a model: masks, dropout, softcaps and head sizes."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from parallelize.context_parallel.masks import CAUSAL, AttentionRule, MaskRule
from parallelize.context_parallel.operator import RingAddress, attention_operator
from transformers_backend.context_attention import ContextAttention, SharedMask, describe_mask
from transformers_backend.context_calls import choose_blocks_for, note_attention_calls, refuse_attention_dropout
from transformers_backend.model_args import HFTransformerModelArgs


def _chunked(size: int):
    return chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("length", [1, 2, 24, 128, 129, 1000, 4096])
def test_a_mask_is_described(length: int):
    assert describe_mask(causal_mask_function, length) == CAUSAL
    for size in {1, 2, 7, 24, 127, 128, 500, length - 1, length // 2, length // 3}:
        if not 0 < size < length:
            continue
        assert describe_mask(sliding_window_causal_mask_function(size), length) == MaskRule(window=size)
        # With chunks of one token, or of all but the last, a window of one may say the same.
        rule = describe_mask(_chunked(size), length)
        queries, keys = torch.arange(length)[:, None], torch.arange(length)
        assert torch.equal(rule.sees(queries, keys), MaskRule(chunk=size).sees(queries, keys))
    assert describe_mask(sliding_window_causal_mask_function(length), length) == CAUSAL


@pytest.mark.parametrize(
    "wrong",
    [
        and_masks(sliding_window_causal_mask_function(40), _chunked(100)),
        lambda batch, head, query, key: key <= query + 1,
        lambda batch, head, query, key: (key <= query) & (key != query - 3),
        lambda batch, head, query, key: (key <= query) & ((query - key < 16) | (key < 4)),  # with sinks
    ],
)
@pytest.mark.parametrize("length", [120, 2000, 131_072])
def test_another_mask_is_refused(wrong, length: int):
    with pytest.raises(ValueError, match="is no causal mask with a sliding window or chunks"):
        describe_mask(wrong, length)


def test_attention_is_told_all_that_the_model_says():
    """Softcap, sinks and scale of a call, and the mask's documents."""
    model = SimpleNamespace(set_attn_implementation=lambda name: None)
    attention = ContextAttention(model, "sdpa")
    query = torch.randn(1, 2, 4, 8)
    sinks, mask = torch.randn(2), SharedMask(CAUSAL, object(), torch.zeros(1, 8, dtype=torch.int32))
    patched = mock.patch("transformers_backend.context_attention.attention_operator", return_value=query)
    with patched as operator, attention.sharing(object()):
        out, _ = attention._attend(
            torch.nn.Module(), query, query, query, mask, scaling=0.25, softcap=30.0, s_aux=sinks
        )
    operator.assert_called_once_with(
        query, query, query, mask.address, AttentionRule(mask.rule, 0.25, 30.0), sinks=sinks, documents=mask.documents
    )
    assert torch.equal(out, query.transpose(1, 2))


@pytest.mark.parametrize("rule", [CAUSAL, MaskRule(window=4096), MaskRule(chunk=8192), MaskRule(chunk=3000)])
def test_a_long_mask_is_described_by_few_pairs(rule: MaskRule):
    asked = []

    def sees(batch, head, queries, keys):
        asked.append(queries.numel())
        return rule.sees(queries, keys)

    assert describe_mask(sees, 131_072) == rule
    assert 8192 < sum(asked) < 32_000, "by far less than its tokens, of which 5 ms are enough for no question"


def _model(model_type: str, **overrides):
    return HFTransformerModelArgs(model_type=model_type, config_overrides=overrides).resolve()


def test_attention_dropout_is_refused_by_its_name():
    config, model_class = _model("gpt2")
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0.1, 0.1, 0.1)
    with pytest.raises(ValueError, match="attention dropout") as refused:
        refuse_attention_dropout(config, model_class, 2)
    assert str(refused.value) == (
        "parallelism.context_parallel_degree = 2: attention dropout is not available where ranks share sequences, and "
        "GPT2LMHeadModel has attn_pdrop = 0.1. Set hf_transformers.config_overrides = { attn_pdrop = 0.0 }, or "
        "parallelism.context_parallel_degree = 1."
    )
    refuse_attention_dropout(*_model("gpt2", attn_pdrop=0.0), 2)  # others are for each token alone
    refuse_attention_dropout(*_model("llama"), 2)
    with pytest.raises(ValueError, match=r"has attention_dropout = 0\.25"):
        refuse_attention_dropout(*_model("llama", attention_dropout=0.25), 2)


@pytest.mark.parametrize(
    ("model_type", "overrides", "device", "dtype", "has_triton", "name", "said"),
    [
        (
            "llama",
            {},
            "cuda",
            torch.bfloat16,
            False,
            "torch's flash kernel for CUDA",
            "torch's flash kernel for CUDA (",
        ),
        ("gemma2", {}, "cuda", torch.bfloat16, False, "reference", "no softcap (50.0)"),
        ("gemma2", {}, "cuda", torch.bfloat16, True, "Triton kernel", "no softcap (50.0)"),
        ("deepseek_v3", {}, "cpu", torch.float32, True, "reference", "values are 128 wide and keys 192"),
        ("llama", {"head_dim": 20}, "cuda", torch.bfloat16, False, "reference", "do not take heads 20 wide"),
        ("llama", {}, "cuda", torch.float32, True, "reference", "CUDA's flash kernels do not take torch.float32"),
    ],
)
def test_what_computes_blocks_is_chosen_for_the_very_model(
    monkeypatch: pytest.MonkeyPatch, model_type: str, overrides: dict, device: str, dtype: torch.dtype,
    has_triton: bool, name: str, said: str,
):  # fmt: skip
    config, model_class = _model(model_type, **overrides)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("parallelize.context_parallel.kernels.launches_on", lambda device: has_triton)
    monkeypatch.setattr("transformers_backend.context_calls.why_not_blocks", lambda *_, **__: None)
    blocks, why = choose_blocks_for(config, model_class, 2, device, dtype)
    assert blocks.name == name
    assert said in why


def test_what_is_wrong_on_the_accelerator_is_not_chosen(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr("parallelize.context_parallel.kernels.launches_on", lambda device: True)
    monkeypatch.setattr("transformers_backend.context_calls.why_not_blocks", lambda *_, **__: "a window is wrong")
    blocks, why = choose_blocks_for(*_model("gemma2"), 2, "cuda", torch.bfloat16)
    assert blocks.name == "reference"
    assert why == "the reference in plain torch: Triton kernel is wrong on this device"
    assert "is wrong on this device (a window is wrong)" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "times", "name"),
    [
        ((), (2.0, 1.0), "cuDNN, Triton kernel for the rest"),
        ((), (1.0, 2.0), "torch's flash kernel for CUDA, Triton kernel for the rest"),
        (("cuDNN",), (2.0, 1.0), "torch's flash kernel for CUDA, Triton kernel for the rest"),
        (("torch's",), (1.0, 2.0), "cuDNN, Triton kernel for the rest"),
        (("cuDNN", "torch's"), (1.0, 2.0), "reference"),
    ],
)
def test_of_two_flash_kernels_the_faster_is_taken_that_is_right(
    monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, ...], times: tuple[float, float], name: str
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("parallelize.context_parallel.kernels.launches_on", lambda device: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    calls = "transformers_backend.context_calls"
    monkeypatch.setattr(f"{calls}.why_not_blocks", lambda one, *_, **__: "no" if one.name.startswith(wrong) else None)
    monkeypatch.setattr(f"{calls}.milliseconds_of_blocks", lambda one, *_: times[one.name.startswith("cuDNN")])
    blocks, why = choose_blocks_for(*_model("llama"), 2, "cuda", torch.bfloat16)
    assert blocks.name == name
    flash = f"torch's flash kernel for CUDA, Triton kernel for the rest {times[0]:.2f} ms"
    measured = f"(measured: {flash}, cuDNN, Triton kernel for the rest {times[1]:.2f} ms)"
    assert (measured in why) == (not wrong)


def test_softcaps_are_the_models_own():
    assert note_attention_calls(*_model("gemma2")).softcaps == (50.0,)
    assert note_attention_calls(*_model("llama")).softcaps == ()


def test_documents_stay_on_the_cpu_beside_tensors_of_an_accelerator():
    address = RingAddress("nobody", "ring", 64, 2, True, "reference")
    options = ("nobody", "ring", 64, 2, True, "reference", "", 1, True, None, None, 0.25, None)
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        query = torch.empty(2, 4, 32, 16, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.empty(2, 2, 32, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        documents = torch.zeros(2, 64, dtype=torch.int32)
        out = attention_operator(query, key, value, address, AttentionRule(), documents=documents)
        log_sum = torch.empty(2, 4, 32, device="cuda")
        gradients = torch.ops.parallelize.shared_attention_backward(
            out, query, key, value, None, documents, out, log_sum, *options
        )
    assert {tensor.device.type for tensor in (out, *gradients)} == {"cuda"}
    assert out.transpose(1, 2).is_contiguous(), "as models want it next"
