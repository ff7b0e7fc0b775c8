"""The compiler's search for exchanges to overlap finds those at the borders of a region."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch._inductor.fx_passes.micro_pipeline_tp import find_all_gather_patterns, find_reduce_scatter_patterns
from torch.distributed._symmetric_memory import is_symm_mem_enabled_for_group
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallelize.tensor_parallel.overlap import overlap_in_compiled_code
from parallelize.tensor_parallel.sequence import SequenceShards


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_region_has_the_patterns_that_are_fused(group: dist.ProcessGroup, backward: bool):
    sequence = SequenceShards(group)
    sequence._length = 8

    def region(shard: torch.Tensor, colwise: torch.Tensor, rowwise: torch.Tensor) -> torch.Tensor:
        output = sequence.leave_region(torch.relu(sequence.enter_region(shard) @ colwise) @ rowwise)
        return torch.autograd.grad(output.sum(), shard)[0] if backward else output

    shard = torch.randn(3, 4, 6, requires_grad=True)
    graph = make_fx(region, tracing_mode="fake")(shard, torch.randn(6, 5), torch.randn(5, 6)).graph
    graph.eliminate_dead_code()
    gathers, scatters = find_all_gather_patterns(graph), find_reduce_scatter_patterns(graph)
    # In the backward the exit gathers and the entry scatters; traced with the forward before it, both are in one graph.
    assert [gather.gather_dim for gather in gathers] == [1] * (1 + backward)
    assert [scatter.scatter_dim for scatter in scatters] == [1] * (1 + backward)


def test_the_compiler_is_told(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch):
    told = []
    monkeypatch.setattr("torch.distributed._symmetric_memory.enable_symm_mem_for_group", told.append)
    with torch._inductor.config.patch(_micro_pipeline_tp=False):  # pytest's own patch may leave it without the entry
        overlap_in_compiled_code(group)
        assert torch._inductor.config._micro_pipeline_tp
    assert told == [group.group_name]
    assert not is_symm_mem_enabled_for_group(group.group_name)  # that takes a CUDA device
