"""Recipe -> plan: sizes and head counts of one model on one of `degree` ranks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from parallelize.tensor_parallel.plan import Region, Segment, Split, TensorPlan
from transformers_backend.decoder import Decoder
from transformers_backend.tensor_plan.attention_heads import (
    head_arguments,
    heads_of,
    is_fused,
    local_attributes,
    sequence_arguments,
)
from transformers_backend.tensor_plan.fused import packed_segments
from transformers_backend.tensor_plan.matrices import (
    input_features,
    is_matrix,
    is_transposed,
    local_output_features,
    output_features,
)
from transformers_backend.tensor_plan.recipe import Recipe, pattern_of, starred

_MOST_RANKS = 256  # that an error proposes
_MODIFIERS = ("region", "whole_region", "join", "gather", "direct")
_COLWISE = ("colwise", "packed_qkv", "packed_gate_up", "packed_halves")


class DegreeError(ValueError):
    """Heads or features of the model are not divided evenly by the degree."""

    def __init__(self, message: str, candidates: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates  # degrees that divide what this one does not; other parts may refuse them


def make_plan(model: PreTrainedModel, decoder: Decoder, recipe: Recipe, degree: int) -> TensorPlan:
    """Work out `recipe` for the sizes of `model`; a DegreeError lists the degrees that all of it allows."""
    try:
        return _plan(model, decoder, recipe, degree)
    except DegreeError as error:
        fitting = [str(other) for other in error.candidates if _fits(model, decoder, recipe, other)]
        raise DegreeError(f"{error} Use one of {', '.join(fitting)}.", error.candidates) from None


def _fits(model: PreTrainedModel, decoder: Decoder, recipe: Recipe, degree: int) -> bool:
    try:
        _plan(model, decoder, recipe, degree)
    except DegreeError:
        return False
    return True


def _plan(model: PreTrainedModel, decoder: Decoder, recipe: Recipe, degree: int) -> TensorPlan:
    splits: dict[str, Split] = {}
    regions: dict[str, Region] = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in [*(name for name, _ in model.named_modules()), *parameters]:
        words = recipe.get(name, recipe.get(pattern_of(name), recipe.get(starred(name))))
        if words is None:
            continue
        modifiers = set(words.split("+")) & set(_MODIFIERS)
        if modifiers & {"region", "whole_region"}:
            regions[name] = _region(model, decoder, name, degree, is_whole="whole_region" in modifiers)
        for style in [word for word in words.split("+") if word not in modifiers]:
            split = _split(model, decoder, name, style, degree, keeps_heads=not modifiers & {"join", "gather"})
            splits[name] = dataclasses.replace(
                split,
                is_joined="join" in modifiers,
                is_gathered="gather" in modifiers,
                is_direct="direct" in modifiers,
            )
    arguments = sequence_arguments(model.get_submodule(decoder.layers[0]))
    return TensorPlan(degree=degree, splits=splits, regions=regions, sequence_arguments=arguments)


def _region(model: PreTrainedModel, decoder: Decoder, name: str, degree: int, *, is_whole: bool) -> Region:
    if is_whole:
        return Region(is_whole=True)
    module, heads = model.get_submodule(name), heads_of(model, decoder, name)
    if is_matrix(module) or heads is None:
        return Region()
    attributes, config = local_attributes(module, heads, degree)
    return Region(attributes=attributes, config=config, head_arguments=head_arguments(module, heads[0]))


def _split(model: PreTrainedModel, decoder: Decoder, name: str, style: str, degree: int, *, keeps_heads: bool) -> Split:
    if style in ("split", "norm_over_heads"):
        segment = _segment_of_heads(model, decoder, name)
        _check_divides(name, segment, degree, may_share=True)
        return Split(style, (segment,))
    if not style.startswith(("rowwise", *_COLWISE)):
        return Split(style)
    module = model.get_submodule(name)
    transposed, heads = is_transposed(module), heads_of(model, decoder, name) if keeps_heads else None
    if style.startswith("rowwise"):
        segments = packed_segments(style, input_features(module), heads) or ()
        for segment in segments or (Segment(input_features(module)),):
            _check_divides(name, segment, degree, may_share=False)
        return Split("rowwise", segments, transposed)
    size = output_features(module)
    segments = packed_segments(style, size, heads) or _segments(model, decoder, name, style, size, heads)
    for index, segment in enumerate(segments):
        may_share = (_is_narrow(name) or index > 0) and segment.size % degree == 0
        _check_divides(name, segment, degree, may_share=may_share)
    local_size = sum(segment.size // (segment.heads if segment.is_shared(degree) else degree) for segment in segments)
    attributes = local_output_features(module, local_size)
    return Split("colwise", segments, transposed, attributes=attributes)


def _segments(
    model: PreTrainedModel, decoder: Decoder, name: str, style: str, size: int, heads: tuple[int, int] | None
) -> tuple[Segment, ...]:
    """The parts of a colwise matrix's `size` output features."""
    if heads is None:
        return (Segment(size // 3),) * 3 if style == "packed_qkv" else (Segment(size),)
    query, key_value = heads
    # Fused by groups: the queries that share a key and a value lie beside them, so they stay together.
    count = key_value if _is_narrow(name) or is_fused(model, decoder, name) else query
    if style == "packed_halves":
        return (Segment(size // 2, count // 2),) * 2
    return (Segment(size, count),)


def _is_narrow(name: str) -> bool:
    """Whether a projection yields keys or values, by its name."""
    own = name.rpartition(".")[2].lower()
    return "query" not in own and re.search(r"(^|_)(k|v|key|value)(_|$)", own) is not None


def _segment_of_heads(model: PreTrainedModel, decoder: Decoder, name: str) -> Segment:
    """The heads of a parameter that has something for each: a value, a row, or a part of a norm's weight."""
    modules = dict(model.named_modules())
    module: nn.Module | None = modules.get(name)
    parameter = model.get_parameter(name) if module is None else next(module.parameters())
    size, heads = parameter.shape[0], heads_of(model, decoder, name)
    if heads is None:
        return Segment(size)
    query, key_value = heads
    return Segment(size, key_value if size == key_value or _is_narrow(name) else query)


def _check_divides(name: str, segment: Segment, degree: int, *, may_share: bool) -> None:
    count, what = (segment.heads, "heads") if segment.heads is not None else (segment.size, "features")
    shares = may_share and segment.heads is not None
    if count % degree == 0 or (shares and degree % count == 0):
        return
    candidates = [other for other in range(1, min(count, _MOST_RANKS) + 1) if count % other == 0]
    if shares:  # several ranks with the same head
        candidates += [other for other in range(2 * count, _MOST_RANKS + 1, count) if segment.size % other == 0]
    problem = f"parallelism.tensor_parallel_degree = {degree}: {name} has {count} {what}, which it does not divide."
    raise DegreeError(problem, candidates)
