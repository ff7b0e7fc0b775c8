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
from parallelize.context_parallel.kernels import CpuKernel, CudaKernel, FlashAttentionKernel, TritonBlocks
from parallelize.context_parallel.layout import Chunk, SequenceLayout
from parallelize.context_parallel.masks import CAUSAL, BlockMask
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

    query, key, value, grad_out = normal(shape.heads), normal(shape.key_heads), normal(shape.key_heads), normal(shape.heads)
    actions = _one_call(query, key, value, grad_out)
    expected = [actions[0]().detach(), *actions[1]()]
    base = tuple(seconds_of(action, device) for action in actions)
    blocks_found = [_measured(shape, ONE_CALL, base, base, 0.0)]
    rings_found = []
    for blocks in backends(device, shape.length):
        say(f"attention of {shape.length:,} tokens: {blocks.name}")
        one = _actions(_ring_of(1, blocks, shape), query, key, value, grad_out)
        found, wrong = _time(one, expected, device)
        blocks_found.append(_measured(shape, blocks.name, found, base, wrong))
        if not isinstance(blocks, ReferenceBlocks):
            ring = _actions(_ring_of(RING, blocks, shape), query, key, value, grad_out)
            found, wrong = _time(ring, expected, device)
            rings_found.append(_measured(shape, blocks.name, found, base, wrong))
    return {"blocks": [asdict(one) for one in blocks_found], "rings": [asdict(one) for one in rings_found]}


def backends(device: torch.device, length: int) -> list[BlockAttention]:
    """Those that compute by themselves there (a FlashBlocks whose kernel does not run goes to the reference)."""
    found: list[BlockAttention] = []
    if device.type == "cuda":
        found.append(FlashBlocks(CudaKernel()))
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
