"""Context parallelism on one device: attention blocks beside one call of PyTorch's attention, and whole rings.

A ring is emulated: every rank's blocks are computed one rank after the other, and nothing is sent. The sum over ranks
is compared with one call for the whole sequence, which is what the blocks, their merging and their masks cost.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarking.timing import difference, seconds_of
from parallelize.context_parallel.blocks import BlockAttention, ReferenceBlocks
from parallelize.context_parallel.blockwise import Blockwise, Visit
from parallelize.context_parallel.flash import FlashBlocks
from parallelize.context_parallel.kernels import (
    CpuKernel,
    CudaKernel,
    CudnnKernel,
    FlashAttentionKernel,
    TritonBlocks,
    why_not_cudnn,
)
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import AttentionRule
from parallelize.kernels.language import launches_on

RING = 8  # ranks
ONE_CALL = "one call"  # of scaled_dot_product_attention
_LONGEST_REFERENCE = 8192  # tokens: plain torch takes seconds beyond
_TOLERANCE = 0.02  # relative, root mean square: beyond it something else was computed


@dataclass(frozen=True)
class Shape:
    """One causal attention of one sequence."""

    length: int
    heads: int
    key_heads: int
    dim: int

    @property
    def flops(self) -> int:
        """Forward, as far as the causal mask leaves it: 2 products; the backward has 5."""
        return 2 * self.heads * self.length**2 * self.dim


SHAPES = tuple(Shape(length, 16, 8, 128) for length in (8192, 16384, 32768, 131072))
TINY_SHAPES = (Shape(64, 2, 1, 16), Shape(128, 2, 1, 16))


@dataclass(frozen=True)
class Measured:
    length: int
    name: str
    forward: float
    """Seconds."""
    backward: float
    forward_share: float
    """Speed beside one call: the seconds of that by these."""
    backward_share: float
    share: float
    """Of forward and backward together."""
    flops_per_second: float
    difference: float
    """From what one call gives, output and gradients."""


def measure(shape: Shape, device: torch.device, say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Blocks as large as the sequence by every backend, and rings of `RING` by those that a GPU uses."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, shape.length, shape.dim, generator=generator, device=device).to(dtype)

    query, key, value, grad_out = map(normal, (shape.heads, shape.key_heads, shape.key_heads, shape.heads))
    actions = _one_call(query, key, value, grad_out)
    expected = [actions[0]().detach(), *actions[1]()]
    base = tuple(seconds_of(action, device) for action in actions)
    blocks_found = [_measured(shape, ONE_CALL, base, base, 0.0)]
    rings_found = []
    for blocks in backends(device, shape.length):
        say(f"attention of {shape.length:,} tokens: {blocks.name}")
        for degree, rows in ((1, blocks_found), (RING, rings_found)):
            if degree > 1 and isinstance(blocks, ReferenceBlocks):
                continue
            layout = SequenceLayout(shape.length, degree, is_zigzag=degree > 1)
            ring = EmulatedRing(layout, blocks, (query, key, value, grad_out))
            wrong = difference([*ring.forward(), *ring.backward()], expected)
            if wrong > _TOLERANCE:
                raise AssertionError(f"{blocks.name}: differs from one call by {wrong:.1%}")
            found = seconds_of(ring.forward, device), seconds_of(ring.backward, device)
            rows.append(_measured(shape, blocks.name, found, base, wrong))
    return {"blocks": [asdict(one) for one in blocks_found], "rings": [asdict(one) for one in rings_found]}


def backends(device: torch.device, length: int) -> list[BlockAttention]:
    """Those that compute by themselves there (a FlashBlocks whose kernel does not run goes to the reference)."""
    found: list[BlockAttention] = []
    if device.type == "cuda":
        found.append(FlashBlocks(CudaKernel()))
        if why_not_cudnn() is None:
            found.append(FlashBlocks(CudnnKernel()))
        if importlib.util.find_spec("flash_attn") is not None:
            found.append(FlashBlocks(FlashAttentionKernel()))
    else:
        found.append(FlashBlocks(CpuKernel()))
    if launches_on(device):
        found.append(TritonBlocks())
    if length <= _LONGEST_REFERENCE:
        found.append(ReferenceBlocks())
    return found


def _one_call(query, key, value, grad_out) -> tuple[Callable, Callable]:
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

    def forward() -> torch.Tensor:
        return scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    out = forward()
    return forward, lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


class EmulatedRing:
    """All ranks of a ring on one device, one after the other; a ring of one rank is a single block."""

    def __init__(self, layout: SequenceLayout, blocks: BlockAttention, given: tuple[torch.Tensor, ...]) -> None:
        """given: queries, keys, values and the output's gradient, (1, heads, length, dim)."""
        self._layout = layout
        self._shards = [[layout.shard(tensor, rank, 2) for rank in range(layout.degree)] for tensor in given]
        self._ranks = [Blockwise(layout, rank, blocks, AttentionRule()) for rank in range(layout.degree)]
        self._outs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self) -> list[torch.Tensor]:
        """The output of the whole sequence."""
        queries, _, values, _ = self._shards
        self._outs = [
            one.forward(query, values[0].shape[-1], self._visits(one), None, None)
            for one, query in zip(self._ranks, queries, strict=True)
        ]
        return [self._layout.join([out for out, _ in self._outs], 2)]

    def backward(self) -> list[torch.Tensor]:
        """The gradients of queries, keys and values, in fp32 but for the queries'."""
        queries, keys, values, grads = self._shards
        totals = [[torch.zeros_like(shard, dtype=torch.float32) for shard in shards] for shards in (keys, values)]

        def add(source: int, found: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
            for number, parts in found.items():
                for total, part in zip(totals, parts, strict=True):
                    self._ranks[source].views(total[source])[number].add_(part)

        grad_queries = [
            one.backward(grad, query, *outs, self._visits(one), None, add)
            for one, grad, query, outs in zip(self._ranks, grads, queries, self._outs, strict=True)
        ]
        return [self._layout.join(grad_queries, 2), *(self._layout.join(total, 2) for total in totals)]

    def _visits(self, one: Blockwise) -> Iterator[Visit]:
        """What comes to a rank: its own keys and values, and of the others the chunks that it has to see."""
        _, keys, values, _ = self._shards
        for distance in range(self._layout.degree):
            source = (one.rank - distance) % self._layout.degree
            seen = [number for _, number, _ in one.masks(None, source, range(len(self._layout.chunks(source))))]
            both = (one.views(tensor[source]) for tensor in (keys, values))
            yield source, *({number: views[number] for number in seen} for views in both)


def _measured(shape: Shape, name: str, found: tuple[float, float], base: tuple[float, float], wrong: float) -> Measured:
    return Measured(
        shape.length, name, *found, base[0] / found[0], base[1] / found[1], sum(base) / sum(found),
        3.5 * shape.flops / sum(found), wrong,
    )  # fmt: skip
