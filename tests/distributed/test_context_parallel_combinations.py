"""Shared sequences together with everything else, against plain Transformers.

The reference is the same model of Transformers in one process, on whole sequences, each document alone. A step of two
accumulated batches and one of a single batch are compared: losses, every gradient, norms and the weights afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from parallelize.config import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from parallelize.context_parallel.methods import METHODS
from parallelize.mixed_precision import parameters_cast_to
from parallelize.parallel_dims import ParallelDims
from tests.distributed.workers import Messages, WorkerPool
from transformers_backend import HFTransformerModel
from transformers_backend.proof import relative_errors

_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
          "vocab_size": 98, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
_LENGTH = 16
_DOCUMENTS = ((5, 1, 10), (16,), (9, 7), (2, 14))  # lengths in each row


@dataclass(frozen=True)
class Case:
    """What is put together. parallelism: fields of a ParallelismConfig."""

    parallelism: dict = field(default_factory=dict)
    packed: bool = False
    param_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    recompute: str = "none"
    """ "none", "full", or what selective_ac_option is."""
    compile: bool = False
    tied: bool = True
    tolerance: float = 1e-4

    @property
    def on_ring_alone(self) -> bool:
        return not self.parallelism

    @property
    def layers(self) -> int:
        """Four stages need four."""
        return 4 if "pipeline_parallel_degree" in self.parallelism else 2

    def __str__(self) -> str:
        named = ("packed", "cpu_offload", "compile", "tied")
        parallelism = " ".join(str(value) for value in self.parallelism.items())
        words = [parallelism, f"recompute {self.recompute}", *(name for name in named if getattr(self, name))]
        return " ".join([*words, *(["bfloat16"] if self.param_dtype else [])])


def _build(tied: bool = True, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))


@functools.cache
def _mesh(dims: ParallelDims) -> DeviceMesh:
    """In a worker, once: process groups take a while to start."""
    return dims.build_mesh("cpu")


def _batch(seed: int, data_ranks: int, packed: bool) -> dict[str, torch.Tensor]:
    """Four rows for each data rank; one has no target, and the others have unlike numbers."""
    tokens = torch.randint(2, 98, (4 * data_ranks, _LENGTH), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    batch["labels"][0] = -100
    batch["labels"][1, :6] = -100
    if packed:
        positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in _DOCUMENTS])
        batch["position_ids"] = positions.repeat(data_ranks, 1)
        batch["labels"][batch["position_ids"] == 0] = -100
    return batch


@functools.cache
def _compiler() -> str:
    """The backend "aot_eager" for sizes that are known: layers must not be compiled for sizes of any kind."""

    def compile_known_sizes(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        assert not any(isinstance(value, torch.SymInt) for value in inputs), "sizes are variables"
        return aot_eager(graph, inputs)

    torch._dynamo.register_backend(compile_known_sizes)
    return compile_known_sizes.__name__


def _parallelized(case: Case) -> HFTransformerModel:
    parallelism = ParallelismConfig(**{"context_parallel_degree": 2, **case.parallelism})
    if case.recompute in ("none", "full"):
        recompute = ActivationCheckpointConfig(mode=case.recompute)
    else:
        recompute = ActivationCheckpointConfig(mode="selective", selective_ac_option=case.recompute)
    compile = CompileConfig(enable=case.compile, components=["model"], backend=_compiler())
    torch._dynamo.reset()  # of the last case: where its degrees were other ones, they would be variables now
    # Compiling takes most of the time here, so that the twin is compiled on the ranks of the ring alone.
    with contextlib.ExitStack() as patches:
        for name in ("why_not_compile", *(() if case.on_ring_alone else ("ContextProof.why_not_compile",))):
            patches.enter_context(mock.patch(f"transformers_backend.decisions.{name}", return_value=None))
        model = HFTransformerModel.wrap(_build(case.tied, case.layers)).parallelize(
            parallelism,
            activation_checkpoint=recompute,
            compile=compile,
            param_dtype=case.param_dtype,
            cpu_offload=case.cpu_offload,
            mesh=_mesh(ParallelDims.resolve(parallelism, torch.distributed.get_world_size())),
        )
    if case.packed:
        assert model.isolate_documents().way == "shared attention"
    return model


def _plain_step(plain: PreTrainedModel, batches: list[dict], case: Case) -> torch.Tensor:
    """Gradients of all batches, a document at a time, and the loss."""
    targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        for row, (tokens, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            sizes = _DOCUMENTS[row % 4] if case.packed else (_LENGTH,)
            for part, wanted in zip(tokens.split(sizes), labels.split(sizes), strict=True):
                with parameters_cast_to(plain, case.param_dtype):
                    logits = plain(input_ids=part[None], use_cache=False).logits[0, :-1].float()
                    value = torch.nn.functional.cross_entropy(logits, wanted[1:], reduction="sum") / targets
                    value.backward()
                total += value.detach()
    return total


def _compare(case: Case) -> None:
    with Messages("transformers_backend.decisions") as messages:
        model = _parallelized(case)
    assert not messages.texts, "layers are compiled where that is asked for"
    plain, data_ranks = _build(case.tied, case.layers), model.dims.data_parallel_size
    counts = torch._dynamo.utils.counters
    counts.clear()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model.hf_model)]
    for step in range(2):
        batches = [_batch(2 * step + number, data_ranks, case.packed) for number in range(2 - step)]
        expected = _plain_step(plain, batches, case)
        own = [{name: t.chunk(data_ranks)[model.data_rank] for name, t in batch.items()} for batch in batches]
        targets = sum(model.count_targets(batch["labels"]) for batch in own)
        found = sum(model.forward_backward(**batch, num_items_in_batch=targets) for batch in own)
        assert counts["stats"]["unique_graphs"] == int(case.compile), "one for all layers, and none in the second step"
        assert not counts["graph_break"]
        torch.testing.assert_close(found, expected, rtol=case.tolerance, atol=0)
        gradients = {name: p.grad for name, p in plain.named_parameters()}
        with Messages("torch.distributed.tensor") as messages:
            errors = relative_errors(gradients, model.full_gradients())
        assert not messages.texts, "torch warns of gathers that it does one after the other, and nobody can act on it"
        worst = max(errors, key=errors.get)
        assert errors[worst] <= case.tolerance, f"step {step}: {worst} {errors[worst]:.1e}, all {errors}"
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        torch.testing.assert_close(model.clip_grad_norm_(0.5), norm, rtol=case.tolerance, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if case.compile and not case.on_ring_alone:
        return
    with torch.no_grad():
        expected = _plain_loss(plain, _batch(9, data_ranks, case.packed), case)
    own = {name: t.chunk(data_ranks)[model.data_rank] for name, t in _batch(9, data_ranks, case.packed).items()}
    found, targets = model.evaluate(**own)
    torch.testing.assert_close(found / targets, expected, rtol=case.tolerance, atol=0)


def _plain_loss(plain: PreTrainedModel, batch: dict, case: Case) -> torch.Tensor:
    with mock.patch.object(torch.Tensor, "backward"):
        return _plain_step(plain, [batch], case)


_SHARDED, _REPLICATED = {"data_parallel_shard_degree": 2}, {"data_parallel_replicate_degree": 2}
_TENSOR, _PIPELINE = {"tensor_parallel_degree": 2}, {"pipeline_parallel_degree": 2}
_TWO_LEVELS = {"context_parallel_degree": 4, "context_parallel_ulysses_degree": 2}
_ALLGATHER = {"context_parallel_method": "allgather", "context_parallel_layout": "contiguous"}
_ULYSSES = {"context_parallel_method": "ulysses"}
_BFLOAT16 = {"param_dtype": torch.bfloat16, "tolerance": 3e-2}


def _schedule(name: str) -> dict:
    return {**_PIPELINE, "pipeline_parallel_schedule": name}


ON_TWO = [
    Case(packed=True, recompute="full"),
    Case(recompute="2", tied=False),
    Case(compile=True, packed=True, recompute="op"),
    Case(cpu_offload=True, **_BFLOAT16),
    Case(_ALLGATHER, packed=True, recompute="op"),
    Case({**_ULYSSES, "context_parallel_layout": "contiguous"}, packed=True, recompute="op", compile=True),
]
ON_FOUR = [
    Case({"context_parallel_degree": 4}, packed=True),
    Case(_TWO_LEVELS, packed=True, recompute="op"),
    Case(_SHARDED, packed=True, recompute="op"),
    Case({**_REPLICATED, "data_parallel_shard_degree": 1}, **_BFLOAT16),
    Case(_TENSOR, packed=True, recompute="full"),
    Case(_TENSOR, compile=True),
    Case({**_ULYSSES, **_TENSOR, "sequence_parallel": "never"}, packed=True, tied=False),
    Case(_schedule("1F1B"), packed=True, recompute="full"),
    Case({**_ALLGATHER, **_schedule("ZBVZeroBubble")}, packed=True, tied=False),
    Case(_schedule("Interleaved1F1B"), packed=True, recompute="op", **_BFLOAT16),
]


@pytest.mark.parametrize("case", ON_TWO, ids=str)
def test_on_two_ranks(two: WorkerPool, case: Case):
    two.run(_compare, case)


@pytest.mark.parametrize("case", ON_FOUR, ids=str)
def test_on_four_ranks(four: WorkerPool, case: Case):
    four.run(_compare, case)


def _count_forwards(recompute: str) -> int:
    model = _parallelized(Case(recompute=recompute))
    calls = []
    ring = METHODS["ring"]
    counted = dataclasses.replace(ring, forward=lambda *a: calls.append(None) or ring.forward(*a))
    with mock.patch.dict(METHODS, ring=counted):
        batch = _batch(0, 1, packed=False)
        model.forward_backward(**batch)
    return len(calls)


def test_recomputation_by_operator_keeps_attention(two: WorkerPool):
    assert two.run(_count_forwards, "op") == [2, 2]
    assert two.run(_count_forwards, "full") == [4, 4], "which shows that the count would tell"


def _whole_sequences(attn_implementation: str) -> None:
    """Outside of training a model attends as it did before: what samples and generates gives it whole sequences."""
    plain = _build().eval()
    plain.set_attn_implementation(attn_implementation)
    model = _build()
    model.set_attn_implementation(attn_implementation)
    model = HFTransformerModel.wrap(model).parallelize(
        ParallelismConfig(context_parallel_degree=2),
        mesh=_mesh(ParallelDims(pp=1, dp_replicate=1, dp_shard=1, cp=2, tp=1)),
    )
    model.evaluate(**_batch(0, 1, packed=False))
    tokens = _batch(0, 1, packed=False)["input_ids"][:, :5]  # of a length that could not be shared
    model.hf_model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.hf_model(input_ids=tokens).logits, plain(input_ids=tokens).logits)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_whole_sequences_are_computed_as_ever(two: WorkerPool, attn_implementation: str):
    two.run(_whole_sequences, attn_implementation)


def _documents_refused() -> str:
    """Of a model whose layers ask for masks."""
    plain = LlamaDecoderLayer.forward

    def forward(self, hidden_states, **kwargs):
        config = self.self_attn.config
        mask = create_causal_mask(config, hidden_states, attention_mask=None, past_key_values=None)
        return plain(self, hidden_states, **{**kwargs, "attention_mask": mask})

    with mock.patch.object(LlamaDecoderLayer, "forward", forward):
        model = _parallelized(Case())
        with pytest.raises(ValueError, match="does not keep packed documents apart") as caught:
            model.isolate_documents()
    return str(caught.value)


def test_documents_of_a_model_whose_layers_make_masks_are_refused(two: WorkerPool):
    for message in two.run(_documents_refused):
        assert "LlamaDecoderLayer makes its attention mask itself" in message


def _unlike_batches_refused() -> None:
    model = _parallelized(Case())
    with pytest.raises(ValueError, match="differ between ranks of one context-parallel group of 2"):
        model.forward_backward(**_batch(torch.distributed.get_rank(), 1, packed=False))
    short = {name: tensor[:, :15] for name, tensor in _batch(0, 1, packed=False).items()}
    with pytest.raises(ValueError, match=r"The length of the sequences = 15: .* the nearest are 12 or 16"):
        model.evaluate(**short)


def test_batches_that_cannot_be_shared_are_refused(two: WorkerPool):
    two.run(_unlike_batches_refused)


def _devices_of_a_batch() -> dict[str, tuple[str, torch.dtype]]:
    """By name, of packed rows of which only the positions have not gone to an accelerator yet."""
    context = _parallelized(Case()).context
    batch = _batch(0, 1, packed=True)
    on_device = {"input_ids": batch["input_ids"].to("meta"), "targets": batch["labels"].to("meta")}
    with mock.patch("transformers_backend.context.check_vocabulary"):  # which looks at tokens
        shared = context.share({**on_device, "position_ids": batch["position_ids"]})
    return {name: (tensor.device.type, tensor.dtype) for name, tensor in shared.items()}


def test_documents_are_known_without_waiting_for_an_accelerator(two: WorkerPool):
    for found in two.run(_devices_of_a_batch):
        assert found.pop("documents") == ("cpu", torch.int32)
        assert found == dict.fromkeys(("input_ids", "targets", "position_ids", "latest"), ("meta", torch.int64))


def _dropout_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=16, n_head=2, n_layer=2))
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel has attn_pdrop = 0\.1\. Set hf_transformers\.config_overrides"
    ):
        HFTransformerModel.wrap(model).parallelize(ParallelismConfig(context_parallel_degree=2))


def test_attention_dropout_is_refused_at_once(two: WorkerPool):
    two.run(_dropout_refused)


def _heads_refused() -> None:
    sizes = {**_SIZES, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    for key, value in (("context_parallel_method", "ulysses"), ("context_parallel_ulysses_degree", 2)):
        with pytest.raises(ValueError, match=f"{key}.* = 2 must divide the attention heads of a rank, and they are 3"):
            HFTransformerModel.wrap(model).parallelize(ParallelismConfig(context_parallel_degree=2, **{key: value}))


def test_heads_that_cannot_be_shared_out_are_refused_at_once(two: WorkerPool):
    two.run(_heads_refused)


def _batches_refused() -> list[str]:
    """What is wrong in the part of one rank only is told on all."""
    model = _parallelized(Case())
    tokens = torch.arange(2 * _LENGTH).view(2, _LENGTH)
    tokens_without_row, label_without_row, no_label = tokens.clone(), tokens.clone(), tokens.clone()
    tokens_without_row[0, 7] = label_without_row[0, 7] = _SIZES["vocab_size"]  # which only rank 1 has
    no_label[0, 7] = -1
    odd = tokens[:, :-1]
    messages = []
    for input_ids, labels in (
        (tokens_without_row, tokens), (tokens, label_without_row), (tokens, no_label), (odd, odd)
    ):  # fmt: skip
        for call in (model.forward_backward, model.evaluate):
            with pytest.raises(ValueError, match=r"input_ids or labels have|length of the sequences") as caught:
                call(input_ids, labels)
        messages.append(str(caught.value))
    ignored = tokens.masked_fill(tokens % 3 == 0, -100)
    assert model.forward_backward(tokens, ignored).isfinite(), "the model is as good as before"
    return messages


def test_batches_that_cannot_be_computed_are_refused_on_every_rank(two: WorkerPool):
    for *without_row, odd in two.run(_batches_refused):
        assert all("must be from 0 to 97 (labels that are to be ignored -100)" in message for message in without_row)
        assert "= 15: context_parallel_degree = 2 cuts" in odd
        assert odd.endswith("Pad it at the end, with labels -100, or cut it.")


def _not_causal_refused() -> list[str]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    bert = BertLMHeadModel(BertConfig(**sizes, vocab_size=98))
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=98))
    messages = []
    for hf_model in (bert, t5):
        with pytest.raises(ValueError, match=type(hf_model).__name__) as caught:
            HFTransformerModel.wrap(hf_model).parallelize(ParallelismConfig(context_parallel_degree=2))
        messages.append(str(caught.value))
    return messages


def test_models_that_are_not_causal_are_refused_as_that(two: WorkerPool):
    for bert, t5 in two.run(_not_causal_refused):
        assert "predictions depend on later tokens" in bert
        assert "encoder-decoder models are not supported" in t5
