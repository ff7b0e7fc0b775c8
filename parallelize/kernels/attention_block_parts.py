"""What the kernels of attention blocks share: see `attention_block.py`.

Places are those of tokens in the whole sequence, numbers those in their block.
"""

from __future__ import annotations

from parallelize.kernels.language import jit, tl


@jit
def load_rows(
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
def store_rows(base, first, count, tile, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
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
def scores_of(products, factor, outer, HAS_SOFTCAP: tl.constexpr):
    """Scores in the unit of `_factors`, and the softcap's slope there (1 without it)."""
    if HAS_SOFTCAP:
        ratio = _tanh(products * factor)
        return ratio * outer, 1.0 - ratio * ratio
    else:
        return products * factor, 1.0


@jit
def exp(scores, inputs):
    """Of scores in the unit that goes with the dtype of `inputs`."""
    if inputs.dtype == tl.float32:
        return tl.exp(scores)
    else:
        return tl.exp2(scores)


@jit
def for_exp(log_sum, inputs):
    """In the unit of scores; infinity for queries that see nothing anywhere, so that their weights are 0."""
    if inputs.dtype != tl.float32:
        log_sum = log_sum * 1.4426950408889634
    return tl.where(log_sum == float("-inf"), float("inf"), log_sum)


@jit
def sees(
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
def key_tiles(
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
def query_tiles(
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
def load_numbers(base, number, count, HAS_DOCUMENTS: tl.constexpr):
    """Of documents, for tokens by their numbers; anything where there are none."""
    if HAS_DOCUMENTS:
        return tl.load(base + number, mask=number < count, other=-1)
    else:
        return number
