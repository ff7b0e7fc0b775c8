"""The three kernels of attention blocks, whose maths and arguments are in `attention_block.py`."""

from __future__ import annotations

from parallelize.kernels.attention_block_parts import (
    exp,
    for_exp,
    key_tiles,
    load_numbers,
    load_rows,
    query_tiles,
    scores_of,
    sees,
    store_rows,
)
from parallelize.kernels.language import jit, tl


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
        key_tile = load_rows(key, tile * KEYS, keys, key_row, IS_PARTIAL, KEYS, DIM, WIDTH)
        products = tl.dot(query, tl.trans(key_tile), input_precision="ieee")
        scores, _ = scores_of(products, factor, outer, HAS_SOFTCAP)
        if IS_PARTIAL:
            key_number = tile * KEYS + tl.arange(0, KEYS)
            key_document = load_numbers(key_documents, key_number, keys, HAS_DOCUMENTS)
            seen = sees(
                query_number[:, None], key_number[None, :], keys, query_start, key_start, window, chunk,
                query_document[:, None], key_document[None, :], HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        greater = tl.maximum(most, tl.max(scores, 1))
        # Where nothing has been seen yet, anything but -inf, from which -inf cannot be taken away.
        level = tl.where(greater == float("-inf"), 0.0, greater)
        weights = exp(scores - level[:, None], query)
        shrink = exp(most - level, query)
        value_tile = load_rows(value, tile * KEYS, keys, value_row, IS_PARTIAL, KEYS, VALUE_DIM, VALUE_WIDTH)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(value_tile.dtype), value_tile, out, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        most = greater
    return out, total, most


@jit
def forward_kernel(
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
    query_document = load_numbers(query_documents, query_number, queries, HAS_DOCUMENTS)
    query_tile = load_rows(
        query + batch * query_batch + head * query_head, tile * QUERIES, queries, query_row, True, QUERIES, DIM, WIDTH
    )
    first, whole_first, whole_stop, stop = key_tiles(
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
    store_rows(
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
        key_tile = load_rows(key, tile * KEYS, keys, key_row, IS_PARTIAL, KEYS, DIM, WIDTH)
        value_tile = load_rows(value, tile * KEYS, keys, value_row, IS_PARTIAL, KEYS, VALUE_DIM, VALUE_WIDTH)
        products = tl.dot(query, tl.trans(key_tile), input_precision="ieee")
        scores, slope = scores_of(products, factor, outer, HAS_SOFTCAP)
        if IS_PARTIAL:
            key_number = tile * KEYS + tl.arange(0, KEYS)
            key_document = load_numbers(key_documents, key_number, keys, HAS_DOCUMENTS)
            seen = sees(
                query_number[:, None], key_number[None, :], keys, query_start, key_start, window, chunk,
                query_document[:, None], key_document[None, :], HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        weights = exp(scores - log_sum[:, None], query)
        change = tl.dot(grad_out, tl.trans(value_tile), input_precision="ieee")
        grad_scores = weights * (change - delta[:, None])
        if HAS_SOFTCAP:
            grad_scores = grad_scores * slope
        grad = tl.dot(grad_scores.to(key_tile.dtype), key_tile, grad, input_precision="ieee")
    return grad


@jit
def grad_query_kernel(
    query, key, value, grad_out, out, log_sum, delta, grad_query,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_out_batch, grad_out_head, grad_out_row, out_batch, out_head, out_row,
    query_start, key_start, window, chunk, query_documents, key_documents, ranges, query_document_row,
    key_document_row, queries, keys, factor, outer, scale,
    HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`; also finds and keeps `delta`, the sum of output times its gradient of every query."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key += batch * key_batch + head // GROUP * key_head
    value += batch * value_batch + head // GROUP * value_head
    if HAS_DOCUMENTS:
        query_documents += batch * query_document_row
        key_documents += batch * key_document_row
        ranges += (batch * tl.num_programs(0) + tile) * 4
    query_number = tile * QUERIES + tl.arange(0, QUERIES)
    query_document = load_numbers(query_documents, query_number, queries, HAS_DOCUMENTS)
    query_tile = load_rows(
        query + batch * query_batch + head * query_head, tile * QUERIES, queries, query_row, True, QUERIES, DIM, WIDTH
    )
    grad_out_tile = load_rows(
        grad_out + batch * grad_out_batch + head * grad_out_head, tile * QUERIES, queries, grad_out_row,
        True, QUERIES, VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    out_tile = load_rows(
        out + batch * out_batch + head * out_head, tile * QUERIES, queries, out_row, True, QUERIES, VALUE_DIM,
        VALUE_WIDTH,
    )  # fmt: skip
    place = (batch * tl.num_programs(1) + head) * queries
    inside = query_number < queries
    delta_tile = tl.sum(grad_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + place + query_number, delta_tile, mask=inside)
    log_sum_tile = for_exp(tl.load(log_sum + place + query_number, mask=inside, other=float("-inf")), query_tile)
    grad_out_tile = grad_out_tile.to(query_tile.dtype)
    first, whole_first, whole_stop, stop = key_tiles(
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
    store_rows(grad_query + place * DIM, tile * QUERIES, queries, grad * scale, QUERIES, DIM, WIDTH)


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
        query_tile = load_rows(query, tile * QUERIES, queries, query_row, IS_PARTIAL, QUERIES, DIM, WIDTH)
        grad_tile = load_rows(
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
        scores, slope = scores_of(products, factor, outer, HAS_SOFTCAP)
        if IS_PARTIAL:
            query_document = load_numbers(query_documents, query_number, queries, HAS_DOCUMENTS)
            seen = sees(
                query_number[None, :], key_number[:, None], keys, query_start, key_start, window, chunk,
                query_document[None, :], key_document[:, None], HAS_WINDOW, HAS_CHUNK, HAS_DOCUMENTS,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        weights = exp(scores - for_exp(log_sum_tile, key)[None, :], key)
        grad_value = tl.dot(weights.to(grad_tile.dtype), grad_tile, grad_value, input_precision="ieee")
        change = tl.dot(value, tl.trans(grad_tile), input_precision="ieee")
        grad_scores = weights * (change - delta_tile[None, :])
        if HAS_SOFTCAP:
            grad_scores = grad_scores * slope
        grad_key = tl.dot(grad_scores.to(query_tile.dtype), query_tile, grad_key, input_precision="ieee")
    return grad_key, grad_value


@jit
def grad_key_kernel(
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
    key_document = load_numbers(key_documents, key_number, keys, HAS_DOCUMENTS)
    key_tile = load_rows(
        key + batch * key_batch + number * key_head, tile * KEYS, keys, key_row, True, KEYS, DIM, WIDTH
    )
    value_tile = load_rows(
        value + batch * value_batch + number * value_head, tile * KEYS, keys, value_row, True, KEYS, VALUE_DIM,
        VALUE_WIDTH,
    )  # fmt: skip
    first, whole_first, whole_stop, stop = query_tiles(
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
    store_rows(grad_key + place * DIM, tile * KEYS, keys, key_sums * scale, KEYS, DIM, WIDTH)
    store_rows(grad_value + place * VALUE_DIM, tile * KEYS, keys, value_sums, KEYS, VALUE_DIM, VALUE_WIDTH)
