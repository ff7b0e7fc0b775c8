"""Attention over a sequence that processes share, by every method, against full attention in float64."""

from __future__ import annotations

import dataclasses
import functools
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from parallelize.context_parallel.blocks import ReferenceBlocks
from parallelize.context_parallel.exchange import RingCommunication, chunks_sent
from parallelize.context_parallel.flash import FlashBlocks
from parallelize.context_parallel.kernels import BLOCKS, CpuKernel
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.levels import Levels, levels_of
from parallelize.context_parallel.masks import CAUSAL, AttentionRule, MaskRule
from parallelize.context_parallel.methods import shared_attention
from parallelize.context_parallel.operator import RingAddress, attention_operator
from parallelize.context_parallel.ring import Ring
from parallelize.distributed import set_timeout
from parallelize.parallel_dims import ParallelDims
from tests.distributed.workers import WorkerPool
from tests.full_attention import CASES, Case, error, full_attention

CASES = {**CASES, "eight heads of four": Case(heads=8, key_heads=2, has_sinks=True)}
METHODS = ("ring", "allgather", "ulysses", "ring x ulysses")


@pytest.fixture(scope="module")
def pool(request: pytest.FixtureRequest) -> WorkerPool:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


def _ring(method: str, layout: SequenceLayout, blocks) -> Ring:
    """ "ring x ulysses" has heads groups of two."""
    if method == "allgather":
        return Ring(dist.group.WORLD, layout, blocks, method)
    return _levels({"ring": 1, "ulysses": layout.degree, "ring x ulysses": 2}[method]).over(layout, blocks)


def _levels(heads_degree: int) -> Levels:
    return levels_of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",)), heads_degree)


def _run(case: Case, method: str, is_zigzag: bool, blocks, attend=shared_attention) -> list[torch.Tensor]:
    """This rank's output and gradients; those of sinks summed over the ranks."""
    rank, layout = dist.get_rank(), SequenceLayout(case.length, dist.get_world_size(), is_zigzag)
    given = case.tensors()
    inputs = [layout.shard(given[name], rank, 2).to(case.dtype) for name in ("query", "key", "value")]
    if case.has_sinks:
        inputs.append(given["sinks"].to(case.dtype))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = attend(
        *inputs[:3], _ring(method, layout, blocks), case.attention_rule(),
        sinks=inputs[3] if case.has_sinks else None, documents=given["documents"],
    )  # fmt: skip
    grads = list(torch.autograd.grad(out, inputs, layout.shard(given["grad_out"], rank, 2).to(case.dtype)))
    for grad in grads[3:]:
        dist.all_reduce(grad)
    return [out.detach(), *grads]


@functools.cache
def _expected(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """In a worker, once for all methods."""
    return full_attention(case)


def _error(method: str, is_zigzag: bool, name: str, attend=shared_attention) -> float:
    """The largest of any tensor."""
    case, rank = CASES[name], dist.get_rank()
    layout = SequenceLayout(case.length, dist.get_world_size(), is_zigzag)
    out, grads = _expected(case)
    expected = [layout.shard(tensor, rank, 2) for tensor in (out, *list(grads.values())[:3])]
    expected += [grads["sinks"]] if case.has_sinks else []
    found = _run(case, method, is_zigzag, FlashBlocks(CpuKernel()), attend)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    return max(error(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def _every_case(method: str) -> dict[tuple[bool, str], float]:
    contiguous = ("causal", "window", "chunks", "documents and window", "everything")
    return {
        (is_zigzag, name): _error(method, is_zigzag, name)
        for is_zigzag, names in ((True, CASES), (False, contiguous))
        for name in names
    }


@pytest.mark.parametrize(
    ("pool", "method"), [*((2, method) for method in METHODS[:3]), *((4, method) for method in METHODS)],
    indirect=["pool"],
)  # fmt: skip
def test_it_is_full_attention(pool: WorkerPool, method: str):
    for found in pool.run(_every_case, method):
        assert len(found) == len(CASES) + 5
        assert {case: worst for case, worst in found.items() if worst > 2e-6} == {}


def _compiled(query, key, value, ring: Ring, rule: AttentionRule, **options) -> torch.Tensor:
    """The operator as compiled layers have it, computed again in the backward."""
    address = RingAddress.of(ring)
    assert vars(address.find()) == {**vars(ring), "blocks": BLOCKS[ring.blocks.name]}

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return attention_operator(*inputs, address, rule, **options)

    return checkpoint(
        torch.compile(attend, backend="aot_eager", fullgraph=True), query, key, value, use_reentrant=False
    )


def _error_compiled() -> float:
    return _error("ring x ulysses", True, "everything", _compiled)


def _check_fake() -> None:
    """What the compiler is told of the operator's results is what they are."""
    layout, given = SequenceLayout(256, 4), Case().tensors()
    address = RingAddress.of(_ring("ring x ulysses", layout, FlashBlocks(CpuKernel())))
    inputs = [layout.shard(given[name], dist.get_rank(), 2).float() for name in ("query", "key", "value")]
    arguments = (*inputs, None, None, *dataclasses.astuple(address), None, None, 0.25, None)
    torch.library.opcheck(torch.ops.parallelize.shared_attention.default, arguments, test_utils="test_faketensor")


def test_two_levels_are_an_operator(four: WorkerPool):
    assert max(four.run(_error_compiled)) <= 2e-6
    four.run(_check_fake)


def _groups_made() -> int:
    before = dist.distributed_c10d._world.group_count
    assert _levels(2) is _levels(2)
    assert _levels(2) is not _levels(1)
    assert dist.get_process_group_ranks(_levels(2).heads) == [[0, 1], [2, 3]][dist.get_rank() // 2]
    assert dist.get_process_group_ranks(_levels(2).ring) == [[0, 2], [1, 3]][dist.get_rank() % 2]
    return dist.distributed_c10d._world.group_count - before


def test_the_groups_of_two_levels_are_made_once(four: WorkerPool):
    four.run(_groups_made)
    assert four.run(_groups_made) == [0] * 4


def _groups_without_timeout() -> set[str]:
    mesh = ParallelDims(pp=1, dp_replicate=1, dp_shard=1, cp=4, tp=1).build_mesh("cpu")
    levels, reached = levels_of(mesh["cp"], 2), []
    with mock.patch.object(dist.distributed_c10d, "_set_pg_timeout", lambda timeout, group: reached.append(group)):
        set_timeout(60, mesh)
    return {group.group_name for group in (levels.ring, levels.heads)} - {group.group_name for group in reached}


def test_they_have_a_timeout_like_the_others(four: WorkerPool):
    assert four.run(_groups_without_timeout) == [set()] * 4


def _too_few_heads(method: str) -> None:
    with pytest.raises(ValueError, match="must divide the attention heads of a rank, and they are 3") as caught:
        _run(Case(heads=3, key_heads=1), method, True, ReferenceBlocks())
    return str(caught.value)


def test_it_says_what_the_degree_must_divide(four: WorkerPool):
    said = {method: four.run(_too_few_heads, method) for method in ("ulysses", "ring x ulysses")}
    assert set(said["ulysses"]) == {
        'parallelism.context_parallel_method = "ulysses": context_parallel_degree = 4 must divide the attention heads '
        'of a rank, and they are 3. Set the method to "ring" or "allgather", or another degree.'
    }
    assert set(said["ring x ulysses"]) == {
        "parallelism.context_parallel_ulysses_degree = 2 must divide the attention heads of a rank, and they are 3. "
        "Set it to a divisor of 3."
    }


class _CountedCommunication(RingCommunication):
    sent: list[torch.Tensor]

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self.sent.append(tensor)
        super().send(tensor, to)


class _CountedRing(Ring):
    def communication(self) -> RingCommunication:
        communication = _CountedCommunication(self.group)
        communication.sent = _SENT
        return communication


_SENT: list[torch.Tensor] = []


def _bytes_sent(case: Case, is_zigzag: bool, method: str = "ring") -> tuple[int, int]:
    """In a forward, and in a backward."""
    rank, layout = dist.get_rank(), SequenceLayout(case.length, dist.get_world_size(), is_zigzag)
    given = case.tensors()
    inputs = [layout.shard(given[name], rank, 2).to(case.dtype).requires_grad_() for name in ("query", "key", "value")]
    ring = _CountedRing(**vars(_ring(method, layout, FlashBlocks(CpuKernel()))))
    exchange = dist.all_to_all_single

    def counted(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup) -> None:
        _SENT.extend(part for rank, part in enumerate(sent) if rank != dist.get_rank(group))
        exchange(received, sent, group=group)

    counts = []
    with mock.patch.object(dist, "all_to_all_single", counted):
        _SENT.clear()
        out = shared_attention(*inputs, ring, case.attention_rule())
        counts.append(sum(tensor.nbytes for tensor in _SENT))
        _SENT.clear()
        out.sum().backward()
        counts.append(sum(tensor.nbytes for tensor in _SENT))
    return tuple(counts)


@pytest.mark.parametrize("pool", [2, 4], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_bytes_are_sent_as_the_formula_says(pool: WorkerPool, dtype: torch.dtype):
    case, ranks = Case(dtype=dtype, key_heads=2, dim=16, value_dim=8), pool.world_size
    numbers = 2 * 2 * (256 // (2 * ranks)) * (16 + 8)  # batch, key heads, chunk, widths
    item = dtype.itemsize
    assert pool.run(_bytes_sent, case, True) == [
        ((ranks - 1 + rank) * numbers * item, ((ranks - 1 + rank) * item + (2 * (ranks - 1) - rank) * 4) * numbers)
        for rank in range(ranks)
    ]
    assert pool.run(_bytes_sent, case, False) == [
        ((ranks - 1 - rank) * 2 * numbers * item, ((ranks - 1 - rank) * item + rank * 4) * 2 * numbers)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("method", ["ulysses", "ring x ulysses"])
@pytest.mark.parametrize("key_heads", [4, 1])
def test_so_are_those_of_tokens_for_heads(four: WorkerPool, key_heads: int, method: str):
    case = Case(dtype=torch.bfloat16, key_heads=key_heads, dim=16, value_dim=8)
    group_size = 4 if method == "ulysses" else 2
    degree, shared = 4 // group_size, math.lcm(key_heads, group_size)
    rows = 2 * (256 // 4) * (16 + 8) * (group_size - 1) // group_size  # batch, local, widths
    exchanged = (4 + shared) * rows * 2
    returned = 2 * exchanged + (shared * rows * 2 if key_heads < group_size else 0)
    chunk = 2 * shared // group_size * (256 // (2 * degree)) * (16 + 8)
    expected = []
    for rank in range(4):
        keys = (degree - 1 + rank // group_size) * chunk if degree > 1 else 0
        grads = (2 * (degree - 1) - rank // group_size) * chunk if degree > 1 else 0
        expected.append((exchanged + keys * 2, returned + keys * 2 + grads * 4))
    assert four.run(_bytes_sent, case, True, method) == expected


def test_a_window_sends_what_it_reaches(four: WorkerPool):
    case = Case(rule=MaskRule(window=33))
    layout = SequenceLayout(256, 4)
    numbers = 2 * 2 * 32 * (16 + 16) * 4
    counted = [chunks_sent(layout, case.rule, rank) for rank in range(4)]
    assert four.run(_bytes_sent, case, True) == [(keys * numbers, (keys + grads) * numbers) for keys, grads in counted]
    assert sum(keys for keys, _ in counted) < sum(chunks_sent(layout, CAUSAL, rank)[0] for rank in range(4)) / 2
