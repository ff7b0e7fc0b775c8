"""torch's attention kernels on the device itself: which is preferred, that it is the one that runs, and cuDNN's blocks.

Written for unittest, as test_gpu_training.py is.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import unittest
import unittest.mock

import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from parallelize.attention_backend import AttentionChoice, choose_attention
from parallelize.context_parallel.blocks import ReferenceBlocks
from parallelize.context_parallel.flash import FlashBlocks
from parallelize.context_parallel.kernels import CudnnKernel, TritonBlocks, why_not_cudnn
from parallelize.context_parallel.layout import Chunk
from parallelize.context_parallel.masks import CAUSAL, BlockMask
from parallelize.context_parallel.trial import TOLERANCE, milliseconds_of_blocks, relative_error, why_not_blocks

DTYPE = torch.bfloat16
OPERATORS = {
    SDPBackend.FLASH_ATTENTION: "aten::_scaled_dot_product_flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "aten::_scaled_dot_product_efficient_attention",
    SDPBackend.CUDNN_ATTENTION: "aten::_scaled_dot_product_cudnn_attention",
}


class AttentionOnTheDevice(unittest.TestCase):
    def setUp(self) -> None:
        if not torch.cuda.is_available():
            raise unittest.SkipTest("needs a CUDA device")
        self.device = torch.device("cuda", torch.cuda.current_device())

    def test_one_is_chosen_and_computes_forward_and_backward(self) -> None:
        for heads, key_heads, dim in ((16, 4, 128), (12, 12, 64)):
            with self.subTest(heads=heads, key_heads=key_heads, dim=dim):
                choice = choose_attention(heads, key_heads, 4096, dim, self.device, DTYPE)
                print(choice.because)
                assert choice.order, choice.because
                assert "off by" not in choice.because, choice.because
                ran = self._operators(choice, heads, key_heads, dim)
                assert {OPERATORS[choice.order[0]], f"{OPERATORS[choice.order[0]]}_backward"} <= ran, ran

    def test_compiled_code_goes_by_the_order_whatever_was_compiled_before(self) -> None:
        """torch keeps compiled code on disk, by a key that does not know of the order."""
        found = choose_attention(8, 8, 1024, 64, self.device, DTYPE)
        fused = list(found.order[: found.order.index(SDPBackend.MATH)])
        if len(fused) < 2:
            raise unittest.SkipTest(f"one kernel only: {found.because}")
        with (
            tempfile.TemporaryDirectory() as folder,
            unittest.mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
        ):
            for first in (*fused, *fused):
                order = tuple(dict.fromkeys([first, *found.order]))
                ran = self._operators(dataclasses.replace(found, order=order), 8, 8, 64, compiled=True)
                assert OPERATORS[first] in ran, f"{first} was wanted, and {ran & set(OPERATORS.values())} ran"

    def test_deterministic_algorithms_leave_it_to_torch(self) -> None:
        torch.use_deterministic_algorithms(True)
        try:
            assert choose_attention(8, 8, 1024, 64, self.device, DTYPE) == AttentionChoice()
        finally:
            torch.use_deterministic_algorithms(False)

    def test_blocks_of_cudnn_are_right(self) -> None:
        self._needs_cudnn()
        for dim in (64, 128):
            for rest in (None, TritonBlocks()):
                for dtype in (torch.bfloat16, torch.float16):
                    with self.subTest(dim=dim, rest=rest, dtype=dtype):
                        blocks = FlashBlocks(CudnnKernel(), rest)
                        assert (reason := why_not_blocks(blocks, self.device, dtype, dim=dim)) is None, reason
        print(f"cuDNN's blocks: {milliseconds_of_blocks(FlashBlocks(CudnnKernel()), self.device, DTYPE, 128):.2f} ms")

    def test_blocks_of_cudnn_are_right_for_one_layout_after_another(self) -> None:
        """Its plans are kept by the strides of some of the tensors only."""
        self._needs_cudnn()
        length, whole = 256, Chunk(0, 256)
        mask, blocks = BlockMask(CAUSAL, whole, whole), FlashBlocks(CudnnKernel())

        def random(heads: int, is_tokens_first: bool) -> torch.Tensor:
            tensor = torch.randn(2, heads, 2 * length, 64, device=self.device, dtype=DTYPE)
            if is_tokens_first:
                tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
            return tensor[:, :, length:]

        for number in range(8):
            query, key, value = (random(heads, bool(number & 1)) for heads in (4, 2, 2))
            grad_out = random(4, bool(number & 2)).contiguous() if number & 4 else random(4, bool(number & 2))
            out, log_sum = ReferenceBlocks().forward(query, key, value, mask, scale=0.125)
            out = out.to(DTYPE).contiguous() if number & 2 else out.to(DTYPE)
            arguments = (grad_out, query, key, value, out, log_sum, mask)
            right = ReferenceBlocks().backward(*arguments, scale=0.125)
            for one, other in zip(blocks.backward(*arguments, scale=0.125), right, strict=True):
                assert relative_error(one, other) <= TOLERANCE[DTYPE], f"layout {number}"

    def _needs_cudnn(self) -> None:
        if (reason := why_not_cudnn()) is not None:
            raise unittest.SkipTest(reason)

    def _operators(self, choice: AttentionChoice, heads, key_heads, dim, *, compiled: bool = False) -> set[str]:
        """Names of the operators that a forward and a backward call."""
        inputs = [
            torch.randn(2, 1024, count, dim, device=self.device, dtype=DTYPE).transpose(1, 2).requires_grad_()
            for count in (heads, key_heads, key_heads)
        ]

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != key_heads) * 2

        torch._dynamo.reset()
        run = torch.compile(attend, fullgraph=True) if compiled else attend
        activities = [torch.profiler.ProfilerActivity.CPU]
        with choice.computing(256), torch.profiler.profile(activities=activities) as profile:
            out = run(*inputs)
            out.backward(torch.ones_like(out))
        torch.cuda.synchronize()
        return {event.key for event in profile.key_averages()}


if __name__ == "__main__":
    unittest.main(verbosity=2)
