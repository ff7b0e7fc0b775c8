"""The tensor-parallel plan of a model: the user's, else Transformers' own translated, else derived from the twin.

Flow: `derive_recipe` runs the twin once and sees which matrices read a block's input, which feed each other and which
comes last -> a recipe, {pattern: style word}, the form in which users write theirs -> `make_plan` works out sizes and
head counts for one model and one degree -> `tensor_proof.py` tries it on the twin -> `parallelize/tensor_parallel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parallelize.tensor_parallel.plan import Region, Segment, Split, TensorPlan
from transformers_backend.decoder import Decoder, head_counts, is_norm, local_attributes

Recipe = dict[str, str]


def pattern_of(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


# -- derived from the twin ------------------------------------------------------------------------------------------


def derive_recipe(twin: PreTrainedModel, decoder: Decoder, input_ids: torch.Tensor) -> Recipe:
    """Styles of every module with weights, from one run of the twin."""
    recipe = {pattern_of(name): "replicate" for name, _ in _modules_with_weights(twin)}
    recipe[decoder.embedding] = recipe[decoder.head] = "vocabulary"
    blocks = {name: block for layer in decoder.layers for name, block in _blocks(twin, layer).items()}
    runs = _trace(twin, [name for names in blocks.values() for name in names], input_ids)
    for root, matrices in blocks.items():
        ran = [name for name in runs.order if name in matrices]
        if len(ran) < 2:
            continue
        *inner, last = ran
        feeders = {name for reader in inner for name in runs.feeding[reader]}
        for name in inner:
            recipe[pattern_of(name)] = "replicate" if name in feeders else "colwise"
        recipe[pattern_of(last)] = "rowwise"
        if root in ran or is_layer(root, decoder):
            for name in inner:
                recipe[pattern_of(name)] += "+region"
        else:
            recipe[pattern_of(root)] = "region"
    return recipe


def is_layer(name: str, decoder: Decoder) -> bool:
    return name in decoder.layers


def _modules_with_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            yield name, module


def _blocks(model: nn.Module, layer: str) -> dict[str, list[str]]:
    """{block: its matrices}: the layer's children that have several, and the layer itself for those it owns."""
    blocks: dict[str, list[str]] = {}
    for child_name, child in model.get_submodule(layer).named_children():
        name = f"{layer}.{child_name}"
        if is_matrix(child):
            blocks.setdefault(layer, []).append(name)
        elif matrices := [f"{name}.{inner}" for inner, module in child.named_modules() if is_matrix(module)]:
            blocks[name] = matrices
    return blocks


class _Runs:
    """What one forward showed: the order in which matrices ran, and whose outputs reached each one's input."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.feeding: dict[str, set[str]] = {}


@torch.enable_grad()
def _trace(model: nn.Module, names: list[str], input_ids: torch.Tensor) -> _Runs:
    runs, outputs = _Runs(), {}

    def hook(name):
        def record(module, args, output):
            runs.feeding[name] = _reached(args[0].grad_fn, outputs)
            runs.order.append(name)
            outputs[output.grad_fn] = name

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _reached(node, outputs: dict) -> set[str]:
    """Names of the outputs that a gradient arriving at `node` reaches without passing another one."""
    found, seen, stack = set(), set(), [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in outputs:
            found.add(outputs[node])
        else:
            stack.extend(parent for parent, _ in node.next_functions)
    return found


# -- for one model and degree ---------------------------------------------------------------------------------------


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
