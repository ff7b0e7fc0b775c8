"""Rings of 2, 4 and 8 ranks, each a thread of this process: exactness in bf16, balance, memory, and order of events."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallelize.context_parallel.blocks import ReferenceBlocks
from parallelize.context_parallel.exchange import chunks_sent, plan_steps
from parallelize.context_parallel.flash import FlashBlocks
from parallelize.context_parallel.kernels import CpuKernel
from parallelize.context_parallel.layout import SequenceLayout, sequence_length_problems
from parallelize.context_parallel.masks import CAUSAL, AttentionRule, MaskRule
from parallelize.context_parallel.methods import shared_attention
from parallelize.context_parallel.ring import Ring
from tests.full_attention import Case, error, full_attention


@dataclass
class _Wires:
    """What threads send to each other, (from, to) -> tensors in their order; and what happened, by rank."""

    queues: dict = field(default_factory=lambda: defaultdict(Queue))
    events: dict = field(default_factory=lambda: defaultdict(list))


class _ThreadCommunication:
    """`RingCommunication` between threads."""

    def __init__(self, rank: int, wires: _Wires) -> None:
        self._rank, self._wires = rank, wires
        self._receives: list[tuple[torch.Tensor, int]] = []
        self._sent: list[threading.Event] = []
        self.is_under_way = False

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self._sent.append(threading.Event())
        self._wires.queues[self._rank, to].put((tensor, self._sent[-1]))

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        self._receives.append((torch.empty_like(like), source))
        return self._receives[-1][0]

    def commit(self) -> None:
        self._wires.events[self._rank].append("start")
        self.is_under_way = True

    def wait(self) -> None:
        self._wires.events[self._rank].append("wait")
        for buffer, source in self._receives:
            tensor, is_received = self._wires.queues[source, self._rank].get(timeout=60)
            buffer.copy_(tensor)
            del tensor
            is_received.set()
        assert all(sent.wait(timeout=60) for sent in self._sent)
        self._receives, self._sent, self.is_under_way = [], [], False


class _ThreadRing(Ring):
    """A ring whose `group` is (rank, wires)."""

    @property
    def rank(self) -> int:
        return self.group[0]

    def communication(self) -> _ThreadCommunication:
        return _ThreadCommunication(*self.group)


def _on_threads(degree: int, function) -> list:
    """function(rank, wires) on every rank -> results in rank order."""
    wires = _Wires()
    for source in range(degree):
        for target in range(degree):
            wires.queues[source, target]  # before threads do it at the same time
    with ThreadPoolExecutor(degree) as executor:
        return list(executor.map(lambda rank: function(rank, wires), range(degree)))


def _attend(case: Case, layout: SequenceLayout, blocks, given: dict) -> list[torch.Tensor]:
    """Output and gradients of query, key and value of the whole sequence, from all ranks."""

    def attend(rank: int, wires: _Wires) -> list[torch.Tensor]:
        names = ("query", "key", "value", "grad_out")
        *inputs, grad_out = (layout.shard(given[name], rank, 2).to(case.dtype) for name in names)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        out = shared_attention(*inputs, _ThreadRing((rank, wires), layout, blocks), case.attention_rule())
        return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]

    parts = _on_threads(layout.degree, attend)
    return [layout.join([part[number] for part in parts], 2) for number in range(4)]


def test_bf16_loses_nothing_by_the_ring():
    """Beside the same blocks on one device, and beside PyTorch's own attention in bf16 there."""
    case = Case(length=4096, heads=2, key_heads=1, dtype=torch.bfloat16)
    given = case.tensors()
    out, grads = full_attention(case)
    expected = [out, *grads.values()]
    inputs = [given[name].bfloat16().requires_grad_() for name in ("query", "key", "value")]
    usual = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    usual = [usual.detach(), *torch.autograd.grad(usual, inputs, given["grad_out"].bfloat16())]

    def errors(found: list[torch.Tensor]) -> list[float]:
        return [error(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]

    by_degree = {
        degree: errors(_attend(case, SequenceLayout(4096, degree, degree > 1), FlashBlocks(CpuKernel()), given))
        for degree in (1, 2, 4, 8)
    }
    for degree in (2, 4, 8):
        for ring, alone, pytorch in zip(by_degree[degree], by_degree[1], errors(usual), strict=True):
            assert 1e-4 < ring <= 1.2 * min(alone, pytorch)
    for two, eight in zip(by_degree[2], by_degree[8], strict=True):
        assert eight <= 1.02 * two, "it grows with the ring"


def _pairs(layout: SequenceLayout, rule: MaskRule) -> list[int]:
    """(query, key) pairs that each rank computes."""
    counts = []
    for rank in range(layout.degree):
        ring = _ThreadRing((rank, None), layout, ReferenceBlocks())
        masks = [
            mask
            for source in range(layout.degree)
            for _, _, mask in ring.blockwise(AttentionRule(rule)).masks(None, source, range(len(layout.chunks(source))))
        ]
        counts.append(sum(int(mask.visible(torch.device("cpu")).sum()) for mask in masks))
    return counts


@pytest.mark.parametrize("degree", [2, 4, 8])
# Of a window that is two more than some chunks, the last pair alone lies beyond them.
@pytest.mark.parametrize("rule", [CAUSAL, *(MaskRule(window=window) for window in (100, 512, 514))])
def test_in_a_zigzag_all_have_the_same_to_compute(rule: MaskRule, degree: int):
    pairs = _pairs(SequenceLayout(4096, degree), rule)
    queries, window = 4096, rule.window or 4096
    assert sum(pairs) == window * (window + 1) // 2 + (queries - window) * window, "each pair once, and no other"
    if rule is CAUSAL:
        assert max(pairs) / (sum(pairs) / degree) <= 1.02
        contiguous = _pairs(SequenceLayout(4096, degree, is_zigzag=False), rule)
        assert max(contiguous) / (sum(contiguous) / degree) > 1.49


def test_a_window_of_an_eighth_goes_two_ranks_far():
    layout = SequenceLayout(4096, 8)
    for rank in range(8):
        for step in plan_steps(layout, MaskRule(window=512), rank):
            distance = (step.sends_to - rank) % 8
            assert min(distance, 8 - distance) <= 2 or not step.sends
        assert chunks_sent(layout, MaskRule(window=512), rank)[0] <= 4
        contiguous = SequenceLayout(4096, 8, is_zigzag=False)
        assert [step.sends_to for step in plan_steps(contiguous, MaskRule(window=512), rank)] == [(rank + 1) % 8]


class _Live(TorchDispatchMode):
    """Bytes of tensors made in the block and still alive: now, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        if place in self._seen or not storage.nbytes():
            return
        self._seen.add(place)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, place, storage.nbytes())

    def _free(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_falls_with_the_number_of_ranks(dtype: torch.dtype):
    case = Case(length=4096, heads=4, key_heads=2, dim=32, value_dim=32, dtype=dtype)
    # A long sequence is alone in its batch, and models have heads beside each other in memory.
    given = {
        name: tensor[:1].to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        for name, tensor in case.tensors().items()
        if tensor is not None
    }

    def most(degree: int) -> tuple[int, int]:
        layout = SequenceLayout(4096, degree)

        def attend(rank: int, wires: _Wires) -> tuple[int, int]:
            parts = [layout.shard(given[name], rank, 2) for name in ("query", "key", "value", "grad_out")]
            saved = []
            with (
                _Live() as live,
                torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t),
            ):
                inputs = [tensor.requires_grad_() for tensor in parts[:3]]
                ring = _ThreadRing((rank, wires), layout, FlashBlocks(CpuKernel()))
                out = shared_attention(*inputs, ring, case.attention_rule())
                torch.autograd.grad(out, inputs, parts[3])
            return live.most, sum(saved)

        # What a thread has sent and a slow one has not taken yet counts as the sender's: the least of some runs.
        runs = [_on_threads(degree, attend) for _ in range(4)]
        return min(max(peak for peak, _ in found) for found in runs), max(saved for _, saved in runs[0])

    (two, kept_by_two), (four, kept_by_four), (eight, kept_by_eight) = most(2), most(4), most(8)
    assert kept_by_two == 2 * kept_by_four == 4 * kept_by_eight, "what is kept for the backward"
    assert 0.5 / 1.15 <= eight / four <= 0.5 * 1.15
    assert 0.5 / 1.15 <= four / two <= 0.5 * 1.15
    # In sizes of a rank's queries: what is given is 3, and a copy of anything that needs none would be seen.
    assert four <= {torch.float32: 10.2, torch.bfloat16: 18.7}[dtype] * given["query"].nbytes / 4


def test_the_next_keys_travel_while_a_block_is_computed():
    layout, case = SequenceLayout(256, 4), Case()
    given = case.tensors()
    by_thread: dict[int, list[str]] = {}

    class Recording(ReferenceBlocks):
        def forward(self, *arguments, **options):
            by_thread[threading.get_ident()].append("forward")
            return super().forward(*arguments, **options)

        def backward(self, *arguments, **options):
            by_thread[threading.get_ident()].append("backward")
            return super().backward(*arguments, **options)

    def attend(rank: int, wires: _Wires) -> list[str]:
        by_thread[threading.get_ident()] = wires.events[rank]
        inputs = [layout.shard(given[name], rank, 2).float().requires_grad_() for name in ("query", "key", "value")]
        out = shared_attention(*inputs, _ThreadRing((rank, wires), layout, Recording()), AttentionRule())
        forward = list(wires.events[rank])
        out.sum().backward()
        return forward, wires.events[rank][len(forward) :]

    for forward, backward in _run_apart(attend):
        assert _runs(forward) == ["start", "forward", "wait"] * 3 + ["forward"]
        travelling, beside_blocks = 0, []
        for event in backward:
            travelling += {"start": 1, "wait": -1, "backward": 0}[event]
            if event == "backward":
                beside_blocks.append(travelling)
        assert travelling == 0
        assert len(beside_blocks) == 2 * 4 + 1
        assert min(beside_blocks[:-1]) == 1, "something travels beside every block but the last"
        assert max(beside_blocks) == 2, "keys and values, and the gradients of those before"


def _run_apart(attend) -> list:
    """Every rank on a thread of its own, so that a thread's events are a rank's."""
    barrier = threading.Barrier(4)

    def together(rank: int, wires: _Wires):
        barrier.wait(timeout=60)
        return attend(rank, wires)

    return _on_threads(4, together)


def _runs(events: list[str]) -> list[str]:
    """Without repetitions."""
    return [event for number, event in enumerate(events) if number == 0 or events[number - 1] != event]


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("is_zigzag", [True, False])
def test_a_sequence_is_the_same_after_sharing_and_joining(is_zigzag: bool, degree: int):
    whole, layout = torch.arange(2 * 48).view(2, 48), SequenceLayout(48, degree, is_zigzag)
    parts = [layout.shard(whole, rank, 1) for rank in range(degree)]
    assert [part.shape for part in parts] == [(2, 48 // degree)] * degree
    assert torch.equal(layout.join(parts, 1), whole)
    chunks = sorted((chunk.start, chunk.stop) for rank in range(degree) for chunk in layout.chunks(rank))
    assert [start for start, _ in chunks[1:]] == [stop for _, stop in chunks[:-1]], "each token once"


def test_lengths_that_cannot_be_shared_out_name_the_nearest():
    assert sequence_length_problems("training.seq_len", 4096, 8) == []
    (problem,) = sequence_length_problems("training.seq_len", 100, 8)
    assert problem.startswith("training.seq_len = 100: context_parallel_degree = 8 cuts every sequence into 16 equal")
    assert problem.endswith("divisible by 16; the nearest are 96 or 112.")
    (problem,) = sequence_length_problems("training.seq_len", 3, 8, is_zigzag=False)
    assert problem.endswith("divisible by 8; the nearest are 8.")
