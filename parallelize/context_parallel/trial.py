"""Whether a block backend computes on a device what the reference does: tried before a run relies on it; and how fast.

Kernels are somebody else's, or compiled for a device that nobody had when they were written.
"""

from __future__ import annotations

import math

import torch

from parallelize.context_parallel.blocks import BlockAttention, ReferenceBlocks
from parallelize.context_parallel.layout import Chunk
from parallelize.context_parallel.masks import BlockMask, MaskRule
from parallelize.kernels.language import KERNEL_ERRORS
from parallelize.kernels.search import Gpu

_LENGTH = 256  # of a block: several tiles of a kernel
_TIMED_LENGTH = 4096
_DOCUMENTS = torch.stack([torch.arange(_LENGTH) // length for length in (90, 200)])
_MASKS = {
    "all keys": BlockMask(MaskRule(), Chunk(_LENGTH, 2 * _LENGTH), Chunk(0, _LENGTH)),
    "the causal order": BlockMask(MaskRule(), Chunk(0, _LENGTH), Chunk(0, _LENGTH)),
    "a window": BlockMask(MaskRule(window=100), Chunk(0, _LENGTH), Chunk(0, _LENGTH)),
    "documents": BlockMask(MaskRule(), Chunk(0, _LENGTH), Chunk(0, _LENGTH), _DOCUMENTS, _DOCUMENTS),
}
# Root mean square of a difference over that of the reference, which computes in fp32: a few roundings of inputs.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def why_not_blocks(
    blocks: BlockAttention,
    device: torch.device,
    dtype: torch.dtype,
    *,
    dim: int = 64,
    value_dim: int | None = None,
    softcap: float | None = None,
) -> str | None:
    """What is wrong with blocks of heads `dim` (values `value_dim`) wide in `dtype` on a device, or None."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, width: int) -> torch.Tensor:
        return torch.randn(2, heads, _LENGTH, width, generator=generator).to(device, dtype)

    value_dim = dim if value_dim is None else value_dim
    query, key, value, grad_out = random(4, dim), random(2, dim), random(2, value_dim), random(4, value_dim)
    options = {"scale": 1 / math.sqrt(dim), "softcap": softcap}
    for name, mask in _MASKS.items():
        out, log_sum = ReferenceBlocks().forward(query, key, value, mask, **options)
        backward = (grad_out, query, key, value, out.to(dtype), log_sum, mask)
        expected = [out, log_sum, *ReferenceBlocks().backward(*backward, **options)]
        try:
            found = [*blocks.forward(query, key, value, mask, **options), *blocks.backward(*backward, **options)]
        except KERNEL_ERRORS as error:
            return f"with {name} {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for what, one, other in zip(("out", "log-sum-exp", "dq", "dk", "dv"), expected, found, strict=True):
            if not (error := relative_error(other, one)) <= TOLERANCE[dtype]:
                return f"with {name} {what} is off by {error:.1e}"
    return None


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected, in fp32."""
    return ((found.float() - expected).square().mean() / expected.square().mean()).sqrt().item()


def milliseconds_of_blocks(blocks: BlockAttention, device: torch.device, dtype: torch.dtype, dim: int) -> float:
    """Forward and backward of a block with all keys and of a causal one, as a ring has them; inf where they fail."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        shape = (1, _TIMED_LENGTH, heads, dim)  # heads beside each other, as models have them
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2)

    query, key, value, grad_out = map(random, (16, 4, 4, 16))
    first, second = Chunk(0, _TIMED_LENGTH), Chunk(_TIMED_LENGTH, 2 * _TIMED_LENGTH)

    def run() -> None:
        for mask in (BlockMask(MaskRule(), second, first), BlockMask(MaskRule(), first, first)):
            out, log_sum = blocks.forward(query, key, value, mask, scale=1 / math.sqrt(dim), softcap=None)
            blocks.backward(
                grad_out, query, key, value, out.to(dtype), log_sum, mask, scale=1 / math.sqrt(dim), softcap=None
            )

    try:
        return Gpu().milliseconds(run)
    except KERNEL_ERRORS:  # no memory, say
        return math.inf
