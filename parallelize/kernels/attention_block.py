"""Attention of a block of queries to a block of keys, which may lie anywhere in a sequence, with its log-sum-exp.

    s = scale q k^T              with a softcap c:  s = c tanh(scale q k^T / c)
    L = log(sum(exp(s)))         over the keys that a query sees
    o = exp(s - L) v

and, given the output and L of ALL keys, of which this block is a part, with D = sum(do * o) and P = exp(s - L):

    dv = P^T do      ds = P (do v^T - D)      dq = scale ds k      dk = scale ds^T q

(FlashAttention-2, https://arxiv.org/abs/2307.08691). Scores exist tile by tile. Keys and values are read as they are by
all query heads of their group. One kernel finds the gradient of queries and one those of keys and values, each program
adding up its own rows, so that results are the same every time. Sums are in fp32, and so is what is returned; matrix
products take their factors in the dtype of the inputs.

Of the tiles, those that the mask leaves empty are not visited, and in those that it leaves whole nothing is compared.
That is known from the places of tokens; for documents `_document_ranges` finds it first.

What blocks are for, and the same in plain torch: `parallelize/context_parallel/blocks.py`. Recomputation and the
compiler see an operator around all blocks of a layer (`context_parallel/operator.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from parallelize.kernels.language import OutOfResources, jit, launches_on, next_power_of_two, tl

LARGEST_HEAD = {torch.float32: 256, torch.bfloat16: 512, torch.float16: 512}
"""The widest queries, keys and values that tiles have room for, of every dtype that is computed."""


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work: tokens of a tile (powers of two from 16 on), and warps and stages of the pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class BlockPlan:
    """Where a block lies and what its queries see: keys up to themselves, and of those

    window: so many, themselves included; chunk: those in the same chunk of so many tokens of the whole sequence;
    documents (batch, tokens), integers: those with the same number.
    """

    query_start: int
    """Of the first query, its place in the whole sequence."""
    key_start: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    chunk: int | None = None
    query_documents: torch.Tensor | None = None
    key_documents: torch.Tensor | None = None


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernels run on these tensors."""
    return (
        launches_on(query.device)
        and query.dtype == key.dtype == value.dtype
        and max(query.shape[-1], value.shape[-1]) <= LARGEST_HEAD.get(query.dtype, 0)
    )


def attention_block_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (batch, heads, queries, value_dim) and log-sum-exp (batch, heads, queries), both fp32.

    query: (batch, heads, queries, dim); key: (batch, key_heads, keys, dim); value: (batch, key_heads, keys, value_dim),
    key_heads dividing heads, all of one dtype, views too. A query that sees no key has output 0 and log-sum-exp -inf.
    """
    query, key, value = (_prepared(tensor) for tensor in (query, key, value))
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, heads, queries, value.shape[-1]), dtype=torch.float32)
    log_sum = query.new_empty((batch, heads, queries), dtype=torch.float32)

    def launch(tiles: Tiles) -> None:
        mask, options = _mask_arguments(plan, batch, tiles, by_queries=True)
        _forward_kernel[(_count(queries, tiles.queries), heads, batch)](
            query, key, value, out, log_sum, *_strides(query, key, value), *mask, queries, key.shape[2],
            *_factors(plan, query.dtype), **options, **_sizes(query, key, value, tiles),
        )  # fmt: skip

    if out.numel() or log_sum.numel():
        _launch_with(_forward_tiles(query, value) if tiles is None else [tiles], launch)
    return out, log_sum


def attention_block_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    plan: BlockPlan,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, in fp32 and of their shapes.

    grad_out, out: (batch, heads, queries, value_dim), and log_sum: (batch, heads, queries) in fp32, of all keys that
    the queries see, in this block and elsewhere.
    """
    tensors = tuple(_prepared(tensor) for tensor in (query, key, value, grad_out, out))
    query, key, value = tensors[:3]
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    log_sum = log_sum.contiguous()
    grads = [tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in (query, key, value)]
    delta = torch.empty_like(log_sum)  # the first kernel finds it for the second
    sums, factors = (log_sum, delta), _factors(plan, query.dtype)

    def launch_for_queries(tiles: Tiles) -> None:
        mask, options = _mask_arguments(plan, batch, tiles, by_queries=True)
        _grad_query_kernel[(_count(queries, tiles.queries), heads, batch)](
            *tensors, *sums, grads[0], *_strides(*tensors), *mask, queries, keys, *factors, plan.scale,
            **options, **_sizes(query, key, value, tiles),
        )  # fmt: skip

    def launch_for_keys(tiles: Tiles) -> None:
        mask, options = _mask_arguments(plan, batch, tiles, by_queries=False)
        hides_more = options["HAS_WINDOW"] or options["HAS_CHUNK"] or options["HAS_DOCUMENTS"]
        has_end = hides_more or queries % tiles.queries > 0 or keys % tiles.keys > 0
        _grad_key_kernel[(_count(keys, tiles.keys), key_heads, batch)](
            *tensors[:4], *sums, *grads[1:], *_strides(*tensors[:4]), *mask, queries, keys, *factors,
            plan.scale, **options, HAS_END=has_end, **_sizes(query, key, value, tiles),
        )  # fmt: skip

    if query.numel():
        _launch_with(_grad_query_tiles(query, value) if tiles is None else [tiles], launch_for_queries)
    if key.numel():
        _launch_with(_grad_key_tiles(query, value) if tiles is None else [tiles], launch_for_keys)
    return tuple(grads)


# What kernels are given.


def _prepared(tensor: torch.Tensor) -> torch.Tensor:
    """With dense rows, which is what kernels read; a copy only where they are not."""
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu":
        tensor = tensor.float()  # the interpreter takes bf16 in a product for integers
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _count(tokens: int, tile: int) -> int:
    return -(-tokens // tile)


def _factors(plan: BlockPlan, dtype: torch.dtype) -> tuple[float, float]:
    """Of scores, what comes before the softcap and what after it.

    In half precision log2(e) is among them, because a GPU computes exp2; in fp32 the products would be rounded before
    a large log-sum-exp is taken away from them.
    """
    unit = 1.0 if dtype == torch.float32 else math.log2(math.e)
    if plan.softcap is None:
        return plan.scale * unit, 1.0
    return plan.scale / plan.softcap, plan.softcap * unit


def _mask_arguments(plan: BlockPlan, batch: int, tiles: Tiles, *, by_queries: bool) -> tuple[tuple, dict[str, bool]]:
    """by_queries: whether a program has a tile of queries and goes through keys, or the other way round."""
    window, chunk = plan.window, plan.chunk
    options = {
        "HAS_WINDOW": window is not None, "HAS_CHUNK": chunk is not None,
        "HAS_DOCUMENTS": plan.query_documents is not None, "HAS_SOFTCAP": plan.softcap is not None,
    }  # fmt: skip
    # Places are added to these in 32 bits; no sequence is as long as that.
    rule = (plan.query_start, plan.key_start, *(min(size or 0, 2**30) for size in (window, chunk)))
    if plan.query_documents is None:
        return (*rule, None, None, None, 0, 0), options
    documents = [_prepared(numbers).expand(batch, -1) for numbers in (plan.query_documents, plan.key_documents)]
    sides = [*zip(documents, (tiles.queries, tiles.keys), strict=True)]
    ranges = _document_ranges(*(sides if by_queries else sides[::-1]))
    return (*rule, *documents, ranges, documents[0].stride(0), documents[1].stride(0)), options


def _document_ranges(own: tuple[torch.Tensor, int], others: tuple[torch.Tensor, int]) -> torch.Tensor:
    """For each tile of one side, which tiles of the other share a document with it, int32 (batch, tiles, 4):

    first, last + 1      of those that may share one; between them may be some that do not
    first, last + 1      of those that are of the same single document as this tile; none unless they are consecutive

    own, others: numbers (batch, tokens) and the tokens of a tile. Nothing here waits for the GPU.
    """
    (own_least, own_most), (least, most) = (_extremes(*side) for side in (own, others))
    shared = (own_least[:, :, None] <= most[:, None]) & (least[:, None] <= own_most[:, :, None])
    single = (own_least == own_most)[:, :, None] & (least == most)[:, None]
    first, last, _ = _range(shared)
    whole_first, whole_last, are_consecutive = _range(shared & single)
    return torch.stack([first, last, whole_first, torch.where(are_consecutive, whole_last, whole_first)], -1).int()


def _extremes(documents: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest number in every tile, (batch, tiles)."""
    tokens = documents.shape[1]
    places = torch.arange(_count(tokens, tile) * tile, device=documents.device).clamp(max=tokens - 1)
    return documents[:, places].unflatten(1, (-1, tile)).aminmax(dim=-1)


def _range(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First, last + 1 (both 0 where there is none) of what is chosen along the last dimension, and whether that is all
    between them."""
    count = chosen.sum(-1)
    number = chosen.int()
    first = number.argmax(-1)
    last = torch.where(count > 0, chosen.shape[-1] - number.flip(-1).argmax(-1), 0)
    return first, last, last - first == count


# How work is cut: candidates for heads up to so wide, in bf16, best first. Compiled for compute capabilities 8.0 and 9.0
# they keep (nearly) everything in registers and load ahead; none has been measured on a GPU yet. The last ones always
# fit. There is no search at run time: results would then depend on what happened to be the fastest.

_SMALLEST = (Tiles(32, 32, 4, 1), Tiles(16, 16, 4, 1))
_FORWARD_TILES = {
    64: (Tiles(128, 128, 8, 2), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2)),
    128: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
    256: (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)),
    512: (Tiles(32, 32, 8, 1),),
}
_GRAD_QUERY_TILES = {
    64: (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
    128: (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
    256: (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    512: (Tiles(32, 32, 8, 1),),
}
_GRAD_KEY_TILES = {
    64: (Tiles(64, 128, 8, 2), Tiles(32, 64, 8, 2)),
    128: (Tiles(32, 128, 8, 2), Tiles(32, 64, 8, 2)),
    256: (Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 2)),
    512: (Tiles(32, 32, 8, 1),),
}


def _forward_tiles(query: torch.Tensor, value: torch.Tensor) -> list[Tiles]:
    width, value_width = _widths(query, value)
    return _that_fit(_FORWARD_TILES, query, value, lambda tiles: (
        tiles.queries * width + tiles.stages * tiles.keys * (width + value_width)
    ))  # fmt: skip


def _grad_query_tiles(query: torch.Tensor, value: torch.Tensor) -> list[Tiles]:
    width = sum(_widths(query, value))
    return _that_fit(_GRAD_QUERY_TILES, query, value, lambda tiles: (
        (tiles.queries + tiles.stages * tiles.keys) * width + tiles.queries * tiles.keys
    ))  # fmt: skip


def _grad_key_tiles(query: torch.Tensor, value: torch.Tensor) -> list[Tiles]:
    width = sum(_widths(query, value))
    return _that_fit(_GRAD_KEY_TILES, query, value, lambda tiles: (
        (tiles.keys + tiles.stages * tiles.queries) * width + 2 * tiles.queries * tiles.keys
    ))  # fmt: skip


def _that_fit(
    by_width: dict[int, tuple[Tiles, ...]], query: torch.Tensor, value: torch.Tensor, numbers: Callable[[Tiles], int]
) -> list[Tiles]:
    """Those for which a GPU's shared memory has room for so many numbers, and the smallest."""
    if query.device.type != "cuda":
        return [_SMALLEST[0]]
    room = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
    candidates = by_width[max(64, *_widths(query, value))]
    return [*(tiles for tiles in candidates if numbers(tiles) * query.element_size() <= room), *_SMALLEST]


def _launch_with(candidates: list[Tiles], launch: Callable[[Tiles], None]) -> None:
    """With the first that the GPU has room for: how much a kernel needs is known exactly once it is compiled."""
    for tiles in candidates[:-1]:
        try:
            return launch(tiles)
        except OutOfResources:
            continue
    return launch(candidates[-1])


def _widths(query: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
    """Of the tiles of queries and keys, and of values: heads of other sizes are filled up with zeros."""
    return tuple(max(16, next_power_of_two(tensor.shape[-1])) for tensor in (query, value))


def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles) -> dict[str, int]:
    width, value_width = _widths(query, value)
    return {
        "GROUP": query.shape[1] // key.shape[1], "DIM": query.shape[-1], "VALUE_DIM": value.shape[-1],
        "WIDTH": width, "VALUE_WIDTH": value_width, "QUERIES": tiles.queries, "KEYS": tiles.keys,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


# Parts of the kernels. Places are those in the whole sequence, numbers those of tokens in their block.


@jit
def _load_rows(
    base, first, count, stride,
    IS_PARTIAL: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, WIDTH) from row `first` on, zeros beyond `count` rows and DIM columns.

    IS_PARTIAL: whether there may be rows beyond `count`.
    """
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    places = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if IS_PARTIAL:
        if DIM < WIDTH:
            return tl.load(places, mask=(row < count)[:, None] & (column < DIM)[None, :], other=0.0)
        else:
            return tl.load(places, mask=(row < count)[:, None], other=0.0)
    else:
        if DIM < WIDTH:
            return tl.load(places, mask=(column < DIM)[None, :], other=0.0)
        else:
            return tl.load(places)


@jit
def _store_rows(base, first, count, tile, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Into a dense (count, DIM)."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < count)[:, None] & (column < DIM)[None, :]
    tl.store(base + row.to(tl.int64)[:, None] * DIM + column[None, :], tile, mask=inside)


@jit
def _tanh(x):
    """Exact to a unit in the last place or so: Cephes' polynomial near 0, where 1 - 2 / (exp(2x) + 1) loses digits."""
    size = tl.minimum(tl.abs(x), 10.0)
    far = 1.0 - 2.0 / (tl.exp2(size * 2.8853900817779268) + 1.0)
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    return tl.where(size < 0.625, x + x * square * near, tl.where(x < 0, -far, far))


@jit
def _scores(products, factor, outer, HAS_SOFTCAP: tl.constexpr):
    """Scores in the unit of `_factors`, and the softcap's slope there (1 without it)."""
    if HAS_SOFTCAP:
        ratio = _tanh(products * factor)
        return ratio * outer, 1.0 - ratio * ratio
    else:
        return products * factor, 1.0


@jit
def _exp(scores, inputs):
    """Of scores in the unit that goes with the dtype of `inputs`."""
    if inputs.dtype == tl.float32:
        return tl.exp(scores)
    else:
        return tl.exp2(scores)


@jit
def _sees(
    query, key, keys, query_start, key_start, window, chunk, query_document, key_document,
    HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Whether queries see keys, by their numbers, of shapes that broadcast."""
    query_place, key_place = query_start + query, key_start + key
    seen = (key_place <= query_place) & (key < keys)
    if HAS_WINDOW:
        seen = seen & (query_place - key_place < window)
    if HAS_CHUNK:
        seen = seen & (query_place // chunk == key_place // chunk)
    if HAS_DOCUMENTS:
        seen = seen & (query_document == key_document)
    return seen


@jit
def _tile_ranges(
    seen_first, seen_stop, whole_first, whole_stop, ranges, TILE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr
):  # fmt: skip
    """Numbers of tiles from numbers of tokens: first, first of the whole ones, end of the whole ones, end.

    ranges: those by documents, of this program.
    """
    first, stop = tl.maximum(seen_first, 0) // TILE, (tl.maximum(seen_stop, 0) + TILE - 1) // TILE
    whole_first, whole_stop = (tl.maximum(whole_first, 0) + TILE - 1) // TILE, tl.maximum(whole_stop, 0) // TILE
    if HAS_DOCUMENTS:
        first, stop = tl.maximum(first, tl.load(ranges)), tl.minimum(stop, tl.load(ranges + 1))
        whole_first = tl.maximum(whole_first, tl.load(ranges + 2))
        whole_stop = tl.minimum(whole_stop, tl.load(ranges + 3))
    stop = tl.maximum(first, stop)
    whole_first = tl.minimum(tl.maximum(whole_first, first), stop)
    whole_stop = tl.minimum(tl.maximum(whole_stop, whole_first), stop)
    return first, whole_first, whole_stop, stop


@jit
def _key_tiles(
    first_query, queries, keys, query_start, key_start, window, chunk, ranges,
    HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The tiles of keys that a tile of queries sees, as `_tile_ranges` has them."""
    first = query_start + first_query
    last = query_start + tl.minimum(first_query + QUERIES, queries) - 1
    seen_first, whole_first = first * 0 + key_start, first * 0 + key_start
    if HAS_WINDOW:
        seen_first = tl.maximum(seen_first, first - window + 1)
        whole_first = tl.maximum(whole_first, last - window + 1)
    if HAS_CHUNK:
        seen_first = tl.maximum(seen_first, first // chunk * chunk)
        whole_first = tl.maximum(whole_first, last // chunk * chunk)
    return _tile_ranges(
        seen_first - key_start, tl.minimum(last + 1 - key_start, keys),
        whole_first - key_start, tl.minimum(first + 1 - key_start, keys), ranges, KEYS, HAS_DOCUMENTS,
    )  # fmt: skip


@jit
def _query_tiles(
    first_key, queries, keys, query_start, key_start, window, chunk, ranges,
    HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The tiles of queries that see a tile of keys, as `_tile_ranges` has them; none is whole if the keys' is not."""
    first = key_start + first_key
    last = key_start + tl.minimum(first_key + KEYS, keys) - 1
    query_stop = query_start + queries
    seen_stop, whole_stop = first * 0 + query_stop, first * 0 + query_stop
    if HAS_WINDOW:
        seen_stop = tl.minimum(seen_stop, last + window)
        whole_stop = tl.minimum(whole_stop, first + window)
    if HAS_CHUNK:
        seen_stop = tl.minimum(seen_stop, (last // chunk + 1) * chunk)
        whole_stop = tl.minimum(whole_stop, (first // chunk + 1) * chunk)
    whole_stop = tl.where(first_key + KEYS > keys, query_start, whole_stop)
    return _tile_ranges(
        first - query_start, seen_stop - query_start, last - query_start, whole_stop - query_start, ranges, QUERIES,
        HAS_DOCUMENTS,
    )  # fmt: skip


@jit
def _load_numbers(base, number, count, HAS_DOCUMENTS: tl.constexpr):
    """Of documents, for tokens by their numbers; anything where there are none."""
    if HAS_DOCUMENTS:
        return tl.load(base + number, mask=number < count, other=-1)
    else:
        return number


# The kernels.


@jit
def _forward_tiles_of_keys(
    out, total, most, query, query_number, query_document, key, value, key_documents, first_tile, stop_tile,
    key_row, value_row, query_start, key_start, window, chunk, keys, factor, outer,
    IS_PARTIAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """More keys for output, sum of exponentials and greatest score."""
    for tile in range(first_tile, stop_tile):
        key_tile = _load_rows(key, tile * KEYS, keys, key_row, IS_PARTIAL, KEYS, DIM, WIDTH)
        products = tl.dot(query, tl.trans(key_tile), input_precision="ieee")
        scores, _ = _scores(products, factor, outer, HAS_SOFTCAP)
        if IS_PARTIAL:
            key_number = tile * KEYS + tl.arange(0, KEYS)
            key_document = _load_numbers(key_documents, key_number, keys, HAS_DOCUMENTS)
            seen = _sees(
                query_number[:, None], key_number[None, :], keys, query_start, key_start, window, chunk,
                query_document[:, None], key_document[None, :], HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        greater = tl.maximum(most, tl.max(scores, 1))
        # Where nothing has been seen yet, anything but -inf, from which -inf cannot be taken away.
        level = tl.where(greater == float("-inf"), 0.0, greater)
        weights = _exp(scores - level[:, None], query)
        shrink = _exp(most - level, query)
        value_tile = _load_rows(value, tile * KEYS, keys, value_row, IS_PARTIAL, KEYS, VALUE_DIM, VALUE_WIDTH)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(value_tile.dtype), value_tile, out, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        most = greater
    return out, total, most


@jit
def _forward_kernel(
    query, key, value, out, log_sum,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    query_start, key_start, window, chunk, query_documents, key_documents, ranges, query_document_row,
    key_document_row, queries, keys, factor, outer,
    HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program has a tile of queries of a head; those with the most keys before them come first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key += batch * key_batch + head // GROUP * key_head
    value += batch * value_batch + head // GROUP * value_head
    if HAS_DOCUMENTS:
        query_documents += batch * query_document_row
        key_documents += batch * key_document_row
        ranges += (batch * tl.num_programs(0) + tile) * 4
    query_number = tile * QUERIES + tl.arange(0, QUERIES)
    query_document = _load_numbers(query_documents, query_number, queries, HAS_DOCUMENTS)
    query_tile = _load_rows(
        query + batch * query_batch + head * query_head, tile * QUERIES, queries, query_row, True, QUERIES, DIM, WIDTH
    )
    first, whole_first, whole_stop, stop = _key_tiles(
        tile * QUERIES, queries, keys, query_start, key_start, window, chunk, ranges,
        HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, QUERIES, KEYS,
    )  # fmt: skip
    sums = tl.zeros((QUERIES, VALUE_WIDTH), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    if HAS_WINDOW or HAS_CHUNK or HAS_DOCUMENTS:  # else a causal mask hides nothing on this side
        sums, total, most = _forward_tiles_of_keys(
            sums, total, most, query_tile, query_number, query_document, key, value, key_documents, first, whole_first,
            key_row, value_row, query_start, key_start, window, chunk, keys, factor, outer,
            True, HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, HAS_SOFTCAP, DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, KEYS,
        )  # fmt: skip
    sums, total, most = _forward_tiles_of_keys(
        sums, total, most, query_tile, query_number, query_document, key, value, key_documents, whole_first, whole_stop,
        key_row, value_row, query_start, key_start, window, chunk, keys, factor, outer,
        False, HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, HAS_SOFTCAP, DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, KEYS,
    )  # fmt: skip
    sums, total, most = _forward_tiles_of_keys(
        sums, total, most, query_tile, query_number, query_document, key, value, key_documents, whole_stop, stop,
        key_row, value_row, query_start, key_start, window, chunk, keys, factor, outer,
        True, HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, HAS_SOFTCAP, DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, KEYS,
    )  # fmt: skip
    divisor = tl.where(total == 0, 1.0, total)
    if query_tile.dtype == tl.float32:
        logarithm = most + tl.log(divisor)
    else:
        logarithm = (most + tl.log2(divisor)) * 0.6931471805599453
    place = (batch * tl.num_programs(1) + head) * queries
    logarithm = tl.where(total == 0, float("-inf"), logarithm)
    tl.store(log_sum + place + query_number, logarithm, mask=query_number < queries)
    _store_rows(
        out + place * VALUE_DIM, tile * QUERIES, queries, sums / divisor[:, None], QUERIES, VALUE_DIM, VALUE_WIDTH
    )


@jit
def _grad_query_tiles_of_keys(
    grad, query, query_number, query_document, grad_out, log_sum, delta, key, value, key_documents, first_tile,
    stop_tile, key_row, value_row, query_start, key_start, window, chunk, keys, factor, outer,
    IS_PARTIAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """More keys for the gradient of queries, without the scale."""
    for tile in range(first_tile, stop_tile):
        key_tile = _load_rows(key, tile * KEYS, keys, key_row, IS_PARTIAL, KEYS, DIM, WIDTH)
        value_tile = _load_rows(value, tile * KEYS, keys, value_row, IS_PARTIAL, KEYS, VALUE_DIM, VALUE_WIDTH)
        products = tl.dot(query, tl.trans(key_tile), input_precision="ieee")
        scores, slope = _scores(products, factor, outer, HAS_SOFTCAP)
        if IS_PARTIAL:
            key_number = tile * KEYS + tl.arange(0, KEYS)
            key_document = _load_numbers(key_documents, key_number, keys, HAS_DOCUMENTS)
            seen = _sees(
                query_number[:, None], key_number[None, :], keys, query_start, key_start, window, chunk,
                query_document[:, None], key_document[None, :], HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        weights = _exp(scores - log_sum[:, None], query)
        change = tl.dot(grad_out, tl.trans(value_tile), input_precision="ieee")
        grad_scores = weights * (change - delta[:, None])
        if HAS_SOFTCAP:
            grad_scores = grad_scores * slope
        grad = tl.dot(grad_scores.to(key_tile.dtype), key_tile, grad, input_precision="ieee")
    return grad


@jit
def _for_exp(log_sum, inputs):
    """In the unit of scores; infinity for queries that see nothing anywhere, so that their weights are 0."""
    if inputs.dtype != tl.float32:
        log_sum = log_sum * 1.4426950408889634
    return tl.where(log_sum == float("-inf"), float("inf"), log_sum)


@jit
def _grad_query_kernel(
    query, key, value, grad_out, out, log_sum, delta, grad_query,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_out_batch, grad_out_head, grad_out_row, out_batch, out_head, out_row,
    query_start, key_start, window, chunk, query_documents, key_documents, ranges, query_document_row,
    key_document_row, queries, keys, factor, outer, scale,
    HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """As `_forward_kernel`; also finds and keeps `delta`, the sum of output times its gradient of every query."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key += batch * key_batch + head // GROUP * key_head
    value += batch * value_batch + head // GROUP * value_head
    if HAS_DOCUMENTS:
        query_documents += batch * query_document_row
        key_documents += batch * key_document_row
        ranges += (batch * tl.num_programs(0) + tile) * 4
    query_number = tile * QUERIES + tl.arange(0, QUERIES)
    query_document = _load_numbers(query_documents, query_number, queries, HAS_DOCUMENTS)
    query_tile = _load_rows(
        query + batch * query_batch + head * query_head, tile * QUERIES, queries, query_row, True, QUERIES, DIM, WIDTH
    )
    grad_out_tile = _load_rows(
        grad_out + batch * grad_out_batch + head * grad_out_head, tile * QUERIES, queries, grad_out_row,
        True, QUERIES, VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    out_tile = _load_rows(
        out + batch * out_batch + head * out_head, tile * QUERIES, queries, out_row, True, QUERIES, VALUE_DIM,
        VALUE_WIDTH,
    )  # fmt: skip
    place = (batch * tl.num_programs(1) + head) * queries
    inside = query_number < queries
    delta_tile = tl.sum(grad_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + place + query_number, delta_tile, mask=inside)
    log_sum_tile = _for_exp(tl.load(log_sum + place + query_number, mask=inside, other=float("-inf")), query_tile)
    grad_out_tile = grad_out_tile.to(query_tile.dtype)
    first, whole_first, whole_stop, stop = _key_tiles(
        tile * QUERIES, queries, keys, query_start, key_start, window, chunk, ranges,
        HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, QUERIES, KEYS,
    )  # fmt: skip
    grad = tl.zeros((QUERIES, WIDTH), tl.float32)
    if HAS_WINDOW or HAS_CHUNK or HAS_DOCUMENTS:
        grad = _grad_query_tiles_of_keys(
            grad, query_tile, query_number, query_document, grad_out_tile, log_sum_tile, delta_tile, key, value,
            key_documents, first, whole_first, key_row, value_row, query_start, key_start, window, chunk, keys, factor,
            outer, True, HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, HAS_SOFTCAP, DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, KEYS,
        )  # fmt: skip
    grad = _grad_query_tiles_of_keys(
        grad, query_tile, query_number, query_document, grad_out_tile, log_sum_tile, delta_tile, key, value,
        key_documents, whole_first, whole_stop, key_row, value_row, query_start, key_start, window, chunk, keys, factor,
        outer, False, HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, HAS_SOFTCAP, DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, KEYS,
    )  # fmt: skip
    grad = _grad_query_tiles_of_keys(
        grad, query_tile, query_number, query_document, grad_out_tile, log_sum_tile, delta_tile, key, value,
        key_documents, whole_stop, stop, key_row, value_row, query_start, key_start, window, chunk, keys, factor,
        outer, True, HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, HAS_SOFTCAP, DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, KEYS,
    )  # fmt: skip
    _store_rows(grad_query + place * DIM, tile * QUERIES, queries, grad * scale, QUERIES, DIM, WIDTH)


@jit
def _grad_key_tiles_of_queries(
    grad_key, grad_value, key, value, key_number, key_document, query, grad_out, log_sum, delta, query_documents,
    first_tile, stop_tile, query_row, grad_out_row, query_start, key_start, window, chunk, queries, keys, factor, outer,
    IS_PARTIAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """More queries of one head for the gradients of keys and values; scores here are (keys, queries)."""
    for tile in range(first_tile, stop_tile):
        query_tile = _load_rows(query, tile * QUERIES, queries, query_row, IS_PARTIAL, QUERIES, DIM, WIDTH)
        grad_tile = _load_rows(
            grad_out, tile * QUERIES, queries, grad_out_row, IS_PARTIAL, QUERIES, VALUE_DIM, VALUE_WIDTH
        ).to(query_tile.dtype)
        query_number = tile * QUERIES + tl.arange(0, QUERIES)
        if IS_PARTIAL:
            inside = query_number < queries
            log_sum_tile = tl.load(log_sum + query_number, mask=inside, other=float("-inf"))
            delta_tile = tl.load(delta + query_number, mask=inside, other=0.0)
        else:
            log_sum_tile = tl.load(log_sum + query_number)
            delta_tile = tl.load(delta + query_number)
        products = tl.dot(key, tl.trans(query_tile), input_precision="ieee")
        scores, slope = _scores(products, factor, outer, HAS_SOFTCAP)
        if IS_PARTIAL:
            query_document = _load_numbers(query_documents, query_number, queries, HAS_DOCUMENTS)
            seen = _sees(
                query_number[None, :], key_number[:, None], keys, query_start, key_start, window, chunk,
                query_document[None, :], key_document[:, None], HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        weights = _exp(scores - _for_exp(log_sum_tile, key)[None, :], key)
        grad_value = tl.dot(weights.to(grad_tile.dtype), grad_tile, grad_value, input_precision="ieee")
        change = tl.dot(value, tl.trans(grad_tile), input_precision="ieee")
        grad_scores = weights * (change - delta_tile[None, :])
        if HAS_SOFTCAP:
            grad_scores = grad_scores * slope
        grad_key = tl.dot(grad_scores.to(query_tile.dtype), query_tile, grad_key, input_precision="ieee")
    return grad_key, grad_value


@jit
def _grad_key_kernel(
    query, key, value, grad_out, log_sum, delta, grad_key, grad_value,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_out_batch, grad_out_head, grad_out_row,
    query_start, key_start, window, chunk, query_documents, key_documents, ranges, query_document_row,
    key_document_row, queries, keys, factor, outer, scale,
    HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_END: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program has a tile of keys of a head, and goes through the queries of all heads that it serves."""
    tile = tl.program_id(0)
    number, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if HAS_DOCUMENTS:
        query_documents += batch * query_document_row
        key_documents += batch * key_document_row
        ranges += (batch * tl.num_programs(0) + tile) * 4
    key_number = tile * KEYS + tl.arange(0, KEYS)
    key_document = _load_numbers(key_documents, key_number, keys, HAS_DOCUMENTS)
    key_tile = _load_rows(
        key + batch * key_batch + number * key_head, tile * KEYS, keys, key_row, True, KEYS, DIM, WIDTH
    )
    value_tile = _load_rows(
        value + batch * value_batch + number * value_head, tile * KEYS, keys, value_row, True, KEYS, VALUE_DIM,
        VALUE_WIDTH,
    )  # fmt: skip
    first, whole_first, whole_stop, stop = _query_tiles(
        tile * KEYS, queries, keys, query_start, key_start, window, chunk, ranges,
        HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, QUERIES, KEYS,
    )  # fmt: skip
    key_sums = tl.zeros((KEYS, WIDTH), tl.float32)
    value_sums = tl.zeros((KEYS, VALUE_WIDTH), tl.float32)
    for member in range(GROUP):
        head = number * GROUP + member
        head_query = query + batch * query_batch + head * query_head
        head_grad = grad_out + batch * grad_out_batch + head * grad_out_head
        place = (batch * tl.num_programs(1) * GROUP + head) * queries
        key_sums, value_sums = _grad_key_tiles_of_queries(
            key_sums, value_sums, key_tile, value_tile, key_number, key_document, head_query, head_grad,
            log_sum + place, delta + place, query_documents, first, whole_first, query_row, grad_out_row, query_start,
            key_start, window, chunk, queries, keys, factor, outer,
            True, HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, HAS_SOFTCAP, DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, QUERIES,
        )  # fmt: skip
        key_sums, value_sums = _grad_key_tiles_of_queries(
            key_sums, value_sums, key_tile, value_tile, key_number, key_document, head_query, head_grad,
            log_sum + place, delta + place, query_documents, whole_first, whole_stop, query_row, grad_out_row,
            query_start, key_start, window, chunk, queries, keys, factor, outer,
            False, HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, HAS_SOFTCAP, DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, QUERIES,
        )  # fmt: skip
        if HAS_END:  # queries after the last that see all keys, and the last tile if it is not full
            key_sums, value_sums = _grad_key_tiles_of_queries(
                key_sums, value_sums, key_tile, value_tile, key_number, key_document, head_query, head_grad,
                log_sum + place, delta + place, query_documents, whole_stop, stop, query_row, grad_out_row, query_start,
                key_start, window, chunk, queries, keys, factor, outer,
                True, HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS, HAS_SOFTCAP, DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, QUERIES,
            )  # fmt: skip
    place = (batch * tl.num_programs(1) + number) * keys
    _store_rows(grad_key + place * DIM, tile * KEYS, keys, key_sums * scale, KEYS, DIM, WIDTH)
    _store_rows(grad_value + place * VALUE_DIM, tile * KEYS, keys, value_sums, KEYS, VALUE_DIM, VALUE_WIDTH)
