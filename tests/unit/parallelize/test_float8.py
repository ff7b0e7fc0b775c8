"""Linears in float8: what is asked of a machine, what a linear's place gets, and how close it computes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from parallelize.config import Float8Config, ParallelismConfig, float8_problems
from parallelize.float8 import Float8Linears, apply_float8, is_float8, missing_for_float8, sizes_on_a_rank
from parallelize.tensor_parallel.plan import Segment, Split


def test_values_that_cannot_be():
    assert Float8Config().problems() == Float8Config(True, "rowwise", ["down_proj"]).problems() == []
    (found,) = Float8Config(recipe="rows").problems()
    assert found == 'float8.recipe = "rows": must be one of "tensorwise", "rowwise", "rowwise_with_gw_hp".'
    assert "part of every name" in Float8Config(exclude=["a", ""]).problems()[0]
    assert Float8Config(exclude="down_proj").exclude == ["down_proj"], "a string is one part, and no list of letters"


def test_nobody_has_tried_it_beside_asynchronous_tensor_parallelism():
    both = ParallelismConfig(tensor_parallel_degree=2, enable_async_tensor_parallel=True)
    assert "set one of them to false" in float8_problems(Float8Config(True), both)[0]
    assert float8_problems(Float8Config(False), both) == []
    assert float8_problems(Float8Config(True), ParallelismConfig(tensor_parallel_degree=2)) == []


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (("cuda", (9, 0), torch.bfloat16, "0.18.0"), []),
        (("cuda", (8, 9), torch.bfloat16, "0.19.0+git"), []),
        (("cuda", (12, 0), torch.bfloat16, "1.0"), []),
        (("cuda", (9, 0), torch.bfloat16, None), [r'is not installed; pip install -e "\.\[float8\]"']),
        (("cuda", (9, 0), torch.bfloat16, "0.9.0"), ["needs torchao >= 0.18, which is 0.9.0"]),
        (("cuda", (8, 0), torch.bfloat16, "0.18.0"), ["capability 8.9 or higher .* this is a GPU of 8.0; set it to"]),
        (("cuda", (9, 0), torch.float32, "0.18.0"), ['in float32: goes with bfloat16; set training.*= "bfloat16"']),
        (("cpu", None, torch.float32, None), ["torchao", "and this is a cpu"]),
    ],
)
def test_what_a_machine_lacks(machine: tuple, said: list[str]):
    found = missing_for_float8(*machine)
    assert len(found) == len(said)
    for sentence, pattern in zip(found, said, strict=True):
        assert sentence.startswith("float8.enable = true")
        assert re.search(pattern, sentence), sentence


def test_sizes_of_a_part():
    linear = nn.Linear(64, 96, device="meta")
    grouped = Split("colwise", (Segment(64, 4), Segment(16, 1), Segment(16, 1)))
    assert sizes_on_a_rank(linear, None, 1) == (64, 96)
    assert sizes_on_a_rank(linear, Split("replicate"), 2) == (64, 96)
    assert sizes_on_a_rank(linear, Split("rowwise"), 2) == (32, 96)
    assert sizes_on_a_rank(linear, Split("colwise"), 4) == (64, 24)
    assert sizes_on_a_rank(linear, grouped, 2) == (64, 32 + 16 + 16), "ranks share the one head of keys, and of values"


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def _run(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    found = {"y": y, "x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.usefixtures("torchao")
def test_the_product_is_close_and_no_parameter_changes(recipe: str, dtype: torch.dtype):
    model, x = _Pair().to(dtype).eval(), torch.randn(2, 24, 64, dtype=dtype)
    before, state = dict(model.named_parameters()), list(model.state_dict())
    plain = _run(model, x)
    apply_float8(model, Float8Linears(frozenset({"up", "down", "elsewhere"}), recipe, emulate=True))
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert list(model.state_dict()) == state
    assert is_float8(model.up)
    assert not any(module.training for module in model.modules())
    for name, value in _run(model, x).items():
        error = ((value - plain[name]).norm() / plain[name].norm()).item()
        assert 1e-3 < error < 0.12, f"{name}: {error:.1e} is neither float8 nor another computation"
        assert value.dtype == dtype


@pytest.mark.usefixtures("torchao")
def test_only_what_is_named_is_converted():
    model, x = _Pair(), torch.randn(16, 64)
    hidden = model.up(x)
    apply_float8(model, Float8Linears(frozenset({"down"}), "rowwise", emulate=True))
    assert type(model.up) is nn.Linear
    assert not is_float8(model.up)
    assert torch.equal(model.up(x), hidden)
