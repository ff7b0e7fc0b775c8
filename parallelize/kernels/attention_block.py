"""Attention of a block of queries to a block of keys, which may lie anywhere in a sequence, with its log-sum-exp.

    s = scale q k^T              with a softcap c:  s = c tanh(scale q k^T / c)
    L = log(sum(exp(s)))         over the keys that a query sees
    o = exp(s - L) v

and, given the output and L of ALL keys, of which this block is a part, with D = sum(do * o) and P = exp(s - L):

    dv = P^T do      ds = P (do v^T - D)      dq = scale ds k      dk = scale ds^T q

(FlashAttention-2, https://arxiv.org/abs/2307.08691). Scores exist tile by tile. Keys and values are read as they are by
all query heads of their group. One kernel finds the gradient of queries and one those of keys and values, each program
adding up its own rows, so that results are the same every time with the same tiles (`search.py`). Sums are in fp32, and
so is what is returned; matrix products take their factors in the dtype of the inputs.

Of the tiles, those that the mask leaves empty are not visited, and in those that it leaves whole nothing is compared.
That is known from the places of tokens; for documents `_document_ranges` finds it first.

What blocks are for, and the same in plain torch: `parallelize/context_parallel/blocks.py`. Recomputation and the
compiler see an operator around all blocks of a layer (`context_parallel/operator.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from parallelize.kernels.attention_block_kernels import forward_kernel, grad_key_kernel, grad_query_kernel
from parallelize.kernels.attention_block_tiles import (
    SMALLEST,
    Tiles,
    forward_tiles,
    grad_key_tiles,
    grad_query_tiles,
    widths,
)
from parallelize.kernels.language import launches_on
from parallelize.kernels.search import SEARCH, bucket

LARGEST_HEAD = {torch.float32: 256, torch.bfloat16: 512, torch.float16: 512}
"""The widest queries, keys and values that tiles have room for, of every dtype that is computed."""


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

    def prepare(tiles: Tiles) -> Callable[[], object]:
        mask, options = _mask_arguments(plan, batch, tiles, by_queries=True)
        return partial(
            forward_kernel[(_count(queries, tiles.queries), heads, batch)],
            query, key, value, out, log_sum, *_strides(query, key, value), *mask, queries, key.shape[2],
            *_factors(plan, query.dtype), **options, **_sizes(query, key, value, tiles),
        )  # fmt: skip

    if out.numel() or log_sum.numel():
        candidates = forward_tiles(query, value) if tiles is None else [tiles]
        _launch("attention_block_forward", (query, key, value), plan, candidates, prepare)
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

    def prepare_for_queries(tiles: Tiles) -> Callable[[], object]:
        mask, options = _mask_arguments(plan, batch, tiles, by_queries=True)
        return partial(
            grad_query_kernel[(_count(queries, tiles.queries), heads, batch)],
            *tensors, *sums, grads[0], *_strides(*tensors), *mask, queries, keys, *factors, plan.scale,
            **options, **_sizes(query, key, value, tiles),
        )  # fmt: skip

    def prepare_for_keys(tiles: Tiles) -> Callable[[], object]:
        mask, options = _mask_arguments(plan, batch, tiles, by_queries=False)
        hides_more = options["HAS_WINDOW"] or options["HAS_CHUNK"] or options["HAS_DOCUMENTS"]
        has_end = hides_more or queries % tiles.queries > 0 or keys % tiles.keys > 0
        return partial(
            grad_key_kernel[(_count(keys, tiles.keys), key_heads, batch)],
            *tensors[:4], *sums, *grads[1:], *_strides(*tensors[:4]), *mask, queries, keys, *factors,
            plan.scale, **options, HAS_END=has_end, **_sizes(query, key, value, tiles),
        )  # fmt: skip

    if query.numel():
        candidates = grad_query_tiles(query, value) if tiles is None else [tiles]
        _launch("attention_block_grad_query", tensors[:3], plan, candidates, prepare_for_queries)
    if key.numel():
        candidates = grad_key_tiles(query, value) if tiles is None else [tiles]
        _launch("attention_block_grad_key", tensors[:3], plan, candidates, prepare_for_keys)
    return tuple(grads)


def _launch(
    kernel: str,
    tensors: tuple[torch.Tensor, ...],
    plan: BlockPlan,
    candidates: list[Tiles],
    prepare: Callable[[Tiles], Callable[[], object]],
) -> None:
    """tensors: query, key and value. A kernel writes all that it returns anew, and may run several times."""
    query, key, value = tensors
    batch, heads, queries, dim = query.shape
    key_heads, keys, value_dim = *key.shape[1:3], value.shape[-1]
    details = (
        str(query.dtype), dim, value_dim, heads // key_heads, bucket(queries), bucket(keys), bucket(batch * heads),
        *(size and bucket(size) for size in (plan.window, plan.chunk)),
        plan.query_documents is not None, plan.softcap is not None,
    )  # fmt: skip
    products = batch * heads * queries * keys * (dim + value_dim)
    SEARCH.launch(kernel, query.device, details, candidates, prepare, products=products, spare=SMALLEST)


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


def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles) -> dict[str, int]:
    width, value_width = widths(query, value)
    return {
        "GROUP": query.shape[1] // key.shape[1], "DIM": query.shape[-1], "VALUE_DIM": value.shape[-1],
        "WIDTH": width, "VALUE_WIDTH": value_width, "QUERIES": tiles.queries, "KEYS": tiles.keys,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
