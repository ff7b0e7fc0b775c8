"""Which linears of a model multiply in float8, and which models are refused."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from parallelize.config import ActivationCheckpointConfig, CompileConfig, Float8Config
from parallelize.float8 import Float8Linears, apply_float8
from parallelize.tensor_parallel.plan import Split, TensorPlan
from transformers_backend import float8_plan
from transformers_backend.float8_plan import Float8Plan, check_tokens, choose_float8, find_linears, find_roles, how_far
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.proof import example_batch
from transformers_backend.twin import build_twin

RECIPE = "float8, tensorwise"


def twin_of(model_type: str, **sizes: int) -> PreTrainedModel:
    return build_twin(*HFTransformerModelArgs(model_type=model_type).resolve(), **sizes)


def linears_of(model: PreTrainedModel, *exclude: str, tensor_plan: TensorPlan | None = None) -> Float8Plan:
    roles = find_roles(build_twin(model.config, type(model)))
    return find_linears(model, Float8Config(True, exclude=list(exclude)), roles, tensor_plan, emulate=True)


def choose(model: PreTrainedModel, compile: CompileConfig | None = None, **options) -> Float8Plan:
    return choose_float8(
        model, Float8Config(**{"enable": True, **options}), torch.device("cpu"), torch.bfloat16,
        attn_implementation=None, tensor_plan=None, compile=compile or CompileConfig(True, backend="aot_eager"),
        activation_checkpoint=ActivationCheckpointConfig("full"), emulate="torchao" not in options,
    )  # fmt: skip


def test_the_linears_of_layers():
    plan = linears_of(twin_of("llama"))
    assert plan.kinds == {
        **{(f"self_attn.{name}_proj", RECIPE): 2 for name in "qkvo"},
        **{(f"mlp.{name}_proj", RECIPE): 2 for name in ("gate", "up", "down")},
        ("lm_head", "the head"): 1,
    }
    assert len(plan.linears.names) == 14
    assert "model.layers.0.self_attn.q_proj" in plan.linears.names


def test_linears_that_a_user_excludes():
    plan = linears_of(twin_of("llama"), "self_attn", "layers.0.mlp.down")
    assert plan.kinds["self_attn.q_proj", "excluded"] == 2
    assert plan.kinds["mlp.down_proj", "excluded"] == plan.kinds["mlp.down_proj", RECIPE] == 1
    with pytest.raises(ValueError, match=r"float8.exclude has 'lm_head': no linear .* mlp.down_proj, mlp.gate_proj"):
        linears_of(twin_of("llama"), "lm_head")


def test_linears_that_are_not_what_they_seem():
    model = twin_of("llama")
    first, second = model.model.layers
    first.self_attn.q_proj.register_forward_hook(lambda *_: None)
    first.self_attn.k_proj.forward = first.self_attn.k_proj.forward
    first.mlp.up_proj.weight = first.mlp.gate_proj.weight
    second.mlp.down_proj = torch.nn.Linear(88, 64)
    kinds = linears_of(model).kinds
    assert kinds["self_attn.q_proj", "has hooks, or a forward that is not its class's"] == 1
    assert kinds["self_attn.k_proj", "has hooks, or a forward that is not its class's"] == 1
    assert kinds["mlp.up_proj", "shares its weights with another module"] == 1
    assert kinds["mlp.gate_proj", "shares its weights with another module"] == 1
    assert kinds["mlp.down_proj", "is 64 x 88, no multiples of 16"] == 1


def test_weights_that_other_code_reads():
    twin = twin_of("llama")
    attention = twin.model.layers[1].self_attn
    attention.register_forward_hook(lambda module, _, outputs: (outputs[0] + module.o_proj.weight.sum(), *outputs[1:]))
    twin.model.layers[0].mlp.forward = lambda x: x
    roles = find_roles(twin)
    assert roles["self_attn.o_proj"] == "other code reads its weights"
    assert roles["mlp.up_proj"] == "does not run"
    assert roles["self_attn.q_proj"] is None


def test_sizes_are_those_of_a_rank():
    splits = {"model.layers.0.self_attn.k_proj": Split("colwise"), "model.layers.0.mlp.down_proj": Split("rowwise")}
    kinds = linears_of(twin_of("llama"), tensor_plan=TensorPlan(8, splits, {})).kinds
    assert kinds["self_attn.k_proj", "is 8 x 64, no multiples of 16 on a rank"] == 1
    assert kinds["mlp.down_proj", "is 64 x 12, no multiples of 16 on a rank"] == 1


@pytest.mark.parametrize("model_type", ["gpt2", "falcon"])
def test_a_model_without_such_linears_is_refused(model_type: str):
    with pytest.raises(ValueError, match=r"has no linear that could multiply in float8 \(.*, not torch's Linear"):
        linears_of(twin_of(model_type))


def test_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(float8_plan, "torchao_version", lambda: None)
    with pytest.raises(ValueError, match=r'is not installed; pip install -e "\.\[float8\]"(.|\n)*this is a cpu'):
        choose_float8(
            twin_of("llama"), Float8Config(True), torch.device("cpu"), torch.bfloat16, attn_implementation=None,
            tensor_plan=None, compile=CompileConfig(), activation_checkpoint=ActivationCheckpointConfig(),
        )  # fmt: skip


def test_nothing_happens_without_the_key():
    assert choose(twin_of("llama"), enable=False) == Float8Plan()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.usefixtures("torchao")
def test_a_model_is_tried_as_it_will_run(recipe: str, caplog: pytest.LogCaptureFixture):
    """With recomputed and compiled layers."""
    assert choose(twin_of("llama"), recipe=recipe).kinds["mlp.up_proj", f"float8, {recipe}"] == 2
    assert [record for record in caplog.records if record.name.startswith("transformers_backend")] == []


@pytest.mark.usefixtures("torchao")
def test_it_is_slow_without_the_compiler(caplog: pytest.LogCaptureFixture):
    choose(twin_of("llama"), compile=CompileConfig(True, components=["loss"]))
    assert "without compiled layers is slower than bf16" in caplog.text


@pytest.mark.usefixtures("torchao")
def test_a_model_whose_gradients_become_others_is_refused():
    with pytest.raises(ValueError, match=r"Gemma4ForCausalLM in float8 .* twin \(the cosine .* must be 0.975 or more"):
        choose(twin_of("gemma4_text"), compile=CompileConfig())


def test_a_linear_that_fails_is_a_refusal(monkeypatch: pytest.MonkeyPatch):
    """As one does that a GPU has no instruction for."""

    def fail(*_):
        raise RuntimeError("_scaled_mm: only on other GPUs")

    def apply_failing(twin: PreTrainedModel, linears: Float8Linears) -> None:
        for name in linears.names:
            twin.get_submodule(name).forward = functools.partial(fail)

    monkeypatch.setattr(float8_plan, "apply_float8", apply_failing)
    with pytest.raises(ValueError, match=r"\(RuntimeError: _scaled_mm: only on other GPUs\)"):
        choose(twin_of("llama"), compile=CompileConfig())


def test_how_far_is_too_far():
    gradients = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    assert how_far((2.0, gradients), (2.01, gradients)) is None
    assert how_far((2.0, gradients), (2.03, gradients)) == "loss 2.0300 instead of 2.0000"
    assert "instead of" in how_far((2.0, gradients), (float("nan"), gradients))
    assert "is 0." in how_far((2.0, gradients), (2.0, {"a": gradients["a"].flip(0)}))
    assert "nan" in how_far((2.0, gradients), (2.0, {"a": gradients["a"] * float("nan")}))
    assert "1.50 times as long" in how_far((2.0, gradients), (2.0, {k: 1.5 * g for k, g in gradients.items()}))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler reads it
@pytest.mark.usefixtures("torchao")
def test_layers_share_one_compilation():
    model = twin_of("llama", repeat=3, minimum_layers=3)
    apply_float8(model, linears_of(model).linears)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
    input_ids, labels = example_batch()
    for _ in range(2):
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
    assert counter.frame_count == 1
    assert loss.isfinite()


def test_tokens_must_be_a_multiple():
    linears = Float8Linears(frozenset(), "rowwise")
    for arguments in (
        (7, None, 1),
        (48, linears, 1),
        (64, linears, 2),
        (7, Float8Linears(frozenset(), "rowwise_with_gw_hp"), 2),
    ):
        check_tokens(*arguments)
    with pytest.raises(ValueError, match=r"A micro-batch of 48 tokens: .* a multiple of 32.* Change training.seq_len"):
        check_tokens(48, linears, 2)
