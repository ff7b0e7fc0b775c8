"""What a model gives its attention function, seen on the twin, before sequences are shared among ranks.

A config does not say which of its probabilities is that of attention (GPT-2: `attn_pdrop` among three), nor under which
name it has a softcap. The twin is called once, and for each of these probabilities once more, and what arrives is
noted. `context_proof.py` asks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from parallelize.context_parallel.blocks import BlockAttention, ReferenceBlocks
from parallelize.context_parallel.kernels import choose_blocks, other_blocks
from parallelize.context_parallel.trial import milliseconds_of_blocks, why_not_blocks
from parallelize.distributed import first_reason, gather_objects
from transformers_backend.decoder import dropout_fields
from transformers_backend.flops import attention_costs
from transformers_backend.proof import example_batch
from transformers_backend.twin import build_twin

logger = logging.getLogger(__name__)

_NAME = "context_parallel_noted"  # of the attention function that takes notes


@dataclass(frozen=True)
class AttentionCalls:
    """What all layers together were given."""

    softcaps: tuple[float, ...]
    dropout: float


def refuse_attention_dropout(hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], degree: int) -> None:
    """Raise a ValueError where the model drops attention weights in training; degree: of context parallelism.

    Flash kernels would each draw random numbers of their own for the blocks of one query, and others in the backward.
    Models whose mixers run on the whole sequence may have it: each rank computes all of its own queries.
    """
    found = {
        ".".join(path): value
        for path, value in dropout_fields(hf_config.to_dict())
        if note_attention_calls(hf_config, model_class, path, value).dropout
    }
    if not found:
        return
    named = ", ".join(f"{name} = {value}" for name, value in found.items())
    zeros = ", ".join(f"{name} = 0.0" for name in found)
    raise ValueError(
        f"parallelism.context_parallel_degree = {degree}: attention dropout is not available where ranks share "
        f"sequences, and {model_class.__name__} has {named}. Set hf_transformers.config_overrides = {{ {zeros} }}, or "
        "parallelism.context_parallel_degree = 1."
    )


def choose_blocks_for(
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    layer_count: int,
    device_type: str,
    dtype: torch.dtype,
) -> tuple[BlockAttention, str]:
    """What computes blocks of this very model's attention, by its head sizes and softcap, and a sentence that says so.

    Layers may differ in their heads: the kernel is taken where it serves any of them.
    """
    softcap = next(iter(note_attention_calls(hf_config, model_class).softcaps), None)
    widths = sorted({(cost.query_key_dim, cost.value_dim) for cost in attention_costs(hf_config, layer_count)})
    choices = [
        _tried(device_type, dtype, softcap=softcap, dim=dim, value_dim=value_dim) for dim, value_dim in widths
    ] or [_tried(device_type, dtype, softcap=softcap)]
    kernels = [choice for choice in choices if not isinstance(choice[0], ReferenceBlocks)]
    reasons = list(dict.fromkeys(reason for _, reason in (*kernels, *choices)))
    return (*kernels, *choices)[0][0], "; in other layers ".join(reasons)


def _tried(device_type: str, dtype: torch.dtype, **sizes) -> tuple[BlockAttention, str]:
    """What `choose_blocks` says, or what computes the same and is faster, or the reference where those are wrong on the
    accelerator of some rank."""
    blocks, because = choose_blocks(device_type, dtype, **sizes)
    if device_type == "cpu" or isinstance(blocks, ReferenceBlocks):
        return blocks, because
    device = torch.device(device_type)
    wrong = first_reason(why_not_blocks(blocks, device, dtype, **sizes))
    other = other_blocks(blocks, **sizes)
    other_is_right = other is not None and first_reason(why_not_blocks(other[0], device, dtype, **sizes)) is None
    if wrong is not None and other_is_right:
        return other
    if wrong is None and other_is_right:
        return _faster((blocks, because), other, device, dtype, sizes.get("dim", 64))
    if wrong is None:
        return blocks, because
    logger.warning("Attention of shared sequences is computed slowly: %s is wrong on this device (%s)", because, wrong)
    return ReferenceBlocks(), f"the reference in plain torch: {blocks.name} is wrong on this device"


def _faster(
    one: tuple[BlockAttention, str],
    other: tuple[BlockAttention, str],
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
) -> tuple[BlockAttention, str]:
    """The one that takes the slowest rank less time."""
    times = gather_objects([milliseconds_of_blocks(blocks, device, dtype, dim) for blocks, _ in (one, other)])
    slowest = [max(of_ranks) for of_ranks in zip(*times, strict=True)]
    chosen, because = one if slowest[0] <= slowest[1] else other
    said = ", ".join(f"{blocks.name} {time:.2f} ms" for (blocks, _), time in zip((one, other), slowest, strict=True))
    return chosen, f"{because} (measured: {said})"


def note_attention_calls(
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    path: tuple[str, ...] = (),
    value: float = 0.0,
) -> AttentionCalls:
    """What the twin in training gives attention, with one field of its config, by its path, set to a value."""
    calls = []

    def note(module, query, key, value, attention_mask, dropout=0.0, softcap=None, **kwargs):
        calls.append((softcap, dropout))
        batch, heads, length, _ = query.shape
        return query.new_zeros(batch, length, heads, value.shape[-1]), None

    AttentionInterface.register(_NAME, note)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    twin = build_twin(hf_config, model_class, fields={path: value} if path else {})
    twin.set_attn_implementation(_NAME)
    with torch.no_grad():
        twin(input_ids=example_batch()[0], use_cache=False)
    softcaps = dict.fromkeys(softcap for softcap, _ in calls if softcap is not None)
    return AttentionCalls(tuple(softcaps), max((dropout for _, dropout in calls), default=0.0))
