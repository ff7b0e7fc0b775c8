"""Compiled layers with a budget for what they keep: same values and gradients, fewer saved activations, one graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parallelize.compile import apply_compile
from parallelize.config import ActivationCheckpointConfig, CompileConfig, check, memory_budget_problems

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SIZE = 8


class _Layer(nn.Module):
    """A norm, attention and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(SIZE)
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False)
        self.gate_up, self.down = nn.Linear(SIZE, 8 * SIZE, bias=False), nn.Linear(4 * SIZE, SIZE, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm(hidden)).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-3, -2)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(-3, -2).flatten(-2)
        hidden = hidden + self.out(attended)
        gate, up = self.gate_up(self.norm(hidden)).chunk(2, -1)
        return hidden + self.down(F.silu(gate) * up)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def _run(memory_budget: float | None) -> tuple[int, list[torch.Tensor]]:
    """Bytes that the forward keeps, and the output and all gradients; memory_budget None: not compiled."""
    torch.manual_seed(0)
    layers = nn.ModuleList(_Layer() for _ in range(3))
    if memory_budget is not None:
        apply_compile(layers, backend="aot_eager", memory_budget=memory_budget)
    hidden = torch.randn(4, 32, SIZE, requires_grad=True)
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in layers:
            hidden = layer(hidden)
    hidden.square().mean().backward()
    return sum(kept.values()), [hidden.detach(), *(parameter.grad for parameter in layers.parameters())]


def test_less_is_kept_and_nothing_else_changes():
    _, expected = _run(None)
    sizes = []
    for budget in (1.0, 0.9, 0.5, 0.0):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        size, found = _run(budget)
        for tensor, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, reference, rtol=1e-5, atol=1e-7)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "layers do not share their graph"
        sizes.append(size)
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert sizes[3] < 0.4 * sizes[0]
    assert torch._functorch.config.activation_memory_budget == 1.0, "it holds for our layers only"


def test_it_needs_compiled_layers():
    budget = ActivationCheckpointConfig(mode="memory_budget", memory_budget=0.9)
    assert memory_budget_problems(CompileConfig(enable=True), budget) == []
    assert memory_budget_problems(CompileConfig(enable=False), ActivationCheckpointConfig()) == []
    for compile in (
        CompileConfig(),
        CompileConfig(enable=True, components=["loss"]),
        CompileConfig(enable=True, backend="eager"),
    ):
        with pytest.raises(ValueError, match=r'"memory_budget": the compiler keeps .* Set compile.enable = true'):
            check(memory_budget_problems(compile, budget))


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan"), "0.5", None])
def test_shares_are_from_0_to_1(budget: object):
    (problem,) = ActivationCheckpointConfig(memory_budget=budget).problems()
    assert problem.startswith(f"activation_checkpoint.memory_budget = {budget!r}: must be a number from 0 to 1")
