"""Attention over a sequence that processes share, by every method, against full attention in float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from parallelize.context_parallel.blocks import ReferenceBlocks
from parallelize.context_parallel.exchange import RingCommunication, chunks_sent
from parallelize.context_parallel.flash import FlashBlocks
from parallelize.context_parallel.kernels import CpuKernel
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import CAUSAL, MaskRule
from parallelize.context_parallel.methods import METHODS, shared_attention
from parallelize.context_parallel.ring import Ring
from tests.distributed.workers import WorkerPool
from tests.full_attention import CASES, Case, error, full_attention

CASES = {**CASES, "eight heads of four": Case(heads=8, key_heads=2, has_sinks=True)}


@pytest.fixture(scope="module")
def pool(request: pytest.FixtureRequest) -> WorkerPool:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


def _run(case: Case, method: str, is_zigzag: bool, blocks) -> list[torch.Tensor]:
    """This rank's output and gradients; those of sinks summed over the ranks."""
    rank, layout = dist.get_rank(), SequenceLayout(case.length, dist.get_world_size(), is_zigzag)
    given = case.tensors()
    inputs = [layout.shard(given[name], rank, 2).to(case.dtype) for name in ("query", "key", "value")]
    if case.has_sinks:
        inputs.append(given["sinks"].to(case.dtype))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = shared_attention(
        *inputs[:3], Ring(dist.group.WORLD, layout, blocks, method), case.rule, scale=case.scale, softcap=case.softcap,
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


def _error(method: str, is_zigzag: bool, name: str) -> float:
    """The largest of any tensor."""
    case, rank = CASES[name], dist.get_rank()
    layout = SequenceLayout(case.length, dist.get_world_size(), is_zigzag)
    out, grads = _expected(case)
    expected = [layout.shard(tensor, rank, 2) for tensor in (out, *list(grads.values())[:3])]
    expected += [grads["sinks"]] if case.has_sinks else []
    found = _run(case, method, is_zigzag, FlashBlocks(CpuKernel()))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    return max(error(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def _every_case(method: str) -> dict[tuple[bool, str], float]:
    contiguous = ("causal", "window", "chunks", "documents and window", "everything")
    return {
        (is_zigzag, name): _error(method, is_zigzag, name)
        for is_zigzag, names in ((True, CASES), (False, contiguous))
        for name in names
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", [2, 4], indirect=True)
def test_it_is_full_attention(pool: WorkerPool, method: str):
    for found in pool.run(_every_case, method):
        assert len(found) == len(CASES) + 5
        assert {case: worst for case, worst in found.items() if worst > 2e-6} == {}


def _ulysses_with_too_few_heads() -> str:
    try:
        _run(Case(heads=3, key_heads=1), "ulysses", True, ReferenceBlocks())
    except ValueError as problem:
        return str(problem)
    return "no error"


def test_ulysses_says_what_the_degree_must_divide(two: WorkerPool):
    for said in two.run(_ulysses_with_too_few_heads):
        assert said == (
            'parallelism.context_parallel_method = "ulysses": context_parallel_degree = 2 must divide the attention '
            'heads of a rank, and they are 3. Set the method to "ring" or "allgather", or another degree.'
        )


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


def _bytes_sent(case: Case, is_zigzag: bool) -> tuple[int, int]:
    """In a forward, and in a backward."""
    rank, layout = dist.get_rank(), SequenceLayout(case.length, dist.get_world_size(), is_zigzag)
    given = case.tensors()
    inputs = [layout.shard(given[name], rank, 2).to(case.dtype).requires_grad_() for name in ("query", "key", "value")]
    ring = _CountedRing(dist.group.WORLD, layout, FlashBlocks(CpuKernel()))
    counts = []
    _SENT.clear()
    out = shared_attention(*inputs, ring, case.rule)
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


def test_a_window_sends_what_it_reaches(four: WorkerPool):
    case = Case(rule=MaskRule(window=33))
    layout = SequenceLayout(256, 4)
    numbers = 2 * 2 * 32 * (16 + 16) * 4
    counted = [chunks_sent(layout, case.rule, rank) for rank in range(4)]
    assert four.run(_bytes_sent, case, True) == [(keys * numbers, (keys + grads) * numbers) for keys, grads in counted]
    assert sum(keys for keys, _ in counted) < sum(chunks_sent(layout, CAUSAL, rank)[0] for rank in range(4)) / 2
