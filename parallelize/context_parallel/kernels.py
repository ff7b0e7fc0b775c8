"""The flash kernels of torch, of cuDNN and of the flash-attn package under one interface, a kernel of our own in Triton
for what they cannot do, and which one is taken."""

from __future__ import annotations

import importlib.util

import torch

from parallelize.context_parallel.blocks import BlockAttention, ReferenceBlocks, for_heads, sum_groups
from parallelize.context_parallel.flash import FlashBlocks, FlashKernel
from parallelize.context_parallel.masks import BlockMask
from parallelize.kernels.attention_block import (
    LARGEST_HEAD,
    BlockPlan,
    attention_block_backward,
    attention_block_forward,
    takes,
)
from parallelize.kernels.attention_block_tiles import Tiles
from parallelize.kernels.language import launches_on

HALF = (torch.bfloat16, torch.float16)
CUDNN_LARGEST_HEAD = 128  # wider ones on some GPUs and versions only


class CpuKernel:
    """PyTorch's for CPUs, computing in fp32: in half precision every block of a ring would be rounded by itself."""

    name = "torch's flash kernel for CPUs"

    def takes(self, query, key, value, softcap):
        return softcap is None and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]

    def forward(self, query, key, value, is_causal, scale, softcap):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.float(), key.float(), value.float(), 0.0, is_causal, scale=scale
        )

    def backward(self, grad_out, query, key, value, out, log_sum, is_causal, scale, softcap):
        tensors = (tensor.float() for tensor in (grad_out, query, key, value, out))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, log_sum, 0.0, is_causal, scale=scale
        )


class CudaKernel:
    """PyTorch's FlashAttention for CUDA. Keys and values are repeated for their heads, for one block at a time."""

    name = "torch's flash kernel for CUDA"

    def takes(self, query, key, value, softcap):
        dim = query.shape[-1]
        return (
            softcap is None and query.is_cuda and query.dtype in HALF
            and dim == value.shape[-1] and dim % 8 == 0 and dim <= 256
        )  # fmt: skip

    def forward(self, query, key, value, is_causal, scale, softcap):
        wide = (for_heads(tensor, query.shape[1]) for tensor in (key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, *wide, 0.0, is_causal, scale=scale)[:2]

    def backward(self, grad_out, query, key, value, out, log_sum, is_causal, scale, softcap):
        wide = (for_heads(tensor, query.shape[1]) for tensor in (key, value))
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # random state, of dropout
        grad_query, *grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out, query, *wide, out, log_sum, None, None, query.shape[2], key.shape[2], 0.0, is_causal,
            unused, unused[:0], scale=scale,
        )  # fmt: skip
        return grad_query, *(sum_groups(grad.float(), key.shape[1]) for grad in grads)


class CudnnKernel:
    """cuDNN's, by torch's operator, which takes fewer key than query heads as they are.

    torch keeps cuDNN's plans by sizes and by the strides of queries, keys and values, and takes a backward's again for
    outputs and gradients of whatever strides (`setMHAParams` in its aten/src/ATen/native/cudnn/MHA.cpp). So all of them
    have the same strides here, those that models have: heads beside each other.
    """

    name = "cuDNN"

    def takes(self, query, key, value, softcap):
        dim = query.shape[-1]
        return (
            softcap is None and query.is_cuda and query.dtype in HALF and dim == value.shape[-1]
            and dim % 8 == 0 and dim <= CUDNN_LARGEST_HEAD and key.shape[2] > 1
        )  # fmt: skip

    def forward(self, query, key, value, is_causal, scale, softcap):
        out, log_sum = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *_heads_beside_each_other(query, key, value), None, True, 0.0, is_causal, scale=scale
        )[:2]
        return out, log_sum.reshape(query.shape[:-1])  # from (batch, heads, queries, 1)

    def backward(self, grad_out, query, key, value, out, log_sum, is_causal, scale, softcap):
        tensors = _heads_beside_each_other(grad_out, query, key, value, out)
        unused = torch.empty((), dtype=torch.int64, device=query.device)  # random state, of dropout
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, log_sum.contiguous()[..., None], unused, unused, None, None, None, query.shape[2], key.shape[2],
            0.0, is_causal, scale=scale,
        )  # fmt: skip


def _heads_beside_each_other(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(batch, heads, tokens, dim) as (batch, tokens, heads, dim) is dense; not copied where it is so."""
    return tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors)


def why_not_cudnn() -> str | None:
    """Why cuDNN's attention is not used at all. torch itself prefers it on some GPUs, from the same version on."""
    version = torch.backends.cudnn.version() or 0
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    if version <= 91500:  # wrong for tokens that 128 does not divide
        return f"its version is {version}, and 91501 the first that is right"
    return None


class FlashAttentionKernel:
    """That of the flash-attn package (2.7 or later): softcaps too, and keys and values are not repeated."""

    name = "flash-attn"

    def takes(self, query, key, value, softcap):
        dim = query.shape[-1]
        return (
            query.is_cuda and query.dtype in HALF and dim == value.shape[-1] and dim % 8 == 0 and dim <= 256
        )  # fmt: skip

    def forward(self, query, key, value, is_causal, scale, softcap):
        from flash_attn.flash_attn_interface import _flash_attn_forward

        tensors = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
        out, log_sum, *_ = _flash_attn_forward(
            *tensors, dropout_p=0.0, softmax_scale=scale, causal=is_causal, window_size_left=-1, window_size_right=-1,
            softcap=softcap or 0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out.transpose(1, 2), log_sum

    def backward(self, grad_out, query, key, value, out, log_sum, is_causal, scale, softcap):
        from flash_attn.flash_attn_interface import _flash_attn_backward

        inputs = [tensor.transpose(1, 2).contiguous() for tensor in (grad_out, query, key, value, out)]
        grads = [torch.empty_like(tensor) for tensor in inputs[1:4]]
        _flash_attn_backward(
            *inputs, log_sum, *grads, dropout_p=0.0, softmax_scale=scale, causal=is_causal, window_size_left=-1,
            window_size_right=-1, softcap=softcap or 0.0, alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return tuple(grad.transpose(1, 2) for grad in grads)


class TritonBlocks:
    """`kernels/attention_block.py` as a block backend: every mask in one call. The reference where it does not run."""

    name = "Triton kernel"

    def __init__(self, tiles: Tiles | None = None) -> None:
        """tiles: instead of those that go with the sizes."""
        self._tiles = tiles
        self._reference = ReferenceBlocks()

    def forward(self, query, key, value, mask, *, scale, softcap=None):
        if not takes(query, key, value):
            return self._reference.forward(query, key, value, mask, scale=scale, softcap=softcap)
        return attention_block_forward(query, key, value, _plan(mask, query.device, scale, softcap), self._tiles)

    def backward(self, grad_out, query, key, value, out, log_sum_exp, mask, *, scale, softcap=None):
        tensors = (grad_out, query, key, value, out, log_sum_exp)
        if not takes(query, key, value):
            return self._reference.backward(*tensors, mask, scale=scale, softcap=softcap)
        return attention_block_backward(*tensors, _plan(mask, query.device, scale, softcap), self._tiles)


def _plan(mask: BlockMask, device: torch.device, scale: float, softcap: float | None) -> BlockPlan:
    rule, mask = mask.rule, mask.on(device)
    return BlockPlan(
        mask.queries.start, mask.keys.start, scale, softcap, rule.window, rule.chunk, mask.query_documents,
        mask.key_documents,
    )  # fmt: skip


BLOCKS: dict[str, BlockAttention] = {
    blocks.name: blocks
    for blocks in (
        ReferenceBlocks(),
        TritonBlocks(),
        *(FlashBlocks(kernel()) for kernel in (CpuKernel, CudaKernel, CudnnKernel, FlashAttentionKernel)),
        *(FlashBlocks(kernel(), TritonBlocks()) for kernel in (CudaKernel, CudnnKernel, FlashAttentionKernel)),
    )
}
"""Every backend by its name."""


def choose_blocks(
    device_type: str, dtype: torch.dtype, *, softcap: float | None = None, dim: int = 64, value_dim: int | None = None
) -> tuple[BlockAttention, str]:
    """What computes blocks on a device, and a sentence that says why.

    dtype: that attention computes in. softcap, dim, value_dim: of a model's attention, where they are known; what a
    kernel cannot compute goes elsewhere anyway, call by call.
    """
    if device_type == "cuda" and dtype in HALF and launches_on(torch.device(device_type)):
        return _with_triton(dtype, softcap, dim, dim if value_dim is None else value_dim)
    if value_dim not in (None, dim):
        return ReferenceBlocks(), f"the reference in plain torch: values are {value_dim} wide and keys {dim}"
    if device_type == "cuda" and dtype not in HALF:
        return ReferenceBlocks(), f"the reference in plain torch: CUDA's flash kernels do not take {dtype}"
    if device_type == "cuda" and (dim % 8 or dim > 256):
        return ReferenceBlocks(), f"the reference in plain torch: CUDA's flash kernels do not take heads {dim} wide"
    if device_type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        return FlashBlocks(FlashAttentionKernel()), "flash-attn, which is installed"
    if softcap is not None:
        return ReferenceBlocks(), f"the reference in plain torch: torch's flash kernels have no softcap ({softcap})"
    kernel = {"cpu": CpuKernel, "cuda": CudaKernel}.get(device_type)
    if kernel is None:
        return ReferenceBlocks(), f'the reference in plain torch: there is no flash kernel for "{device_type}"'
    return FlashBlocks(kernel()), f"{kernel.name} (the reference in plain torch where a layer needs what it has not)"


def _with_triton(dtype: torch.dtype, softcap: float | None, dim: int, value_dim: int) -> tuple[BlockAttention, str]:
    """On CUDA in half precision, where Triton is installed."""
    if max(dim, value_dim) > LARGEST_HEAD[dtype]:
        return ReferenceBlocks(), f"the reference in plain torch: no kernel takes heads {max(dim, value_dim)} wide"
    triton = TritonBlocks()
    if value_dim != dim:
        return triton, f"a {triton.name} of our own: values are {value_dim} wide and keys {dim}"
    if dim % 8 or dim > 256:
        return triton, f"a {triton.name} of our own: CUDA's flash kernels do not take heads {dim} wide"
    has_flash_attn = importlib.util.find_spec("flash_attn") is not None
    if softcap is not None and not has_flash_attn:
        return triton, f"a {triton.name} of our own: torch's flash kernels have no softcap ({softcap})"
    return _beside_triton(FlashAttentionKernel() if has_flash_attn else CudaKernel())


def _beside_triton(kernel: FlashKernel) -> tuple[BlockAttention, str]:
    triton = TritonBlocks()
    return FlashBlocks(kernel, triton), (
        f"{kernel.name} where a block is whole or plainly causal, a {triton.name} of our own for windows, "
        "documents and what else that has not"
    )


def other_blocks(
    blocks: BlockAttention, *, softcap: float | None = None, dim: int = 64, value_dim: int | None = None
) -> tuple[BlockAttention, str] | None:
    """What computes the same blocks and may do it faster, for the arguments with which `blocks` was chosen.

    Only beside Triton: a plan of cuDNN takes it about 30 ms, for every size of a piece that is cut.
    """
    is_one = blocks.name.endswith(f", {TritonBlocks.name} for the rest")
    fits = softcap is None and value_dim in (None, dim) and dim <= CUDNN_LARGEST_HEAD
    return _beside_triton(CudnnKernel()) if is_one and fits and why_not_cudnn() is None else None
