"""The Triton kernels of `linear_cross_entropy.py`, and what allocates for them and launches them.

    _forward_kernel        block of tokens x part of the vocabulary   ->  maximum, sum, the target's logit
    _logits_grad_kernel    block of tokens x block of a slice         ->  gradient of these logits
    _hidden_grad_kernel    block of tokens x block of features        +=  logits' gradient @ weight, fp32
    _weight_grad_kernel    block of a slice x block of features        =  logits' gradient^T @ hidden, fp32 until stored

All take `order`, the tokens with those that have a target first, and `count`, how many these are, from the device's
memory, and leave what is behind alone. Tiles: `linear_cross_entropy_tiles.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from parallelize.kernels.language import jit, processors, tl
from parallelize.kernels.linear_cross_entropy_tiles import SMALLEST, Tile, product_tiles
from parallelize.kernels.search import SEARCH, bucket


def launch_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    first: int,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp, what its rounding lost, and the target's logit of each token (tokens,), in fp32."""
    (tokens, features), vocabulary = hidden.shape, weight.shape[0]
    is_ignored = targets == ignore_index
    nothing = torch.where(is_ignored, 0.0, -torch.inf)
    if tokens == 0 or vocabulary == 0:
        return nothing, torch.zeros_like(nothing), nothing.clone()
    hidden, weight, order, count = hidden.contiguous(), weight.contiguous(), *_in_order(is_ignored)
    bias, targets, found = None if bias is None else bias.contiguous(), targets.contiguous(), nothing.clone()

    def prepare(tile: Tile) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Launches for the maxima and sums of parts of the vocabulary, (parts, tokens) each."""
        blocks = -(-tokens // tile.rows)
        # As many parts as keep every processor busy; each has at least a block.
        parts = max(1, min(-(-vocabulary // tile.columns), -(-4 * processors(hidden.device) // blocks)))
        part_size = -(-vocabulary // (parts * tile.columns)) * tile.columns
        parts = -(-vocabulary // part_size)
        maxima = hidden.new_full((parts, tokens), -torch.inf, dtype=torch.float32)
        sums = torch.zeros_like(maxima)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            _forward_kernel[(blocks * parts,)](
                hidden, weight, weight if bias is None else bias, targets, order, count, maxima, sums, found,
                tokens, vocabulary, features, part_size, blocks, first, scale, softcap,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap != 0, **tile.options,
            )  # fmt: skip
            return maxima, sums

        return run

    options = (bias is not None, softcap != 0)
    maxima, sums = _launch("linear_cross_entropy_forward", hidden, (tokens, vocabulary, features), options, prepare)
    largest = maxima.amax(0)
    shift = torch.where(largest == -torch.inf, 0.0, largest)  # where all logits are -inf nothing is subtracted
    lse, lost = sum_precisely(largest, (sums * (maxima - shift).exp()).sum(0).log())
    return torch.where(is_ignored, 0.0, lse), torch.where(is_ignored, 0.0, lost), found


def sum_precisely(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """one + other rounded, and what that lost (Knuth's TwoSum); the latter is 0 where the sum is infinite.

    All probabilities of a token have the rounding error of its log-sum-exp; sums over them would show it.
    """
    total = one + other
    of_other = total - one
    lost = (one - (total - of_other)) + (other - of_other)
    return total, torch.where(total.isinf(), 0.0, lost)


def launch_gradients(
    grad_lse: torch.Tensor,
    grad_found: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    lse_lost: torch.Tensor,
    first: int,
    ignore_index: int,
    scale: float,
    softcap: float,
    wants_hidden: bool,
    wants_weight: bool,
    *,
    slice_entries: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias, empty where not wanted. slice_entries: of the vocabulary at a time."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    grad_weight = torch.empty(weight.shape if wants_weight else (0,), dtype=weight.dtype, device=weight.device)
    grad_bias = weight.new_empty(vocabulary if wants_weight and bias is not None else 0)
    total = hidden.new_zeros(hidden.shape if wants_hidden else (0,), dtype=torch.float32)
    if tokens == 0 or vocabulary == 0:
        return total.to(hidden.dtype), grad_weight.zero_(), grad_bias.zero_()
    _launch_slices(
        hidden.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(),
        tuple(tensor.contiguous() for tensor in (targets, *_in_order(targets == ignore_index))),
        tuple(tensor.contiguous() for tensor in (lse, lse_lost, grad_lse, grad_found)),
        (total if wants_hidden else None, grad_weight if wants_weight else None, grad_bias),
        first, scale, softcap, slice_entries,
    )  # fmt: skip
    return total.to(hidden.dtype), grad_weight, grad_bias


def _launch_slices(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens_of: tuple[torch.Tensor, ...],
    numbers: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor],
    first: int,
    scale: float,
    softcap: float,
    slice_entries: int,
) -> None:
    """Write gradients of hidden (to zeros, in fp32), weight and bias, slice by slice of the vocabulary.

    tokens_of: targets, order and count; numbers: lse, what it lost, and the gradients of it and of the targets' logits.
    """
    (tokens, features), vocabulary = hidden.shape, weight.shape[0]
    targets, order, count = tokens_of
    grad_hidden, grad_weight, grad_bias = grads
    has_bias, has_softcap = bias is not None, softcap != 0
    tiles = product_tiles(hidden, tokens, min(slice_entries, vocabulary), features)
    widest = max(tile.columns for tile in tiles or SMALLEST)
    width = min(max(slice_entries // widest, 1) * widest, vocabulary)
    logits_grad = hidden.new_empty(tokens, width)

    def launch_slice(start: int, size: int) -> None:
        def prepare_logits(tile: Tile) -> Callable[[], object]:
            return partial(
                _logits_grad_kernel[(-(-tokens // tile.rows) * -(-size // tile.columns),)],
                hidden, weight, weight if bias is None else bias, targets, order, count, *numbers, logits_grad,
                tokens, features, start, size, width, first, scale, softcap,
                HAS_BIAS=has_bias, HAS_SOFTCAP=has_softcap, **tile.options,
            )  # fmt: skip

        def prepare_hidden(tile: Tile, total: torch.Tensor) -> Callable[[], object]:
            return partial(
                _hidden_grad_kernel[(-(-tokens // tile.rows) * -(-features // tile.columns),)],
                logits_grad, weight, order, count, total, tokens, features, start, size, width, **tile.options,
            )  # fmt: skip

        def prepare_weight(tile: Tile) -> Callable[[], object]:
            return partial(
                _weight_grad_kernel[(-(-size // tile.rows) * -(-features // tile.columns),)],
                logits_grad, hidden, order, count, grad_weight, grad_bias if has_bias else grad_weight,
                features, start, size, width, HAS_BIAS=has_bias, **tile.options,
            )  # fmt: skip

        # By `width`, so that the last slice, which may be narrower, does not search again.
        options = (has_bias, has_softcap)
        _launch("linear_cross_entropy_logits_grad", hidden, (tokens, width, features), options, prepare_logits)
        if grad_hidden is not None:  # it adds to what is there, and is timed elsewhere
            _launch(
                "linear_cross_entropy_hidden_grad", hidden, (tokens, features, width), (),
                lambda tile: prepare_hidden(tile, grad_hidden),
                rehearse=lambda tile: prepare_hidden(tile, torch.empty_like(grad_hidden)),
            )  # fmt: skip
        if grad_weight is not None:
            _launch("linear_cross_entropy_weight_grad", hidden, (width, features, tokens), (has_bias,), prepare_weight)

    for start in range(0, vocabulary, width):
        launch_slice(start, min(width, vocabulary - start))


def _in_order(is_ignored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with a target before those without, and how many the former are; the device is not waited for."""
    return torch.argsort(is_ignored.to(torch.uint8), stable=True), (~is_ignored).sum()


def _launch(
    kernel: str, hidden: torch.Tensor, sizes: tuple[int, int, int], options: tuple[bool, ...], prepare: Callable, **more
):
    """sizes: rows, columns and inner size of the matrix product. Kernels may run several times, with one exception."""
    rows, columns, inner = sizes
    return SEARCH.launch(
        kernel, hidden.device, (str(hidden.dtype), *map(bucket, sizes), *options), product_tiles(hidden, *sizes),
        prepare, products=rows * columns * inner, spare=SMALLEST, **more,
    )  # fmt: skip


@jit
def _tanh(x):
    """In fp32, to a few units in the last place everywhere; exp alone would lose the small values' digits."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2 * tl.abs(x))
    large = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -large, large))


@jit
def _tanh_slope(x):
    """1 - tanh(x)^2, without the digits that this subtraction loses where tanh(x) is nearly 1."""
    decay = tl.exp(-2 * tl.abs(x))
    return 4 * decay / ((1 + decay) * (1 + decay))


@jit
def _compute_logits(
    hidden, weight, bias, token, has_token, entry, has_entry, features, scale,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Logits (ROWS, COLUMNS) in fp32, before the softcap, of tokens and entries of the vocabulary, both int64."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, features, INNER):
        feature = start + tl.arange(0, INNER)
        inside = feature < features
        x = tl.load(
            hidden + token[:, None] * features + feature[None, :], mask=has_token[:, None] & inside[None, :], other=0.0
        )
        w = tl.load(
            weight + entry[None, :] * features + feature[:, None], mask=has_entry[None, :] & inside[:, None], other=0.0
        )
        total = tl.dot(x, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + entry, mask=has_entry, other=0.0).to(tl.float32)[None, :]
    return total * scale


@jit
def _forward_kernel(
    hidden, weight, bias, targets, order, count, maxima, sums, found,
    tokens, vocabulary, features, part_size, blocks, first, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Programs that run together read the same part of the weight.
    block = tl.program_id(0) % blocks
    part = (tl.program_id(0) // blocks).to(tl.int64)
    kept = tl.load(count)
    if block * ROWS < kept:
        row = block * ROWS + tl.arange(0, ROWS)
        has_token = row < kept
        token = tl.load(order + row, mask=has_token, other=0)
        target = tl.load(targets + token, mask=has_token, other=0) - first
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, part_size, COLUMNS):
            entry = part * part_size + start + tl.arange(0, COLUMNS)
            has_entry = entry < vocabulary
            logits = _compute_logits(
                hidden, weight, bias, token, has_token, entry, has_entry, features, scale,
                HAS_BIAS, ROWS, COLUMNS, INNER,
            )  # fmt: skip
            if HAS_SOFTCAP:
                logits = softcap * _tanh(logits / softcap)
            logits = tl.where(has_entry[None, :], logits, float("-inf"))
            # Which column of this block is the target's, in 32 bits: whole tiles of wider numbers have no registers.
            place = target - part * part_size - start
            is_here = has_token & (place >= 0) & (place < COLUMNS) & (target < vocabulary)
            is_target = tl.arange(0, COLUMNS)[None, :] == place.to(tl.int32)[:, None]
            tl.store(found + token, tl.sum(tl.where(is_target, logits, 0.0), 1), mask=is_here)
            larger = tl.maximum(largest, tl.max(logits, 1))
            # Logits may all be -inf so far, as biases are that rule entries out: then nothing is subtracted.
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
            largest = larger
        tl.store(maxima + part * tokens + token, largest, mask=has_token)
        tl.store(sums + part * tokens + token, total, mask=has_token)


@jit
def _logits_grad_kernel(
    hidden, weight, bias, targets, order, count, lse, lse_lost, grad_lse, grad_found, logits_grad,
    tokens, features, slice_start, slice_size, width, first, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Row i of `logits_grad` (tokens, width) is that of token order[i]."""
    blocks = tl.cdiv(tokens, ROWS)
    block = tl.program_id(0) % blocks
    column_block = tl.program_id(0) // blocks
    kept = tl.load(count)
    if block * ROWS < kept:
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        has_token = row < kept
        token = tl.load(order + row, mask=has_token, other=0)
        column = column_block * COLUMNS + tl.arange(0, COLUMNS)
        has_entry = column < slice_size
        entry = column.to(tl.int64) + slice_start
        logits = _compute_logits(
            hidden, weight, bias, token, has_token, entry, has_entry, features, scale,
            HAS_BIAS, ROWS, COLUMNS, INNER,
        )  # fmt: skip
        slope = scale
        if HAS_SOFTCAP:
            slope = scale * _tanh_slope(logits / softcap)
            logits = softcap * _tanh(logits / softcap)
        target = tl.load(targets + token, mask=has_token, other=0) - first
        of_lse = tl.load(grad_lse + token, mask=has_token, other=0.0)
        of_found = tl.load(grad_found + token, mask=has_token, other=0.0)
        normalizer = tl.load(lse + token, mask=has_token, other=0.0)
        lost = tl.load(lse_lost + token, mask=has_token, other=0.0)
        grad = tl.exp(logits - normalizer[:, None]) * (of_lse * (1 - lost))[:, None]  # exp(-lost) is 1 - lost
        grad += tl.where(entry[None, :] == target[:, None], of_found[:, None], 0.0)
        grad = grad * slope
        inside = has_token[:, None] & has_entry[None, :]
        tl.store(
            logits_grad + row[:, None] * width + column[None, :], grad.to(logits_grad.dtype.element_ty), mask=inside
        )


@jit
def _hidden_grad_kernel(
    logits_grad, weight, order, count, total, tokens, features, slice_start, slice_size, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, ROWS)
    block = tl.program_id(0) % blocks
    kept = tl.load(count)
    if block * ROWS < kept:
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        has_token = row < kept
        token = tl.load(order + row, mask=has_token, other=0)
        feature = (tl.program_id(0) // blocks) * COLUMNS + tl.arange(0, COLUMNS)
        inside = has_token[:, None] & (feature < features)[None, :]
        place = total + token[:, None] * features + feature[None, :]
        summed = tl.load(place, mask=inside, other=0.0)
        for start in range(0, slice_size, INNER):
            column = start + tl.arange(0, INNER)
            has_entry = column < slice_size
            grad = tl.load(
                logits_grad + row[:, None] * width + column[None, :],
                mask=has_token[:, None] & has_entry[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                weight + (column.to(tl.int64) + slice_start)[:, None] * features + feature[None, :],
                mask=has_entry[:, None] & (feature < features)[None, :], other=0.0,
            )  # fmt: skip
            summed = tl.dot(grad, w, summed, input_precision="ieee")
        tl.store(place, summed, mask=inside)


@jit
def _weight_grad_kernel(
    logits_grad, hidden, order, count, grad_weight, grad_bias, features, slice_start, slice_size, width,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(slice_size, ROWS)
    column = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    has_entry = column < slice_size
    feature_block = tl.program_id(0) // blocks
    feature = feature_block * COLUMNS + tl.arange(0, COLUMNS)
    has_feature = feature < features
    kept = tl.load(count)
    summed = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS,), tl.float32)
    for start in range(0, kept, INNER):
        row = (start + tl.arange(0, INNER)).to(tl.int64)
        has_token = row < kept
        token = tl.load(order + row, mask=has_token, other=0)
        grad = tl.load(
            logits_grad + row[None, :] * width + column[:, None],
            mask=has_entry[:, None] & has_token[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            hidden + token[:, None] * features + feature[None, :],
            mask=has_token[:, None] & has_feature[None, :], other=0.0,
        )  # fmt: skip
        summed = tl.dot(grad, x, summed, input_precision="ieee")
        if HAS_BIAS:
            bias_sum += tl.sum(grad.to(tl.float32), 1)
    entry = column.to(tl.int64) + slice_start
    tl.store(
        grad_weight + entry[:, None] * features + feature[None, :], summed.to(grad_weight.dtype.element_ty),
        mask=has_entry[:, None] & has_feature[None, :],
    )  # fmt: skip
    if HAS_BIAS:
        is_first = feature_block == 0
        tl.store(grad_bias + entry, bias_sum.to(grad_bias.dtype.element_ty), mask=has_entry & is_first)
