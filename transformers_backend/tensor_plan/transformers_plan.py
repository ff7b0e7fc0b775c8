"""Transformers' own tensor-parallel plan of a model (`base_model_tp_plan`), in the words used here.

It is a table from patterns to styles as well, with other ideas of what a style communicates: where it gathers features
to compute something whole (`colwise_gather_output`, `rowwise_split_input`, MLA's and experts' styles, the embedding),
the derived recipe splits more, so those entries are left to it.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from transformers_backend.decoder import Decoder
from transformers_backend.tensor_plan.attention_heads import heads_of
from transformers_backend.tensor_plan.recipe import Recipe, pattern_of

_WORDS = {"colwise": "colwise", "rowwise": "rowwise", "replicated_with_grad_allreduce": "replicate"}
_PACKED = "packed_colwise"


def recipe_of_transformers(model: PreTrainedModel, decoder: Decoder) -> Recipe:
    """The entries of Transformers' plan, with the base model's name in front, that say the same thing here."""
    names: dict[str, str] = {}  # of a module of the first layer that has it, by pattern
    for name, _ in model.named_modules():
        names.setdefault(pattern_of(name), name)
    recipe = {}
    for pattern, style in (model._tp_plan or {}).items():
        if pattern not in names or "*" not in pattern:
            continue
        if style in _WORDS:
            recipe[pattern] = _WORDS[style]
        elif style == _PACKED:
            has_heads = heads_of(model, decoder, names[pattern]) is not None
            recipe[pattern] = "packed_qkv" if has_heads else "packed_gate_up"
    return recipe
