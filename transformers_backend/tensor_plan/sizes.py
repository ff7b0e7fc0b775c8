"""Recipe -> plan: sizes and head counts of one model on one of `degree` ranks."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parallelize.tensor_parallel.plan import Region, Segment, Split, TensorPlan
from transformers_backend.decoder import Decoder, head_counts, local_attributes
from transformers_backend.tensor_plan.derive import is_matrix
from transformers_backend.tensor_plan.recipe import Recipe, pattern_of


def make_plan(model: PreTrainedModel, decoder: Decoder, recipe: Recipe, degree: int) -> TensorPlan:
    """Work out `recipe` for the sizes of `model`; a ValueError lists the degrees that would do."""
    splits: dict[str, Split] = {}
    regions: dict[str, Region] = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in [*(name for name, _ in model.named_modules()), *parameters]:
        words = recipe.get(pattern_of(name), recipe.get(name))
        if words is None:
            continue
        for word in words.split("+"):
            if word == "region":
                regions[name] = _region(model, decoder, name, degree)
            else:
                splits[name] = _split(model, decoder, name, word, degree)
    return TensorPlan(degree=degree, splits=splits, regions=regions)


def _layer_index(name: str, decoder: Decoder) -> int | None:
    return next((index for index, layer in enumerate(decoder.layers) if name.startswith(f"{layer}.")), None)


def _is_attention(name: str) -> bool:
    return "attn" in name.lower() or "attention" in name.lower()


def _region(model: PreTrainedModel, decoder: Decoder, name: str, degree: int) -> Region:
    if is_matrix(model.get_submodule(name)) or not _is_attention(name):
        return Region()
    heads = head_counts(model.config, _layer_index(name, decoder))
    attributes, config = local_attributes(model.get_submodule(name), heads, degree)
    return Region(attributes=attributes, config=config)


def _split(model: PreTrainedModel, decoder: Decoder, name: str, word: str, degree: int) -> Split:
    if word not in ("colwise", "packed_qkv", "packed_gate_up", "rowwise"):
        return Split(word)
    module = model.get_submodule(name)
    transposed = isinstance(module, Conv1D)
    if word == "rowwise":
        return Split("rowwise", is_transposed=transposed)
    size = module.weight.shape[1 if transposed else 0]
    segments: tuple[Segment, ...]
    if word == "packed_gate_up":
        segments = (Segment(size // 2), Segment(size // 2))
    elif _is_attention(name):
        query, key_value = head_counts(model.config, _layer_index(name, decoder))
        if word == "packed_qkv":
            width = size // (query + 2 * key_value)
            segments = (Segment(query * width, query), *[Segment(key_value * width, key_value)] * 2)
        else:
            is_narrow = any(part in name.rpartition(".")[2] for part in ("k_", "v_", "key", "value"))
            segments = (Segment(size, key_value if is_narrow else query),)
    else:
        segments = (Segment(size),)
    for segment in segments:
        _check_divides(name, segment, degree)
    return Split("colwise", segments, transposed)


def _check_divides(name: str, segment: Segment, degree: int) -> None:
    count, what = (segment.heads, "heads") if segment.heads is not None else (segment.size, "features")
    valid = [d for d in range(1, count + 1) if count % d == 0]
    if segment.is_shared(degree) and degree % segment.heads == 0 and segment.size % degree == 0:
        return
    if count % degree:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {degree}: {name} has {count} {what}, which it does not divide. Use "
            f"one of {', '.join(map(str, valid[:12]))}."
        )
