"""Activation checkpointing: same values and gradients, fewer saved activations, what is recomputed and what is kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallelize.activation_checkpoint import apply_activation_checkpointing

MODES = [("none", "2"), ("full", "2"), ("selective", "1"), ("selective", "2"), ("selective", "op")]


class _Layer(nn.Module):
    """Attention and an MLP: six matrix products, one attention operator, one dropout."""

    def __init__(self, size: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)
        self.up, self.down = nn.Linear(size, 4 * size, bias=False), nn.Linear(4 * size, size, bias=False)
        self.dropout = dropout
        self.runs = 0

    def forward(self, hidden: torch.Tensor, *, scale: float = 1.0) -> tuple[torch.Tensor, str]:
        self.runs += 1
        heads = self.qkv(hidden).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-3, -2)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(-3, -2).flatten(-2)
        hidden = hidden + self.out(attended)
        hidden = hidden + self.down(F.gelu(F.dropout(self.up(hidden), self.dropout, training=True)))
        return scale * hidden, "not a tensor"


def _layers(count: int = 4, **options) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(_Layer(**options) for _ in range(count))


def _run(layers: nn.ModuleList) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    hidden = torch.randn(2, 5, 8)
    for layer in layers:
        hidden, text = layer(hidden, scale=1.5)
        assert text == "not a tensor"
    loss = hidden.square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in layers.parameters()]


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "option"), MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_values_and_gradients_stay(mode: str, option: str, dropout: float):
    expected_loss, expected = _run(_layers(dropout=dropout))
    layers = _layers(dropout=dropout)
    names = [name for name, _ in layers.named_parameters()]
    apply_activation_checkpointing(layers, mode=mode, selective_option=option, preserve_rng_state=True)
    assert [name for name, _ in layers.named_parameters()] == names
    loss, gradients = _run(layers)
    assert torch.equal(loss, expected_loss)
    for name, gradient, reference in zip(names, gradients, expected, strict=True):
        assert torch.equal(gradient, reference), name


def test_without_the_random_state_dropout_differs():
    """What preserve_rng_state = False costs, so that its default stays True."""
    _, expected = _run(_layers(dropout=0.5))
    layers = _layers(dropout=0.5)
    apply_activation_checkpointing(layers, mode="full", selective_option="2", preserve_rng_state=False)
    _, gradients = _run(layers)
    assert not all(torch.equal(gradient, reference) for gradient, reference in zip(gradients, expected, strict=True))


@pytest.mark.parametrize(
    ("mode", "option", "runs"),
    [("none", "2", [1, 1, 1, 1]), ("full", "2", [2, 2, 2, 2]), ("selective", "1", [2, 2, 2, 2]),
     ("selective", "2", [2, 1, 2, 1]), ("selective", "3", [2, 1, 1, 2]), ("selective", "op", [2, 2, 2, 2])],
)  # fmt: skip
def test_which_layers_run_again(mode: str, option: str, runs: list[int]):
    layers = _layers()
    apply_activation_checkpointing(layers, mode=mode, selective_option=option, preserve_rng_state=True)
    _run(layers)
    assert [layer.runs for layer in layers] == runs


def test_per_op_recomputes_every_second_product_and_no_attention():
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    product = torch.ops.aten.mm.default
    counts = {}
    for mode in ("none", "full", "selective"):
        layers = _layers(count=3)
        apply_activation_checkpointing(layers, mode=mode, selective_option="op", preserve_rng_state=True)
        with _Count() as counter:
            _run(layers)
        counts[mode] = counter.counts
    # A layer has 4 matrix products, and 2 for each in the backward, less the one for the first layer's input.
    assert counts["none"][product] == 3 * (4 + 8) - 1
    assert counts["full"][attention] == 2 * counts["none"][attention] == 6
    assert counts["selective"][attention] == 3
    # The backward needs the outputs of qkv, out and up again, and stops early there: down's is never recomputed.
    assert counts["full"][product] - counts["none"][product] == 3 * 3
    assert counts["selective"][product] - counts["none"][product] == 3


def test_saved_activations_shrink():
    saved = {}
    for mode, option in MODES:
        layers = _layers()
        apply_activation_checkpointing(layers, mode=mode, selective_option=option, preserve_rng_state=True)
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept=kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = torch.randn(2, 64, 8, requires_grad=True)
            for layer in layers:
                hidden, _ = layer(hidden)
        parameters = {p.untyped_storage().data_ptr() for p in layers.parameters()}
        saved[mode, option] = sum(size for pointer, size in kept.items() if pointer not in parameters)
    inputs = 4 * hidden.untyped_storage().nbytes()  # full checkpointing keeps one input a layer
    assert saved["full", "2"] == saved["selective", "1"] == inputs
    assert inputs < saved["selective", "2"] < 0.6 * saved["none", "2"]
