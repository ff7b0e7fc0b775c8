"""Which modules get a kernel: found by what they compute, refused where anything else shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as glm4_rotary
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nanochat.modeling_nanochat import apply_rotary_pos_emb as nanochat_rotary

from parallelize.config import KERNELS
from parallelize.kernels.replace import GatedActivationKernel, NormKernel, apply_kernels
from parallelize.kernels.rotary import RotaryForm
from transformers_backend.kernel_gates import find_gate_kernel
from transformers_backend.kernel_norms import find_norm_kernel
from transformers_backend.kernel_plan import KernelPlan, find_kernels, wrong_on_device
from transformers_backend.kernel_rotary import find_rotary_form
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.twin import build_twin

MLP = "model.layers.0.mlp"
ATTENTION = "model.layers.0.self_attn"
IDS = torch.arange(8).view(2, 4)


def twin_of(model_type: str, **sizes: int) -> PreTrainedModel:
    return build_twin(*HFTransformerModelArgs(model_type=model_type).resolve(), **sizes)


def plan_of(model: PreTrainedModel, *names: str) -> KernelPlan:
    return find_kernels(model, names or ("rms_norm", "gated_activation", "rotary"))


class Gated(nn.Module):
    """A gated MLP, in which a subclass changes one thing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.product(x))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.gate(x)) * self.up(x)


def test_a_gated_module_by_its_children():
    assert find_gate_kernel(Gated(), 8) == GatedActivationKernel(
        "silu", ("gate", "up"), "gate up", ("down",), skipped="act"
    )


def changed(name: str, **methods) -> nn.Module:
    module = type(name, (Gated,), methods)()
    if name == "another activation":
        module.act = nn.Mish()
    if name == "a buffer":
        module.register_buffer("factor", torch.ones(1))
    return module


OTHERS = {
    "another activation": {},
    "adds": {"forward": lambda self, x: self.down(self.product(x)) + 0.5},
    "adds its input": {"forward": lambda self, x: self.down(self.product(x)) + x},
    "scales": {"product": lambda self, x: Gated.product(self, x) * 1.001},
    "clamps": {"product": lambda self, x: Gated.product(self, x).clamp(max=30.0)},
    "clamps far off": {"product": lambda self, x: self.act(self.gate(x).clamp(max=1000.0)) * self.up(x)},
    "another evaluation": {"forward": lambda self, x: self.down(self.product(x)) * (1.0 if self.training else 0.5)},
    "a buffer": {"product": lambda self, x: Gated.product(self, x) * self.factor},
    "computes in fp32": {"product": lambda self, x: Gated.product(self, x.float()).to(x.dtype)},
    "rounds once": {"product": lambda self, x: (F.silu(self.gate(x).float()) * self.up(x).float()).to(x.dtype)},
    "dropout of its own": {"product": lambda self, x: F.dropout(Gated.product(self, x), p=0.0, training=True)},
    "a child twice": {"forward": lambda self, x: self.down(self.down(self.product(x)))},
    "a weight without its child": {"product": lambda self, x: self.act(F.linear(x, self.gate.weight)) * self.up(x)},
    "no gradient": {"product": lambda self, x: self.act(self.gate(x)) * self.up(x).detach()},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_module_that_does_anything_else_has_no_kernel(name: str):
    assert isinstance(find_gate_kernel(changed(name, **OTHERS[name]), 8), str)


@pytest.mark.parametrize(
    ("model_type", "module", "expected"),
    [
        ("llama", MLP, GatedActivationKernel("silu", ("gate_proj", "up_proj"), "gate up", ("down_proj",), "act_fn")),
        ("phi3", MLP, GatedActivationKernel("silu", ("gate_up_proj",), "gate up", ("down_proj",), "activation_fn")),
        ("arcee", MLP, GatedActivationKernel("relu2", ("up_proj",), "gate", ("down_proj",), "act_fn")),
        ("bitnet", MLP, GatedActivationKernel("relu2", ("gate_proj", "up_proj"), "gate up",
                                              ("ffn_sub_norm", "down_proj"), "act_fn")),
        ("lfm2", "model.layers.0.feed_forward",
         GatedActivationKernel("silu", ("w1", "w3"), "gate up", ("w2",), None)),
        ("modernbert-decoder", "model.layers.0.mlp",
         GatedActivationKernel("gelu", ("Wi",), "gate up", ("drop", "Wo"), "act")),
        ("gemma2", MLP, GatedActivationKernel("gelu_tanh", ("gate_proj", "up_proj"), "gate up", ("down_proj",),
                                              "act_fn")),
        ("gpt_neox", "gpt_neox.layers.0.mlp", None),
        ("starcoder2", "model.layers.0.mlp", None),  # has a dropout of its own, whose probability the twin sets to 0
    ],
)  # fmt: skip
def test_models_have_their_gates_replaced(model_type: str, module: str, expected: GatedActivationKernel | None):
    assert plan_of(twin_of(model_type), "gated_activation").kernels.get(module) == expected


def test_only_gates_without_sparsity_are_replaced():
    """gemma3n has layers that keep the largest activations only."""
    model = twin_of("gemma3n_text")
    kernels = plan_of(model, "gated_activation").kernels
    for name, module in model.named_modules():
        if type(module).__name__ == "Gemma3nTextMLP":
            assert (name in kernels) == (module.activation_sparsity == 0.0)


def test_modules_that_are_not_what_the_small_copy_has_stay():
    model = twin_of("llama", minimum_layers=5).eval()  # as `from_pretrained` returns models
    layers = model.model.layers
    layers[0].mlp.act_fn = nn.GELU()
    layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    layers[2].mlp.forward = lambda x: x
    layers[3].self_attn.forward = lambda *_: None
    layers[4].mlp.gate_proj.register_forward_hook(lambda *_: None)  # still called, and so is its hook
    plan = plan_of(model, "gated_activation", "rotary")
    assert {name for name in plan.kernels if name.endswith("mlp")} == {f"model.layers.{i}.mlp" for i in (3, 4)}
    assert {name for name in plan.kernels if name.endswith("attn")} == {
        f"model.layers.{i}.self_attn" for i in (0, 1, 2, 4)
    }
    assert plan.kinds["LlamaMLP", "is of a kind that its small copy lacks"] == 1
    assert plan.kinds["LlamaMLP", "has hooks, or a forward that is not its class's"] == 2


def test_hooks_and_wrapped_children_of_a_replaced_module_still_run():
    model = twin_of("llama")
    calls = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        child = model.get_submodule(f"{MLP}.{name}")
        child.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
    apply_kernels(model, plan_of(model, "gated_activation").kernels)
    model(input_ids=IDS, use_cache=False)
    assert calls == ["gate_proj", "up_proj", "down_proj"]


class AddingNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 0.5


class NormOfTheOtherDtype(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype))


class NormInTraining(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * (1.0 if self.training else 0.5)


class NormWithGate(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * gate)


def test_norms_by_what_they_compute():
    assert find_norm_kernel(LlamaRMSNorm(24, eps=1e-5)) == NormKernel(1e-5, 0.0, rounds_first=True, has_weight=True)
    for kind in (AddingNorm, NormOfTheOtherDtype, NormInTraining, NormWithGate):
        assert find_norm_kernel(kind(24)) is None, kind
    assert find_norm_kernel(nn.LayerNorm(24, bias=False)) is None


def test_norms_that_users_froze_patched_or_watch():
    model = twin_of("llama").requires_grad_(False)
    first, second = model.model.layers[0].input_layernorm, model.model.layers[1].input_layernorm
    first.forward = lambda x: 2 * x
    second.register_forward_hook(lambda module, args, out: 2 * out)  # runs after the kernel
    plan = plan_of(model, "rms_norm")
    assert len(plan.kernels) == 4
    assert "model.layers.0.input_layernorm" not in plan.kernels
    assert plan.kinds["LlamaRMSNorm", "has a forward that is not its class's"] == 1
    x = torch.randn(2, model.config.hidden_size)
    expected = second(x)
    apply_kernels(model, plan.kernels)
    torch.testing.assert_close(second(x), expected)
    assert torch.equal(first(x), 2 * x)


def turned_the_other_way(q, k, cos, sin, unsqueeze_dim=1):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)


def rotates_queries_only(q, k, cos, sin, unsqueeze_dim=1):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)[0], k


def with_another_argument(q, k, cos, sin, scale=1.0):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


def test_rotary_functions_by_what_they_compute():
    for function, form, is_partial in (
        (modeling_llama.apply_rotary_pos_emb, RotaryForm(), False),
        (cohere_rotary, RotaryForm(interleaved=True, wide=True, casts_back=True), False),
        (glm4_rotary, RotaryForm(interleaved=True, repeats=True), True),
    ):
        kernel = find_rotary_form("rotate", function)
        assert (kernel.form, kernel.is_partial) == (form, is_partial)
    for function in (turned_the_other_way, rotates_queries_only, with_another_argument, nanochat_rotary):
        assert find_rotary_form("rotate", function) is None


@pytest.mark.parametrize("model_type", ["llama", "phi3", "glm4", "cohere", "bitnet"])
def test_a_model_with_kernels_computes_the_same(model_type: str):
    plain, model = twin_of(model_type), twin_of(model_type)
    plan = plan_of(model)
    assert {kernel.kernel for kernel in plan.kernels.values()} >= {"gated_activation", "rotary"}
    names = [name for name, _ in model.named_parameters()]
    apply_kernels(model, plan.kernels)
    losses = [one(input_ids=IDS, labels=IDS, use_cache=False).loss for one in (plain, model)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    wanted, found = (
        torch.autograd.grad(loss, list(one.parameters())) for loss, one in zip(losses, (plain, model), strict=True)
    )
    for a, b in zip(wanted, found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    assert [name for name, _ in model.named_parameters()] == names


def test_the_models_file_is_left_alone():
    function = modeling_llama.apply_rotary_pos_emb
    model = twin_of("llama")
    apply_kernels(model, plan_of(model).kernels)
    assert modeling_llama.apply_rotary_pos_emb is function
    assert modeling_llama.LlamaAttention.forward.__globals__ is vars(modeling_llama)
    rotated = model.get_submodule(ATTENTION).forward.__func__.__globals__["apply_rotary_pos_emb"]
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    cos, sin = torch.randn(2, 2, 5, 8).unbind()
    torch.testing.assert_close(rotated(q, k, cos, sin, unsqueeze_dim=2), function(q, k, cos, sin, unsqueeze_dim=2))
    one_place = function(q, k, cos[:, :1], sin[:, :1], unsqueeze_dim=2)  # one row of a table for all tokens
    torch.testing.assert_close(rotated(q, k, cos[:, :1], sin[:, :1], unsqueeze_dim=2), one_place)
    learned = cos.clone().requires_grad_()  # the kernel has no gradient for tables: the model's own function runs
    torch.autograd.grad(rotated(q.transpose(1, 2), k.transpose(1, 2), learned, sin)[0].sum(), learned)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler looks
def test_identical_layers_are_compiled_once_and_whole():
    model = twin_of("phi3", repeat=3, minimum_layers=3)
    plain = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    apply_kernels(model, plan_of(model).kernels)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
    torch._dynamo.reset()
    for _ in range(2):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(loss, plain)
    called = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert called >= {f"parallelize.{name}.default" for name in ("rms_norm", "packed_gated_activation", "rotary")}


def test_kernels_have_names_that_can_be_enabled():
    kernels = plan_of(twin_of("llama")).kernels.values()
    assert {kernel.kernel for kernel in kernels} <= set(KERNELS)


def test_a_kernel_is_tried_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch):
    model, device = twin_of("llama"), torch.device("cpu")
    assert wrong_on_device(model, ["rms_norm"], device, torch.bfloat16) == {}

    def apply_wrong(twin: PreTrainedModel, kernels: dict) -> None:
        for name in kernels:
            norm = twin.get_submodule(name)
            norm.forward = lambda x, forward=norm.forward: 1.01 * forward(x)

    monkeypatch.setattr("transformers_backend.kernel_plan.apply_kernels", apply_wrong)
    (reason,) = wrong_on_device(model, ["rms_norm"], device, torch.float32).values()
    assert "in torch.float32 the gradient of" in reason

    def fail(*arguments) -> None:
        raise RuntimeError("no such instruction")

    def apply_failing(twin: PreTrainedModel, kernels: dict) -> None:
        for name in kernels:
            twin.get_submodule(name).forward = fail

    monkeypatch.setattr("transformers_backend.kernel_plan.apply_kernels", apply_failing)
    assert wrong_on_device(model, ["rms_norm"], device, torch.float32) == {
        "rms_norm": "RuntimeError: no such instruction"
    }
