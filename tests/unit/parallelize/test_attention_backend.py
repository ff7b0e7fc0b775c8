"""The choice among torch's attention kernels, with those of the CPU and a clock that says what a GPU's would."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from parallelize import attention_backend
from parallelize.attention_backend import AttentionChoice, choose_attention
from parallelize.kernels.search import Gpu

FLASH, MATH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION
CPU = torch.device("cpu")


class Clock(Gpu):
    """Runs, and says what it was told for the kernel that ran."""

    def __init__(self, **times: float) -> None:
        self._times = times

    def is_free(self, device: torch.device) -> bool:
        return True

    def milliseconds(self, run) -> float:
        run()
        [backend] = _cur_sdpa_kernel_backends()
        return self._times[backend.name.lower().removesuffix("_attention")]


@pytest.fixture(autouse=True)
def kernels_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backend, "_FUSED", (FLASH, CUDNN, MATH))


def choose(length: int = 256, dtype: torch.dtype = torch.bfloat16, **times: float) -> AttentionChoice:
    return choose_attention(4, 2, length, 16, CPU, dtype, Clock(**times))


def test_the_fastest_comes_first_and_what_failed_last():
    choice = choose(flash=2.0, math=1.0)
    assert choice.order == (MATH, FLASH, SDPBackend.EFFICIENT_ATTENTION, CUDNN, SDPBackend.OVERRIDEABLE)
    assert choice.because == (
        "math; measured, forward and backward: flash 2.00 ms, cudnn left out (its version is 0, and 91501 the first "
        "that is right), math 1.00 ms"
    )


def test_torchs_own_stays_first_where_another_is_hardly_faster():
    assert choose(flash=1.02, math=1.0).order[0] == FLASH
    assert choose(flash=1.04, math=1.0).order[0] == MATH


def test_the_order_holds_inside_and_nothing_is_left_behind():
    before = _cur_sdpa_kernel_backends(with_priority=True)
    choice = choose(flash=2.0, math=1.0)
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
    with choice.computing(256):
        assert _cur_sdpa_kernel_backends(with_priority=True) == list(choice.order)
        assert torch.compiler.config.cache_key_tag.split()[:2] == ["MATH", "FLASH_ATTENTION"]
        with choice.computing(256):
            assert _cur_sdpa_kernel_backends(with_priority=True) == list(choice.order)
        assert _cur_sdpa_kernel_backends(with_priority=True) == list(choice.order)
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
    assert torch.compiler.config.cache_key_tag == ""


def test_cudnn_is_last_for_lengths_of_which_its_gradients_may_be_nan():
    choice = AttentionChoice((CUDNN, FLASH, SDPBackend.EFFICIENT_ATTENTION, MATH, SDPBackend.OVERRIDEABLE))
    with choice.computing(256):
        assert _cur_sdpa_kernel_backends(with_priority=True)[0] == CUDNN
    with choice.computing(200):
        assert _cur_sdpa_kernel_backends(with_priority=True) == [*choice.order[1:], CUDNN]
        assert "FLASH_ATTENTION EFFICIENT_ATTENTION" in torch.compiler.config.cache_key_tag


@pytest.mark.parametrize(
    ("chosen", "in_order"), [([FLASH], False), ([MATH, FLASH], False), ([MATH, FLASH, CUDNN], True)]
)
def test_a_users_own_choice_stands(chosen: list, in_order: bool):
    choice = choose(flash=2.0, math=1.0)
    with sdpa_kernel(chosen, set_priority=in_order):
        own = _cur_sdpa_kernel_backends(with_priority=True)
        assert choose(flash=2.0, math=1.0) == AttentionChoice()
        with choice.computing(256):
            assert _cur_sdpa_kernel_backends(with_priority=True) == own
    with choice.computing(256), sdpa_kernel(chosen):
        assert set(_cur_sdpa_kernel_backends()) == set(chosen)


def test_another_order_of_all_is_a_users_choice_too():
    backends = [MATH, FLASH, SDPBackend.EFFICIENT_ATTENTION, CUDNN, SDPBackend.OVERRIDEABLE]
    with sdpa_kernel(backends, set_priority=True):
        assert choose(flash=2.0, math=1.0) == AttentionChoice()


def test_torchs_order_with_a_new_cudnn_is_torchs(monkeypatch: pytest.MonkeyPatch):
    with sdpa_kernel([CUDNN, FLASH, SDPBackend.EFFICIENT_ATTENTION, MATH, SDPBackend.OVERRIDEABLE], set_priority=True):
        assert choose(flash=1.0, math=2.0).order[0] == FLASH


@pytest.mark.parametrize("off", range(4))
def test_what_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch, off: int):
    """Flash's output, or one of its gradients, which a hook on a copy of the input changes."""

    def attention(query, key, value, **options):
        tensors = [query.clone(), key.clone(), value.clone()]
        is_wrong = _cur_sdpa_kernel_backends() == [FLASH]
        if is_wrong and off:
            tensors[off - 1].register_hook(lambda grad: 1.1 * grad)
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, **options)
        return 1.1 * out if is_wrong and not off else out

    monkeypatch.setattr(attention_backend, "scaled_dot_product_attention", attention)
    choice = choose(flash=1.0, math=2.0)
    assert choice.order[0] == MATH
    assert choice.order.index(FLASH) > choice.order.index(MATH)
    assert re.search(r"flash left out \(off by 1\.\de-01\)", choice.because)


def test_what_is_wrong_is_not_taken_for_want_of_others(monkeypatch: pytest.MonkeyPatch):
    ranks = [["off by 1.0e-01", "it failed", 1.0], ["it failed", "it failed", "it failed"]]
    monkeypatch.setattr(attention_backend, "gather_objects", lambda own: ranks)
    choice = choose(flash=1.0, math=2.0)
    assert choice.order[:2] == (MATH, FLASH)
    assert choice.because.startswith("math: flash left out (off by 1.0e-01), cudnn left out (it failed)")


def test_nothing_is_measured_where_nothing_may_differ():
    assert choose(dtype=torch.float32, flash=2.0, math=1.0) == AttentionChoice()
    assert choose_attention(4, 2, 256, 16, CPU, torch.bfloat16) == AttentionChoice()
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_attention(4, 2, 256, 16, torch.device("cuda"), torch.bfloat16) == AttentionChoice()
    finally:
        torch.use_deterministic_algorithms(False)


def test_all_ranks_take_what_no_rank_is_against(monkeypatch: pytest.MonkeyPatch):
    ranks = [[1.0, 1.0, 2.0], [3.0, "it failed", 2.0]]
    monkeypatch.setattr(attention_backend, "gather_objects", lambda own: ranks)
    choice = choose(flash=1.0, math=2.0)
    assert choice.order[:2] == (MATH, FLASH)
    assert "flash 3.00 ms, cudnn left out (it failed), math 2.00 ms" in choice.because


def test_a_run_never_fails_for_it(monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(attention_backend.ReferenceBlocks, "forward", fail)
    choice = choose(flash=1.0, math=2.0)
    assert choice.order == ()
    assert choice.because.startswith(
        "as torch chooses: flash left out (CUDA out of memory. Tried to allocate 20.00 GiB)"
    )
    with choice.computing(256):
        assert _cur_sdpa_kernel_backends(with_priority=True)[0] == FLASH


def test_cudnn_is_left_alone_where_masks_are_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    assert "cudnn left out (128 does not divide the tokens)" in choose(192, flash=1.0, math=2.0).because
    assert "cudnn left out (No viable backend" in choose(256, flash=1.0, math=2.0).because
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    assert "cudnn left out (its version is 91500" in choose(256, flash=1.0, math=2.0).because


def test_no_plan_of_cudnn_is_left_that_could_fit_a_model(monkeypatch: pytest.MonkeyPatch):
    strides = []

    def attention(query, key, value, **options):
        strides.append((query.stride(2), key.stride(2), value.stride(2)))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(attention_backend, "scaled_dot_product_attention", attention)
    choose(flash=1.0, math=2.0)
    heads, key_heads, dim = 4, 2, 16
    usual = {16, heads * dim, key_heads * dim, (heads + 2 * key_heads) * dim, 3 * heads * dim, 2 * key_heads * dim}
    assert strides
    assert not usual & set(sum(strides, ()))
