"""The twin: the same architecture from the same config class, shrunken until it runs in milliseconds on a CPU.

Whatever this project infers about a model (how to run its head chunk by chunk, which layers may be compiled, how
it splits) is tried on the twin against plain Transformers before it is trusted on the real model. That replaces a
list of supported models. `scripts/verify.sh` is the same thing as a command.

Flow: HF config -> `twin_config` (pure arithmetic on the config's fields) -> `build_twin` (a seeded model).

The usual twin has one layer of every kind. A *tall* twin (`all_layers`) has tiny widths but all layers, each under its
own number, so that what is found out layer by layer (where a pipeline may be cut) holds for the model itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN_SIZE = 64
HEADS = 4
HEAD_DIM = HIDDEN_SIZE // HEADS
INTERMEDIATE_SIZE = 96
VOCABULARY_SIZE = 260
POSITIONS = 64
WINDOW = 8  # shorter than the sequences that are tried, so that a wrong mask shows

# Config fields by meaning, under every name that Transformers' causal LMs give them. Only fields that a config has
# and that hold a positive integer are changed; everything else (biases, tying, scales, softcaps, rope type,
# activation, norm epsilon ...) stays, because it is what makes the architecture.
_HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd", "embedding_dim")
_HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_INTERMEDIATE_SIZES = ("intermediate_size", "n_inner", "ffn_dim", "dff", "ffn_hidden_size")
_SMALL_VALUES: dict[str, int] = {
    **dict.fromkeys(_HIDDEN_SIZES, HIDDEN_SIZE),
    **dict.fromkeys(_HEAD_COUNTS, HEADS),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), HEAD_DIM // 2),
    "qk_head_dim": HEAD_DIM + HEAD_DIM // 2,
    **dict.fromkeys(_INTERMEDIATE_SIZES, INTERMEDIATE_SIZE),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY_SIZE),
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("sliding_window", "window_size", "local_attention", "keep_window_size"), WINDOW),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "laurel_rank", "hidden_size_per_layer_input"), HEAD_DIM),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "chunk_size": WINDOW,
    "attention_hidden_size": 2 * HIDDEN_SIZE,  # zamba, zamba2: attention is twice as wide as the model
    "attention_head_dim": 2 * HEAD_DIM,
    "mamba_headdim": HEAD_DIM,
    "dim_model_base": HIDDEN_SIZE // 4,  # minicpm3 divides logits by hidden_size / dim_model_base
    "block_multiple_of": 32,
}
# Fields whose None means "derive it", by a rule that some of the config classes only know for their default sizes.
_DERIVED_WHEN_NONE: dict[str, int] = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
# What grows with the number of tensor-parallel ranks (minicpm3's dim_model_base is a fraction of the hidden size).
_DIVIDED_FIELDS = (*_HIDDEN_SIZES, *_HEAD_COUNTS, *_INTERMEDIATE_SIZES, "word_embed_proj_dim", "dim_model_base")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
# gpt_neo's ("global" | "local") list is derived from its `attention_types` and must not be passed beside it.
_DERIVED_FIELDS = ("attention_layers", "head_dim_total")
_LAYER_INDICES = ("full_attn_idxs", "hybrid_layer_ids")  # lists of layer numbers rather than of one value a layer
_MINIMUM_LAYERS = 2


def twin_config(
    hf_config: PreTrainedConfig,
    *,
    degree: int = 1,
    all_layers: bool = False,
    repeat: int = 1,
    minimum_layers: int | None = None,
) -> PreTrainedConfig:
    """Return a config of the same class with tiny sizes and every kind of layer kept.

    Head structure is preserved: a model whose key/value heads equal its query heads keeps that, one with fewer
    (grouped-query attention) has half as many, one with a single one (multi-query) keeps a single one.

    degree: of tensor parallelism, for which widths are multiples of it and a model with fewer key/value heads than
    ranks has fewer in the twin, too.

    all_layers: keep every layer under its own number (the tall twin); the next two have no effect then.
    repeat: how many layers of a kind are kept, where there are as many.
    minimum_layers: how many layers are kept at least: `repeat` is raised, for all kinds alike, until they are. A model
    of fewer layers keeps those that it has, and grows only where its config says nothing of single layers. None: two,
    or one for a model of one layer.
    """
    small = _shrunken_fields(hf_config, all_layers, repeat, minimum_layers)
    if degree > 1:
        _widen(hf_config.to_dict(), small, degree)
    for key in ("architectures", "transformers_version", "dtype", "model_type", "_name_or_path"):
        small.pop(key, None)
    return type(hf_config)(**small)


def _shrunken_fields(
    hf_config: PreTrainedConfig, all_layers: bool, repeat: int, minimum_layers: int | None
) -> dict[str, Any]:
    fields = hf_config.to_dict()
    kept_layers = list(range(_layer_count(fields))) if all_layers else _choose_layers(fields, repeat, minimum_layers)
    small = {key: _shrink(key, value) for key, value in fields.items() if key not in _DERIVED_FIELDS}
    if "max_position_embeddings" in fields and not fields.get("rope_parameters"):
        small["max_position_embeddings"] = POSITIONS  # a table of learned positions; rotary ones cost nothing
    _shrink_key_value_heads(fields, small)
    if fields.get("head_dim") and fields.get("head_dim") == fields.get("qk_rope_head_dim"):  # MLA: youtu
        small["head_dim"] = small["qk_rope_head_dim"]
    elif fields.get("head_dim") and _has_head_size_of_its_own(fields):
        small["head_dim"] = 2 * HEAD_DIM
    if fields.get("word_embed_proj_dim"):  # OPT: an embedding narrower than the layers has projections
        small["word_embed_proj_dim"] = HIDDEN_SIZE if fields["word_embed_proj_dim"] == fields["hidden_size"] else 32
    _select_layers(fields, small, kept_layers)
    _shrink_rope(fields, small)
    _clamp_token_ids(small)
    return small


def _widen(fields: dict, small: dict, degree: int) -> None:
    """Multiply what is divided over tensor-parallel ranks, so that every rank has two heads or more."""
    factor = degree // 2 if degree % 2 == 0 else degree
    for key, value in small.items():
        if key in _KEY_VALUE_HEADS and value is not None:
            is_shared = isinstance(fields[key], int) and fields[key] < degree and degree % fields[key] == 0
            small[key] = fields[key] if is_shared else value * factor
        elif key in _DIVIDED_FIELDS and _is_positive_integer(value):
            small[key] = value * factor
        elif key in _DIVIDED_FIELDS and isinstance(value, list):  # one a layer
            small[key] = [size * factor for size in value]


def build_twin(
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    *,
    degree: int = 1,
    all_layers: bool = False,
    repeat: int = 1,
    minimum_layers: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    fields: Mapping[tuple[str, ...], Any] | None = None,
) -> PreTrainedModel:
    """Build the seeded twin of a model on the CPU, in evaluation mode's randomness-free form (dropout set to 0).

    `degree`, `all_layers`, `repeat` and `minimum_layers` are those of `twin_config`. fields: of the twin's config, by
    their path, to have other values; modules that drop something then keep their probability.

    Weights that the architecture initialises to exactly 0 or 1 (biases, norm weights) are perturbed: a bias that is
    dropped or a norm that is applied twice would otherwise go unnoticed.
    """
    config = twin_config(hf_config, degree=degree, all_layers=all_layers, repeat=repeat, minimum_layers=minimum_layers)
    for (*outer, name), value in (fields or {}).items():
        setattr(functools.reduce(getattr, outer, config), name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = model_class._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout) and not fields:
            module.p = 0.0
    return twin.train()


def _shrink(key: str, value: Any) -> Any:
    if isinstance(value, dict) and "model_type" in value and key.endswith("_config"):  # a nested config (mpt)
        return {k: _shrink(k, v) for k, v in value.items()}
    if key in _SMALL_VALUES and _is_positive_integer(value):
        return _SMALL_VALUES[key]
    if key in _SMALL_VALUES and isinstance(value, list) and all(map(_is_positive_integer, value)):  # one a layer
        return [_SMALL_VALUES[key]] * len(value)
    if value is None and key in _DERIVED_WHEN_NONE:
        return _DERIVED_WHEN_NONE[key]
    if "dropout" in key or key in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        return 0.0 if isinstance(value, float) else value
    return value


def _has_head_size_of_its_own(fields: dict) -> bool:
    """Whether heads x head_dim is not the hidden size (Qwen3, Gemma ...): then the output projection is no square."""
    heads, hidden_size = fields.get("num_attention_heads"), fields.get("hidden_size")
    return bool(heads and hidden_size) and fields["head_dim"] * heads != hidden_size


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shrink_key_value_heads(fields: dict, small: dict) -> None:
    heads = next((fields[key] for key in ("num_attention_heads", "n_head") if fields.get(key)), None)
    for key in _KEY_VALUE_HEADS:
        if fields.get(key) and heads:
            small[key] = HEADS if fields[key] == heads else 1 if fields[key] == 1 else HEADS // 2


def _choose_layers(fields: dict, repeat: int, minimum_layers: int | None) -> list[int]:
    """Indices of the layers that the twin keeps: the first `repeat` of every kind, in order, and more for a minimum.

    A layer's kind is its entry in `layer_types`, whether it has settings of its own (gemma4's `per_layer_config`),
    its other per-layer entries (smollm3's `no_rope_layers`), and whether it reuses an earlier layer's keys and
    values (the last `num_kv_shared_layers`).
    """
    count = _layer_count(fields)
    if minimum_layers is not None and count < minimum_layers and _layers_are_alike(fields):
        return list(range(minimum_layers))
    per_layer_lists = [fields[key] for key in _per_layer_lists(fields) if key not in _LAYER_INDICES]
    first_shared = count - (fields.get("num_kv_shared_layers") or 0)
    kinds: dict[tuple, list[int]] = {}
    for index in range(count):
        kind = (index >= first_shared, *(str(values[index]) for values in per_layer_lists))
        kinds.setdefault(kind, []).append(index)
    wanted = min(_MINIMUM_LAYERS if minimum_layers is None else max(minimum_layers, _MINIMUM_LAYERS), count)
    while sum(len(indices[:repeat]) for indices in kinds.values()) < wanted:
        repeat += 1
    return sorted(index for indices in kinds.values() for index in indices[:repeat])


def _layers_are_alike(fields: dict) -> bool:
    """Whether a config says nothing of single layers, so that there can be more of them."""
    per_layer = ("num_kv_shared_layers", "per_layer_config", "attention_types", *_LAYER_INDICES)
    return not _per_layer_lists(fields) and not any(fields.get(key) for key in per_layer)


def _per_layer_lists(fields: dict) -> list[str]:
    """The fields that have one entry a layer: lists of that length, but for those of several special tokens."""
    count = _layer_count(fields)
    lists = [key for key, value in fields.items() if isinstance(value, list) and len(value) == count]
    return [key for key in lists if not key.endswith("token_id") and key != "architectures"]


def _layer_count(fields: dict) -> int:
    """Layers of a model, or of each of its stacks (hrm_text, whose `num_hidden_layers` counts every run of a layer)."""
    names = ("num_layers_per_stack", *_LAYER_COUNTS)
    return next(fields[key] for key in names if isinstance(fields.get(key), int))


def _select_layers(fields: dict, small: dict, kept: list[int]) -> None:
    count = _layer_count(fields)
    for key in _LAYER_COUNTS:
        if fields.get(key) == count:
            small[key] = len(kept)
    for key in _per_layer_lists(fields):
        if key in small:
            small[key] = [small[key][index] for index in kept]
    if fields.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = sum(i >= count - fields["num_kv_shared_layers"] for i in kept)
    if fields.get("per_layer_config"):
        small["per_layer_config"] = {
            f"{new:02d}": {k: 2 * small["head_dim"] if k == "head_dim" else v for k, v in settings.items()}
            for new, old in enumerate(kept)
            if (settings := _settings_of_layer(fields["per_layer_config"], old))
        }
    if fields.get("attention_types"):  # gpt_neo: [[["global", "local"], how often this pattern is repeated]]
        small["attention_types"] = [[[fields["attention_layers"][index] for index in kept], 1]]
    if fields.get("num_layers_per_stack"):  # hrm_text: two stacks, each run several times
        small["num_layers_per_stack"] = len(kept)
        small["num_hidden_layers"] = fields["num_hidden_layers"] // count * len(kept)
    for key in _LAYER_INDICES:
        if fields.get(key):
            small[key] = [new for new, old in enumerate(kept) if old in fields[key]]


def _settings_of_layer(per_layer_config: dict, index: int) -> dict | None:
    return next((settings for key, settings in per_layer_config.items() if int(key) == index), None)


def _shrink_rope(fields: dict, small: dict) -> None:
    """Cut per-frequency lists (phi3's long and short factors) to the number of frequencies that the twin has."""
    rope = fields.get("rope_parameters", fields.get("rope_scaling"))
    if not isinstance(rope, dict):
        return
    if not rope:  # cohere_compass_text has no default, and only real checkpoints state theirs
        default = {"rope_type": "default", "rope_theta": 10000.0}
        small["rope_parameters"] = {kind: dict(default) for kind in set(fields["layer_types"])}
        return
    head_dim = small.get("qk_rope_head_dim") or small.get("head_dim") or HEAD_DIM
    frequencies = math.floor(head_dim * (rope.get("partial_rotary_factor") or 1.0)) // 2
    shrunk = {
        key: value[:frequencies] if key in ("short_factor", "long_factor") and value else value
        for key, value in rope.items()
    }
    small["rope_parameters" if "rope_parameters" in fields else "rope_scaling"] = shrunk


def _clamp_token_ids(small: dict) -> None:
    """Special tokens must lie inside the small vocabulary (an embedding checks its padding index)."""
    for key, value in small.items():
        if key.endswith("token_id") and value is not None:
            ids = [v % VOCABULARY_SIZE for v in (value if isinstance(value, list) else [value])]
            small[key] = ids if isinstance(value, list) else ids[0]
