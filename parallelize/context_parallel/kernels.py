"""The flash kernels of torch and of the flash-attn package under one interface, and which one is taken."""

from __future__ import annotations

import importlib.util

import torch

from parallelize.context_parallel.blocks import BlockAttention, ReferenceBlocks, for_heads, sum_groups
from parallelize.context_parallel.flash import FlashBlocks

_HALF = (torch.bfloat16, torch.float16)


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
            softcap is None and query.is_cuda and query.dtype in _HALF
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


class FlashAttentionKernel:
    """That of the flash-attn package (2.7 or later): softcaps too, and keys and values are not repeated."""

    name = "flash-attn"

    def takes(self, query, key, value, softcap):
        dim = query.shape[-1]
        return (
            query.is_cuda and query.dtype in _HALF and dim == value.shape[-1] and dim % 8 == 0 and dim <= 256
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


def choose_blocks(
    device_type: str, dtype: torch.dtype, *, softcap: float | None = None, dim: int = 64, value_dim: int | None = None
) -> tuple[BlockAttention, str]:
    """What computes blocks on a device, and a sentence that says why.

    dtype: that attention computes in. softcap, dim, value_dim: of a model's attention, where they are known; what a
    kernel cannot compute goes to the reference anyway, call by call.
    """
    if value_dim not in (None, dim):
        return ReferenceBlocks(), f"the reference in plain torch: values are {value_dim} wide and keys {dim}"
    if device_type == "cuda" and dtype not in _HALF:
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
