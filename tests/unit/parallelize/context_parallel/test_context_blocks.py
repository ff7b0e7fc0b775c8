"""Blocks of attention, of every backend of the CPU, against full attention; and how partial masks are cut."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallelize.context_parallel import kernels, trial
from parallelize.context_parallel.blocks import ReferenceBlocks
from parallelize.context_parallel.cut import SMALLEST_TILE, cut
from parallelize.context_parallel.flash import FlashBlocks
from parallelize.context_parallel.kernels import (
    CpuKernel,
    CudaKernel,
    CudnnKernel,
    FlashAttentionKernel,
    choose_blocks,
    other_blocks,
    why_not_cudnn,
)
from parallelize.context_parallel.layout import Chunk
from parallelize.context_parallel.masks import CAUSAL, BlockMask, MaskRule
from parallelize.context_parallel.trial import why_not_blocks
from tests.full_attention import CASES, Case, error, full_attention

BACKENDS = {"reference": ReferenceBlocks(rows=50), "flash": FlashBlocks(CpuKernel())}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_one_block_is_full_attention(name: str, backend: str):
    case = CASES[name].but(has_sinks=False)  # which are added to the merged blocks
    given, blocks = case.tensors(), BACKENDS[backend]
    query, key, value, grad_out = (given[part].float() for part in ("query", "key", "value", "grad_out"))
    whole, documents = Chunk(0, case.length), given["documents"]
    mask = BlockMask(case.rule, whole, whole, documents, documents)
    options = {"scale": case.scale or case.dim**-0.5, "softcap": case.softcap}
    out, log_sum = blocks.forward(query, key, value, mask, **options)
    grads = blocks.backward(grad_out, query, key, value, out, log_sum, mask, **options)
    expected, expected_grads = full_attention(case)
    assert error(out, expected) < 1e-6
    for found, expected_grad in zip(grads, expected_grads.values(), strict=True):
        assert error(found, expected_grad) < 1e-6


def test_the_kernel_does_what_it_can_and_the_reference_the_rest():
    calls = []

    class Counting(CpuKernel):
        def forward(self, *arguments):
            calls.append(arguments[3])
            return super().forward(*arguments)

    blocks = FlashBlocks(Counting())
    for name, by_kernel in {"causal": True, "window": True, "chunks": True, "documents": True, "narrow window": False,
                            "softcap": False, "values of another width": False}.items():  # fmt: skip
        case, whole = CASES[name], Chunk(0, 256)
        given = case.tensors()
        mask = BlockMask(case.rule, whole, whole, given["documents"], given["documents"])
        tensors = (given[part].float() for part in ("query", "key", "value"))
        calls.clear()
        blocks.forward(*tensors, mask, scale=1.0, softcap=case.softcap)
        assert bool(calls) == by_kernel, name


@pytest.mark.parametrize("seed", range(150))
def test_pieces_are_what_the_mask_shows_and_each_pair_once(seed: int):
    draw = random.Random(seed)
    window = draw.choice([None, None, draw.randint(SMALLEST_TILE, 400)])
    rule = MaskRule(window, draw.choice([None, None, draw.randint(SMALLEST_TILE, 300)]))
    first, second = (draw.randint(0, 400) for _ in range(2))
    queries, keys = Chunk(first, first + draw.randint(1, 300)), Chunk(second, second + draw.randint(1, 300))
    if draw.random() < 0.3:
        keys = queries
    documents = [None, None]
    if draw.random() < 0.4:
        generator = torch.Generator().manual_seed(seed)
        whole = (torch.rand((2, 800), generator=generator) < 0.005).cumsum(1)
        documents = [whole[:, part.start : part.stop] for part in (queries, keys)]
    mask = BlockMask(rule, queries, keys, *documents)
    pieces = cut(mask)
    if pieces is None:
        assert documents[0] is not None, "only documents may be too many here"
        return
    shown = torch.zeros(2, len(queries), len(keys), dtype=torch.int64)
    for piece in pieces:
        ones = torch.ones(len(piece.queries), len(piece.keys), dtype=torch.int64)
        part = {"whole": ones, "causal": ones.tril(), "reversed": ones.tril().flip(0, 1)}[piece.kind]
        rows = slice(None) if piece.row is None else piece.row
        query_start, key_start = piece.queries.start - queries.start, piece.keys.start - keys.start
        assert min(query_start, key_start) >= 0
        shown[rows, query_start : query_start + len(piece.queries), key_start : key_start + len(piece.keys)] += part
    expected = mask.visible(torch.device("cpu"))
    assert torch.equal(shown, (expected[:, 0] if expected.dim() == 4 else expected).long().expand_as(shown))


def test_windows_too_narrow_and_documents_too_many_are_not_cut():
    whole = Chunk(0, 4096)
    assert cut(BlockMask(MaskRule(window=SMALLEST_TILE - 1), whole, whole)) is None
    assert cut(BlockMask(MaskRule(chunk=SMALLEST_TILE - 1), whole, whole)) is None
    every = torch.arange(4096)[None]
    assert cut(BlockMask(CAUSAL, whole, whole, every, every)) is None
    assert len(cut(BlockMask(MaskRule(window=1025), whole, whole))) <= 16


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor made in the block has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rule", [CAUSAL, MaskRule(window=300), MaskRule(chunk=300)])
def test_no_tensor_has_every_query_beside_every_key(rule: MaskRule, documents: bool, backend: str):
    length = 2048
    query, key, value = (torch.randn(1, 1, length, 8) for _ in range(3))
    numbers = (torch.arange(length) // 700)[None] if documents else None
    mask = BlockMask(rule, Chunk(0, length), Chunk(0, length), numbers, numbers)
    with _Largest() as largest:
        out, log_sum = BACKENDS[backend].forward(query, key, value, mask, scale=1.0, softcap=None)
        BACKENDS[backend].backward(out, query, key, value, out, log_sum, mask, scale=1.0, softcap=None)
    assert query.numel() <= largest.numbers <= length * length / 8


@pytest.mark.parametrize(
    ("arguments", "options", "name", "reason"),
    [
        (
            ("cpu", torch.float32),
            {},
            "torch's flash kernel for CPUs",
            "torch's flash kernel for CPUs (the reference in",
        ),
        (("cpu", torch.bfloat16), {"softcap": 50.0}, "reference", "torch's flash kernels have no softcap (50.0)"),
        (("cpu", torch.float32), {"dim": 192, "value_dim": 128}, "reference", "values are 128 wide and keys 192"),
        (("cuda", torch.float32), {}, "reference", "CUDA's flash kernels do not take torch.float32"),
        (("cuda", torch.bfloat16), {"dim": 20}, "reference", "CUDA's flash kernels do not take heads 20 wide"),
        (("cuda", torch.bfloat16), {"dim": 512}, "reference", "CUDA's flash kernels do not take heads 512 wide"),
        (("mps", torch.float32), {}, "reference", 'there is no flash kernel for "mps"'),
    ],
)
def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch, arguments: tuple, options: dict, name: str, reason: str):
    monkeypatch.setattr(kernels, "launches_on", lambda device: False)
    blocks, said = choose_blocks(*arguments, **options)
    assert blocks.name == name
    assert reason in said


@pytest.mark.parametrize("is_installed", [True, False])
def test_flash_attn_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, is_installed: bool):
    monkeypatch.setattr(kernels, "launches_on", lambda device: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if is_installed else None)
    blocks, _ = choose_blocks("cuda", torch.bfloat16)
    assert blocks.name == ("flash-attn" if is_installed else "torch's flash kernel for CUDA")
    with_softcap, _ = choose_blocks("cuda", torch.bfloat16, softcap=30.0)
    assert with_softcap.name == ("flash-attn" if is_installed else "reference")


@pytest.mark.parametrize(
    ("arguments", "options", "name", "reason"),
    [
        (
            ("cuda", torch.bfloat16),
            {},
            "torch's flash kernel for CUDA, Triton kernel for the rest",
            "or plainly causal",
        ),
        (("cuda", torch.float16), {"softcap": 50.0}, "Triton kernel", "torch's flash kernels have no softcap (50.0)"),
        (("cuda", torch.bfloat16), {"dim": 192, "value_dim": 128}, "Triton kernel", "values are 128 wide and keys 192"),
        (("cuda", torch.bfloat16), {"dim": 20}, "Triton kernel", "CUDA's flash kernels do not take heads 20 wide"),
        (("cuda", torch.bfloat16), {"dim": 1024}, "reference", "no kernel takes heads 1024 wide"),
        (("cuda", torch.float32), {}, "reference", "CUDA's flash kernels do not take torch.float32"),
        (("cpu", torch.bfloat16), {"softcap": 50.0}, "reference", "torch's flash kernels have no softcap (50.0)"),
    ],
)
def test_where_triton_runs_it_does_what_flash_kernels_cannot(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple, options: dict, name: str, reason: str
):
    monkeypatch.setattr(kernels, "launches_on", lambda device: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    blocks, said = choose_blocks(*arguments, **options)
    assert blocks.name == name
    assert blocks.name in kernels.BLOCKS
    assert reason in said


def test_with_another_backend_for_the_rest_nothing_is_cut():
    calls = []

    class Counting(CpuKernel):
        def forward(self, *arguments):
            calls.append("kernel")
            return super().forward(*arguments)

        def backward(self, *arguments):
            calls.append("kernel")
            return super().backward(*arguments)

    class Rest(ReferenceBlocks):
        def forward(self, *arguments, **options):
            calls.append("rest")
            return super().forward(*arguments, **options)

        def backward(self, *arguments, **options):
            calls.append("rest")
            return super().backward(*arguments, **options)

    blocks, whole = FlashBlocks(Counting(), Rest()), Chunk(0, 256)
    before, after = Chunk(0, 128), Chunk(128, 256)
    zeros = torch.zeros(2, 256, dtype=torch.long)
    for mask, softcap, taken in (
        (BlockMask(CAUSAL, whole, whole), None, "kernel"),
        (BlockMask(CAUSAL, after, before), None, "kernel"),
        (BlockMask(MaskRule(window=256), whole, whole), None, "kernel"),
        (BlockMask(MaskRule(window=100), whole, whole), None, "rest"),
        (BlockMask(MaskRule(chunk=128), whole, whole), None, "rest"),
        (BlockMask(CAUSAL, whole, whole, zeros, zeros), None, "rest"),
        (BlockMask(CAUSAL, whole, whole), 3.0, "rest"),
    ):
        query, grad_out = (torch.randn(2, 4, len(mask.queries), 8) for _ in range(2))
        key, value = (torch.randn(2, 2, len(mask.keys), 8) for _ in range(2))
        options = {"scale": 1.0, "softcap": softcap}
        calls.clear()
        out, log_sum = blocks.forward(query, key, value, mask, **options)
        grads = blocks.backward(grad_out, query, key, value, out, log_sum, mask, **options)
        assert calls == [taken] * 2
        right = ReferenceBlocks().backward(grad_out, query, key, value, out, log_sum, mask, **options)
        for found, expected in zip(grads, right, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_triton_its_blocks_are_the_references(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "takes", lambda *tensors: False)
    case, whole = CASES["everything"], Chunk(0, 256)
    given = case.tensors()
    query, key, value, grad_out = (given[part].float() for part in ("query", "key", "value", "grad_out"))
    mask = BlockMask(case.rule, whole, whole, given["documents"], given["documents"])
    found = []
    for blocks in (kernels.TritonBlocks(), ReferenceBlocks()):
        out, log_sum = blocks.forward(query, key, value, mask, scale=0.5, softcap=case.softcap)
        grads = blocks.backward(grad_out, query, key, value, out, log_sum, mask, scale=0.5, softcap=case.softcap)
        found.append([out, log_sum, *grads])
    assert all(torch.equal(ours, right) for ours, right in zip(*found, strict=True))


@pytest.mark.parametrize("kernel", [CudaKernel(), CudnnKernel(), FlashAttentionKernel()])
def test_kernels_for_cuda_leave_tensors_of_the_cpu_alone(kernel):
    tensors = [torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)] * 3
    assert not kernel.takes(*tensors, None)
    assert CpuKernel().takes(*tensors, None)


def test_cases_are_of_every_kind():
    assert any(case.softcap and case.has_sinks and case.value_dim != case.dim for case in CASES.values())
    assert isinstance(CASES["causal"], Case)


def test_a_backend_is_tried_on_its_device():
    cpu = torch.device("cpu")
    assert why_not_blocks(FlashBlocks(CpuKernel()), cpu, torch.float32) is None
    assert why_not_blocks(FlashBlocks(CpuKernel()), cpu, torch.bfloat16, dim=48) is None

    class WrongGradient(CpuKernel):
        def backward(self, *arguments):
            grad_query, grad_key, grad_value = super().backward(*arguments)
            return grad_query, 1.001 * grad_key, grad_value

    assert why_not_blocks(FlashBlocks(WrongGradient()), cpu, torch.float32) == "with all keys dk is off by 1.0e-03"

    class OneDocument(ReferenceBlocks):
        def forward(self, query, key, value, mask, **options):
            mask = dataclasses.replace(mask, query_documents=None, key_documents=None)
            return super().forward(query, key, value, mask, **options)

    assert "with documents out is off by" in why_not_blocks(OneDocument(), cpu, torch.float32)

    class Absent(CpuKernel):
        def forward(self, *arguments):
            raise RuntimeError("no such kernel")

    assert why_not_blocks(FlashBlocks(Absent()), cpu, torch.float32) == "with all keys RuntimeError: no such kernel"


class _CudnnOnCpu(CudnnKernel):
    """The kernel with torch's operators replaced by the reference, see `cudnns_operators`."""

    def takes(self, query, key, value, softcap):
        return softcap is None and query.shape[-1] == value.shape[-1]


@pytest.fixture
def cudnns_operators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the CPU, called as the operators are: these say, on the meta device, whether arguments and shapes
    are right. The list gets the names of what was called."""
    calls = []

    def block(query, key, is_causal):
        keys = Chunk(0, key.shape[2])
        queries = keys if is_causal else Chunk(keys.stop, keys.stop + query.shape[2])
        return BlockMask(CAUSAL, queries, keys)

    def call_on_meta(operator, arguments, options):
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[-1] > 1:
                assert tensor.transpose(1, 2).is_contiguous()
        on_meta = [one.to("meta") if isinstance(one, torch.Tensor) else one for one in arguments]
        calls.append(operator._schema.name)
        return operator(*on_meta, **options)

    forward_operator = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    backward_operator = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default

    def forward(*arguments, scale):
        shapes = call_on_meta(forward_operator, arguments, {"scale": scale})
        query, key, value, bias, with_log_sum, dropout, is_causal = arguments
        assert (bias, with_log_sum, dropout) == (None, True, 0.0)
        out, log_sum = ReferenceBlocks().forward(query, key, value, block(query, key, is_causal), scale=scale)
        return out.to(query.dtype), log_sum.reshape(shapes[1].shape), *shapes[2:]

    def backward(*arguments, scale):
        shapes = call_on_meta(backward_operator, arguments, {"scale": scale})
        grad_out, query, key, value, out, log_sum, *_, dropout, is_causal = arguments
        assert dropout == 0.0
        assert log_sum.shape == (*query.shape[:-1], 1)
        assert log_sum.is_contiguous()
        grads = ReferenceBlocks().backward(
            grad_out, query, key, value, out, log_sum[..., 0], block(query, key, is_causal), scale=scale
        )
        assert [grad.shape for grad in grads] == [shape.shape for shape in shapes]
        return tuple(grad.to(query.dtype) for grad in grads)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", backward)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cudnn_is_called_as_its_operators_are(cudnns_operators: list[str], dtype: torch.dtype):
    assert why_not_blocks(FlashBlocks(_CudnnOnCpu()), torch.device("cpu"), dtype) is None
    assert why_not_blocks(FlashBlocks(_CudnnOnCpu(), ReferenceBlocks()), torch.device("cpu"), dtype, dim=128) is None
    assert set(cudnns_operators) == {
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_cudnn_attention_backward",
    }


def test_cudnn_is_told_of_the_same_strides_whatever_they_are(cudnns_operators: list[str]):
    whole = Chunk(0, 64)
    mask, blocks = BlockMask(CAUSAL, whole, whole), FlashBlocks(_CudnnOnCpu())
    query, grad_out = (torch.randn(2, 4, 128, 8)[:, :, 32:96] for _ in range(2))
    key, value = (torch.randn(2, 64, 2, 8).transpose(1, 2) for _ in range(2))
    out, log_sum = blocks.forward(query, key, value, mask, scale=0.5)
    found = blocks.backward(grad_out, query, key, value, out, log_sum, mask, scale=0.5)
    right = ReferenceBlocks().backward(grad_out, query, key, value, out, log_sum, mask, scale=0.5)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)
    assert len(cudnns_operators) == 2


def test_cudnn_stands_beside_flash_where_it_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "launches_on", lambda device: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    flash, _ = choose_blocks("cuda", torch.bfloat16, dim=128)
    other, said = other_blocks(flash, dim=128)
    assert other.name == "cuDNN, Triton kernel for the rest"
    assert other.name in kernels.BLOCKS
    assert said.startswith("cuDNN where a block is whole or plainly causal")
    assert other_blocks(flash, dim=256) is None
    assert other_blocks(flash, dim=128, value_dim=64) is None
    assert other_blocks(flash, dim=128, softcap=30.0) is None
    assert other_blocks(ReferenceBlocks(), dim=128) is None
    assert other_blocks(FlashBlocks(CudaKernel()), dim=128) is None


def test_cudnn_must_be_new_and_need_not_be_deterministic(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    assert why_not_cudnn() == "its version is 91500, and 91501 the first that is right"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    assert why_not_cudnn() is None
    torch.use_deterministic_algorithms(True)
    try:
        assert why_not_cudnn() == "its backward is not deterministic"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_backend_is_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "_TIMED_LENGTH", 16)
    monkeypatch.setattr(trial.Gpu, "milliseconds", lambda clock, run: run() or 2.5)
    kinds = []

    class Counting(CpuKernel):
        def backward(self, grad_out, query, key, value, out, log_sum, is_causal, scale, softcap):
            kinds.append((is_causal, query.shape[1] // key.shape[1]))
            return super().backward(grad_out, query, query, query, out, log_sum, is_causal, scale, softcap)

        def forward(self, query, key, value, is_causal, scale, softcap):
            return super().forward(query, query, query, is_causal, scale, softcap)

    cpu = torch.device("cpu")
    assert trial.milliseconds_of_blocks(FlashBlocks(Counting()), cpu, torch.float32, 8) == 2.5
    assert kinds == [(False, 4), (True, 4)]

    def fail(clock, run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial.Gpu, "milliseconds", fail)
    assert trial.milliseconds_of_blocks(FlashBlocks(Counting()), cpu, torch.float32, 8) == float("inf")
