"""Fused projections: in which order one linear's outputs hold queries, keys and values, or gate and up.

[q | k | v], [q k v of head 0 | of head 1 | ...] and others look alike in a state dict. What tells them apart is which
outputs of the fused linear reach which inputs of the linear that ends the block, and that is read off the twin: one
backward for each part of the latter. `block.py` asks for the layouts, `sizes.py` turns a layout's word into segments.
"""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from parallelize.tensor_parallel.plan import Segment
from transformers_backend.tensor_plan.attention_heads import fused_head_counts
from transformers_backend.tensor_plan.matrices import input_features, output_features

_BLOCKS = re.compile(r"(packed_qkv|rowwise)_in_(\d+)")


def fused_layouts(
    twin: PreTrainedModel, fused: str, last: str, query_heads: int | None, input_ids: torch.Tensor
) -> list[tuple[str, str]]:
    """Words for the linear `fused` and for `last`, which ends the block, that fit what the twin computes; best first.

    query_heads: of the twin's attention, None for an mlp. Empty for a linear that is not fused, or not as known here.
    """
    features = output_features(twin.get_submodule(fused))
    ends = input_features(twin.get_submodule(last))
    if query_heads is None:
        candidates = [("packed_gate_up", "rowwise"), ("colwise", "rowwise")] if features == 2 * ends else []
        counts = None
    else:
        counts = fused_head_counts(features, ends, query_heads)
        candidates = [] if counts is None else _attention_candidates(*counts)
    if not candidates:
        return []
    pieces = query_heads or 2
    reaches = _reaches(twin, fused, last, pieces, input_ids)
    return [words for words in candidates if _fits(reaches, *words, features, ends, counts)]


def packed_segments(word: str, size: int, heads: tuple[int, int] | None) -> tuple[Segment, ...] | None:
    """The segments of a linear's `size` features (inputs for "rowwise") by its word; None for one without."""
    if word == "packed_gate_up":
        return (Segment(size // 2), Segment(size // 2))
    match = _BLOCKS.fullmatch(word)
    word, blocks = (match[1], int(match[2])) if match else (word, 1)
    if heads is None or (word == "rowwise" and blocks == 1) or word not in ("packed_qkv", "rowwise"):
        return None
    query, key_value = (count // blocks for count in heads)
    if word == "rowwise":
        return (Segment(size // blocks, query),) * blocks
    width = size // blocks // (query + 2 * key_value)
    block = (Segment(query * width, query), *[Segment(key_value * width, key_value)] * 2)
    return block * blocks


def _attention_candidates(query: int, key_value: int) -> list[tuple[str, str]]:
    candidates = [("packed_qkv", "rowwise")]
    if query == key_value:  # CodeGen: [q | v | k] of the first heads, of the next ...
        blocks = [count for count in range(2, query) if query % (2 * count) == 0]
        candidates += [(f"packed_qkv_in_{count}", f"rowwise_in_{count}") for count in blocks]
    return [*candidates, ("colwise", "rowwise")] if key_value > 1 else candidates


@torch.enable_grad()
def _reaches(twin: PreTrainedModel, fused: str, last: str, pieces: int, input_ids: torch.Tensor) -> torch.Tensor:
    """(pieces, outputs of `fused`): whether an output has an influence on a piece of the inputs of `last`."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        twin.get_submodule(fused).register_forward_hook(lambda module, args, output: seen.update(fused=output)),
        twin.get_submodule(last).register_forward_pre_hook(lambda module, args: seen.update(last=args[0])),
    ]
    try:
        twin(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    reached = []
    for piece in seen["last"].chunk(pieces, dim=-1):
        # Signs that differ, so that no sum of influences is zero by chance.
        weights = torch.arange(piece.numel(), dtype=piece.dtype, device=piece.device).cos().view_as(piece)
        (gradient,) = torch.autograd.grad((piece * weights).sum(), seen["fused"], retain_graph=True)
        reached.append(gradient.flatten(0, -2).abs().amax(0) > 0)
    return torch.stack(reached)


def _fits(
    reaches: torch.Tensor, word: str, last_word: str, features: int, ends: int, counts: tuple[int, int] | None
) -> bool:
    """Whether two ranks that split by these words each have all that their part of the last linear's inputs needs."""
    outputs = _ranks(packed_segments(word, features, counts) or (Segment(features),))
    inputs = _ranks(packed_segments(last_word, ends, counts) or (Segment(ends),))
    inputs = inputs[:: ends // reaches.shape[0]]  # of the first input of every piece: a head's are on one rank
    foreign = (outputs[None] != inputs[:, None]) & (outputs[None] >= 0)
    return not (reaches.to(foreign.device) & foreign).any()


def _ranks(segments: tuple[Segment, ...]) -> torch.Tensor:
    """The rank of two that has each feature; -1 for one of a head that both have."""
    parts = []
    for segment in segments:
        shared = segment.is_shared(2)
        parts.append(torch.arange(segment.size) * 0 - 1 if shared else torch.arange(segment.size) * 2 // segment.size)
    return torch.cat(parts)
