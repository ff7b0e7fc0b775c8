"""Attention functions that are registered with Transformers' AttentionInterface.

`stand_in_for_flash` does on any device, slowly, what the flash kernels do on a GPU: attention inside segments of one
joined row, told by cumulative lengths. On the twin it shows whether a model hands these lengths on to its attention.
"""

from __future__ import annotations

import itertools

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

_STAND_IN = "segments_without_kernel"


def stand_in_for_flash() -> str:
    """Register the stand-in, and return the `attn_implementation` by which a model takes it."""
    AttentionInterface.register(_STAND_IN, segment_attention)
    AttentionMaskInterface.register(_STAND_IN, flash_attention_mask)
    return _STAND_IN


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention of query (batch, heads, seq, head_dim) on fewer or as many key and value heads.

    cu_seq_lens_q: starts of the segments of a single row and its length, (segments + 1,). Without it, position_ids
    (1, seq) of a single row begin a segment wherever they are lowest. Without either each row is one. sliding_window:
    tokens that one sees, itself included. s_aux: a sink's score for each head. Returns (batch, seq, heads, head_dim),
    as attention functions of Transformers do.
    """
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} makes a mask of its own, which flash kernels do not take")
    assert dropout == 0.0, "a twin has none"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if cu_seq_lens_q is not None:
        bounds = cu_seq_lens_q.tolist()
    elif position_ids is not None and len(query) == 1:
        bounds = [*(position_ids[0] == position_ids.min()).nonzero().flatten().tolist(), query.shape[2]]
    else:
        bounds = [0, query.shape[2]]
    outputs = []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(end - start, device=query.device)
        distance = place[:, None] - place[None, :]
        hidden = (distance < 0) | (distance >= (sliding_window or end - start))
        scores = scores.masked_fill(hidden, float("-inf"))
        if s_aux is not None:
            sink = s_aux.reshape(1, -1, 1, 1).expand(len(q), -1, end - start, 1)
            scores = torch.cat([scores, sink], dim=-1)
        outputs.append(scores.softmax(-1)[..., : end - start] @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None
