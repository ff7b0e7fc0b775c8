"""Attention heads: which modules count them, and under which names attributes, config fields and arguments do."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from transformers_backend.decoder import Decoder
from transformers_backend.tensor_plan.matrices import input_features, is_matrix, output_features

# Attributes of attention modules, and fields of configs, by what they count.
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_GROUPS = ("num_key_value_groups",)
_WIDTHS = ("split_size", "embed_dim", "hidden_size", "all_head_size", "qk_dim", "v_dim")
_KEY_VALUE_WIDTHS = ("kv_dim",)
# Arguments of attention modules that have a dimension of heads, and what such biases may already be added to.
_BIASES = ("alibi", "position_bias")
_MASK = "attention_mask"
# Arguments of layers, beside hidden states, that are (batch, seq, features): what gemma3n and gemma4 give each layer.
_SEQUENCE_ARGUMENTS = ("per_layer_input",)


def heads_of(model: PreTrainedModel, decoder: Decoder, name: str) -> tuple[int, int] | None:
    """(query heads, key and value heads) of the block that `name` is (in), or None for one without heads."""
    if name in decoder.layers:
        return None
    block = _block_name(decoder, name)
    if not any(word in block.lower() for word in ("attn", "attention")):
        root = model.get_submodule(block)
        if not any(key in _HEADS for module in root.modules() for key in vars(module)):
            return None
    layer = next(index for index, layer in enumerate(decoder.layers) if f"{name}.".startswith(f"{layer}."))
    counts = head_counts(model.config, layer)
    return _counts_of_fused(model.get_submodule(block), counts[0]) or counts


def _counts_of_fused(attention: nn.Module, query_heads: int) -> tuple[int, int] | None:
    """Head counts by the sizes of an attention's two linears, of which one yields queries, keys and values.

    Falcon's config has key and value heads that its model leaves out with `multi_query`, for one.
    """
    matrices = [module for module in attention.modules() if is_matrix(module)]
    if len(matrices) != 2:
        return None
    last, fused = sorted(matrices, key=output_features)
    return fused_head_counts(output_features(fused), input_features(last), query_heads)


def is_fused(model: PreTrainedModel, decoder: Decoder, name: str) -> bool:
    """Whether the linear `name` of an attention yields queries, keys and values in one."""
    attention = model.get_submodule(_block_name(decoder, name))
    largest = max((module for module in attention.modules() if is_matrix(module)), key=output_features)
    counts = _counts_of_fused(attention, heads_of(model, decoder, name)[0])
    return counts is not None and largest is model.get_submodule(name)


def fused_head_counts(features: int, ends: int, query_heads: int) -> tuple[int, int] | None:
    """(query heads, key and value heads) of a linear that yields queries, keys and values of one size per head.

    features: what it yields; ends: inputs of the linear that ends the attention. None where it is no such linear.
    """
    head_dim = ends // query_heads
    key_value, rest = divmod(features - ends, 2 * head_dim) if head_dim else (0, 1)
    return (query_heads, key_value) if rest == 0 and key_value > 0 and query_heads % key_value == 0 else None


def _block_name(decoder: Decoder, name: str) -> str:
    """The child of a decoder layer that `name` is, or is in."""
    layer = next((layer for layer in decoder.layers if name.startswith(f"{layer}.")), None)
    if layer is None:
        return name
    return f"{layer}.{name.removeprefix(f'{layer}.').partition('.')[0]}"


def head_counts(hf_config, layer: int | None) -> tuple[int, int]:
    """(query heads, key and value heads) of a layer's attention."""
    fields = hf_config.to_dict()
    per_layer = {int(index): settings for index, settings in (fields.get("per_layer_config") or {}).items()}
    fields = {**fields, **per_layer.get(layer, {})}
    heads = next(fields[name] for name in _HEADS if isinstance(fields.get(name), int))
    key_value = next((fields[name] for name in _KEY_VALUE_HEADS if isinstance(fields.get(name), int)), heads)
    return heads, key_value


def local_attributes(attention: nn.Module, heads: tuple[int, int], degree: int) -> tuple[dict, dict]:
    """Values that head counts of an attention module, and of the config it reads, have on one of `degree` ranks."""
    query, key_value = heads
    local_query, local_key_value = query // degree, max(1, key_value // degree)

    def local(name: str, value) -> int | None:
        if name in _HEADS and value == query:
            return local_query
        if name in _KEY_VALUE_HEADS and value == key_value:
            return local_key_value
        return None

    attributes = {}
    for prefix, module in attention.named_modules():
        for name, value in vars(module).items():
            full = f"{prefix}.{name}" if prefix else name
            if (count := local(name, value)) is not None:
                attributes[full] = count
            elif name in _GROUPS and value == query // key_value:
                attributes[full] = local_query // local_key_value
            elif not prefix and name in _KEY_VALUE_WIDTHS:
                attributes[full] = value // key_value * local_key_value
            elif not prefix and name in _WIDTHS and isinstance(value, int) and value % degree == 0:
                attributes[full] = value // degree
    config = {}
    if "config" in vars(attention):
        fields = attention.config.to_dict()
        config = {name: count for name in fields if (count := local(name, fields[name])) is not None}
    return attributes, config


def head_arguments(attention: nn.Module, heads: int) -> dict[str, int]:
    """Arguments of the forward of an attention module of which every rank takes its own heads."""
    names = set(inspect.signature(attention.forward).parameters)
    biases = names.intersection(_BIASES)
    return dict.fromkeys(sorted(biases | (names & {_MASK} if biases else set())), heads)


def sequence_arguments(layer: nn.Module) -> tuple[str, ...]:
    """Arguments of a decoder layer that are cut along the sequence as its hidden states are."""
    return tuple(name for name in inspect.signature(layer.forward).parameters if name in _SEQUENCE_ARGUMENTS)
