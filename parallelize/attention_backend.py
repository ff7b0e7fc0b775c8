"""Which of torch's kernels computes `scaled_dot_product_attention`: the fastest of this GPU, measured at the start.

torch tries its kernels in an order that was fixed when it was built, and takes the first that can. Here each is tried
alone: is it right, how long does it take? Then all ranks compute with the same order, the fastest first. What a user
has chosen, by `torch.nn.attention.sdpa_kernel` or by turning a kernel off, stands.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from parallelize.context_parallel.blocks import ReferenceBlocks
from parallelize.context_parallel.kernels import HALF, why_not_cudnn
from parallelize.context_parallel.layout import Chunk
from parallelize.context_parallel.masks import CAUSAL, BlockMask
from parallelize.context_parallel.trial import TOLERANCE, relative_error
from parallelize.distributed import gather_objects
from parallelize.kernels.search import Gpu

_MATH, _OTHER = SDPBackend.MATH, SDPBackend.OVERRIDEABLE
_FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_FLASH, _CUDNN, _EFFICIENT = _FUSED
# torch's own; the second with a new cuDNN on Hopper and Blackwell, once any attention was computed.
_TORCHS_ORDERS = ([_FLASH, _EFFICIENT, _MATH, _CUDNN, _OTHER], [_CUDNN, _FLASH, _EFFICIENT, _MATH, _OTHER])
_OFF = "off by"  # how the reason begins that a kernel computes wrongly
_TIE = 1.03  # how much faster than torch's own first another must be: clocks are no better
_LONGEST, _TOKENS = 16384, 8192  # of a sequence, and of all together: kernels rank alike beyond


@dataclass(frozen=True)
class AttentionChoice:
    order: tuple[SDPBackend, ...] = ()
    """In which torch tries its kernels; empty: as it would."""
    because: str = ""
    """What was measured, for people; empty where nothing was."""

    @contextlib.contextmanager
    def computing(self, tokens: int) -> Iterator[None]:
        """Within the block, for sequences of so many tokens, torch goes by the order, unless a user has chosen."""
        if not self.order or not _is_up_to_torch():
            yield
            return
        order = sorted(self.order, key=lambda backend: not _takes(backend, tokens))
        # torch's cache of compiled code does not know by which kernel it computes.
        tag = " ".join([torch.compiler.config.cache_key_tag, *(backend.name for backend in order)])
        with sdpa_kernel(order, set_priority=True), torch.compiler.config.patch(cache_key_tag=tag):
            yield


def choose_attention(
    heads: int, key_heads: int, length: int, dim: int, device: torch.device, dtype: torch.dtype, gpu: Gpu | None = None
) -> AttentionChoice:
    """Measure the kernels on causal attention of `length` tokens; all ranks call it together.

    Nothing is chosen but on a GPU, in half precision, where algorithms need not be deterministic. gpu: the clock.
    """
    gpu = gpu or Gpu()
    if dtype not in HALF or not gpu.is_free(device) or not _is_up_to_torch():
        return AttentionChoice()
    ranks = gather_objects(_measure_all(heads, key_heads, length, dim, device, dtype, gpu))
    times, said = {}, []
    for backend, found in zip(_FUSED, zip(*ranks, strict=True), strict=True):
        reason = next((one for one in found if isinstance(one, str)), None)
        if reason is None:
            times[backend] = max(found)
        said.append(f"{_name(backend)} {f'{times[backend]:.2f} ms' if reason is None else f'left out ({reason})'}")
    torchs = _cur_sdpa_kernel_backends(with_priority=True)
    if not times and any(reason.startswith(_OFF) for of_rank in ranks for reason in of_rank if isinstance(reason, str)):
        return AttentionChoice(tuple(dict.fromkeys([_MATH, *torchs])), f"{_name(_MATH)}: {', '.join(said)}")
    if not times:
        return AttentionChoice((), f"as torch chooses: {', '.join(said)}")
    first, best = min(times, key=torchs.index), min(times, key=times.get)
    first = first if times[first] <= _TIE * times[best] else best
    ranked = sorted(times, key=lambda backend: (backend != first, times[backend]))
    order = tuple(dict.fromkeys([*ranked, _MATH, *torchs]))  # what is wrong, behind the one that can do everything
    return AttentionChoice(order, f"{_name(first)}; measured, forward and backward: {', '.join(said)}")


def _name(backend: SDPBackend) -> str:
    return backend.name.removesuffix("_ATTENTION").lower()


def _is_up_to_torch() -> bool:
    """Whether nobody has turned a kernel off, or given another order than torch's own."""
    return _cur_sdpa_kernel_backends(with_priority=True) in _TORCHS_ORDERS


def _measure_all(heads, key_heads, length, dim, device, dtype, gpu) -> list[float | str]:
    """Milliseconds of each fused kernel, or why it is not to be taken."""
    tokens = min(length, _LONGEST)
    # One head too many: torch keeps cuDNN's plans for a backward by the strides of queries, keys and values, and takes
    # them again whatever the strides of the output's gradient. None that is made here may ever fit a model.
    sizes, generator = [heads, key_heads, key_heads, heads, 1], torch.Generator(device).manual_seed(0)
    shape = (max(1, _TOKENS // tokens), tokens, sum(sizes), dim)
    try:
        numbers = torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        *inputs, grad_out, _ = numbers.split(sizes, dim=1)
        # The last key head of the last sequence and the queries that see it, all that they need of each other, in fp32.
        group = [tensor[-1:, -(tensor.shape[1] // key_heads) :] for tensor in (*inputs, grad_out)]
        mask, scale = BlockMask(CAUSAL, Chunk(0, tokens), Chunk(0, tokens)), 1 / math.sqrt(dim)
        reference = ReferenceBlocks(rows=64)
        out, log_sum = reference.forward(*group[:3], mask, scale=scale)
        right = [out, *reference.backward(group[3], *group[:3], out.to(dtype), log_sum, mask, scale=scale)]
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        return [_why_not(backend, length) or _measure(backend, inputs, grad_out, right, gpu) for backend in _FUSED]
    except RuntimeError as error:  # no memory, for one
        return [_words(error)] * len(_FUSED)


def _why_not(backend: SDPBackend, length: int) -> str | None:
    if not _takes(backend, length):
        return "128 does not divide the tokens"
    return why_not_cudnn() if backend == _CUDNN else None


def _takes(backend: SDPBackend, tokens: int) -> bool:
    """cuDNN's gradients of queries may else be NaN with a mask (https://github.com/pytorch/pytorch/issues/196678)."""
    return backend != _CUDNN or tokens % 128 == 0


def _measure(backend, inputs, grad_out, right, gpu) -> float | str:
    def run() -> list[torch.Tensor]:
        out = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=grad_out.shape[1] != inputs[1].shape[1])
        return [out, *torch.autograd.grad(out, inputs, grad_out)]

    try:
        with sdpa_kernel(backend), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it cannot do
            for found, expected in zip(run(), right, strict=True):
                size = expected.shape[1]
                if not (error := relative_error(found[-1:, -size:], expected)) <= TOLERANCE[found.dtype]:
                    return f"{_OFF} {error:.1e}"
            return gpu.milliseconds(run)
    except RuntimeError as error:  # it cannot, or it failed
        return _words(error)


def _words(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:60]
