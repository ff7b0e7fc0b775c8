"""Gradients of parameters that several pipeline ranks hold: what a block adds is summed, what was there stays.

The sum between ranks is a stand-in here, which adds what another rank would have; tests/distributed has the real one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallelize.pipeline_parallel import shared
from parallelize.pipeline_parallel.shared import sum_between, summed_gradients

OF_OTHER_RANK = 100.0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ranks of every sum over ranks."""
    ranks_of_calls = []

    def add(tensor: torch.Tensor, ranks: tuple[int, ...], group: None) -> None:
        ranks_of_calls.append(ranks)
        tensor += OF_OTHER_RANK

    monkeypatch.setattr(shared, "sum_between", add)
    return ranks_of_calls


def test_only_what_the_block_adds_is_summed_over_ranks(calls: list):
    weight = nn.Parameter(torch.ones(3))
    for block in range(1, 4):
        with summed_gradients({weight: (0, 2)}, None):
            (2 * weight).sum().backward()
        assert weight.grad.tolist() == [block * (2 + OF_OTHER_RANK)] * 3, "a sum that is there is not summed again"
    assert calls == [(0, 2)] * 3


def test_gradients_that_were_there_are_kept_in_their_place(calls: list):
    """An optimizer, or FSDP2, may hold on to the tensor."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = before = torch.tensor([5.0, 6.0])
    with summed_gradients({weight: (0, 1)}, None):
        weight.sum().backward()
    assert weight.grad is before
    assert before.tolist() == [106.0, 107.0]


def test_an_error_leaves_what_was_there(calls: list):
    weight, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    weight.grad = before = torch.tensor([5.0, 6.0])
    weight.register_post_accumulate_grad_hook(_fail)
    with pytest.raises(RuntimeError, match="out of memory"), summed_gradients({weight: (0, 1), new: (0, 1)}, None):
        (weight + new).sum().backward()
    assert weight.grad is before
    assert before.tolist() == [5.0, 6.0]
    assert new.grad is None
    assert calls == [], "other ranks may not come"


def _fail(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    raise RuntimeError("out of memory")


def test_a_rank_without_a_gradient_of_its_own_gets_that_of_the_others(calls: list):
    weight = nn.Parameter(torch.ones(2))
    with summed_gradients({weight: (0, 1)}, None):
        pass
    assert weight.grad.tolist() == [OF_OTHER_RANK] * 2


def test_other_parameters_are_left_alone(calls: list):
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with summed_gradients({weight: (0, 1)}, None):
        (weight + 3 * other).sum().backward()
    assert other.grad.tolist() == [3.0, 3.0]
    assert calls == [(0, 1)]


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_sum_of_one_rank_is_its_own(group: dist.ProcessGroup):
    tensor = torch.arange(6.0).reshape(2, 3).t()  # not contiguous
    sum_between(tensor, (0,), group)
    assert tensor.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
