"""Recipes derived from the twin: one run shows what reads a block's input, what feeds what and what comes last."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from transformers_backend.decoder import Decoder
from transformers_backend.tensor_plan.block import Block, ways_to_split, whole_way
from transformers_backend.tensor_plan.matrices import is_matrix
from transformers_backend.tensor_plan.recipe import Derived, Recipe, pattern_of, starred
from transformers_backend.tensor_plan.trace import is_leaf, trace


def derive(twin: PreTrainedModel, decoder: Decoder, input_ids: torch.Tensor) -> Derived:
    """Styles of every module with weights, from one run of the twin."""
    blocks = {name: block for layer in decoder.layers for name, block in _blocks(twin, layer).items()}
    runs = trace(twin, blocks, input_ids)
    direct = {parameter.rpartition(".")[0] for parameter in runs.direct}
    fixed = {pattern_of(name): "replicate+direct" if name in direct else "replicate" for name in _with_weights(twin)}
    fixed.update({pattern_of(name): "vocabulary" for name in runs.token_embeddings})
    fixed[decoder.embedding] = fixed[decoder.head] = "vocabulary"
    by_pattern: dict[str, list[list[Recipe]]] = {}  # the ways of every block by that name, one a layer
    reducing = {pattern_of(root) for root in blocks if runs.blocks[root].reduces}
    for root, matrices in blocks.items():
        runs.blocks[root].reduces = pattern_of(root) in reducing  # in some layers: one recipe is for all of them
        inside = _inside(twin, root, matrices, decoder)
        replicated = {pattern_of(name): fixed[pattern_of(name)] for name in inside}
        block = Block(twin, decoder, root, matrices, inside, runs.blocks[root], direct, input_ids)
        found = [{**replicated, **way} for way in [*ways_to_split(block), whole_way(block)]]
        by_pattern.setdefault(pattern_of(root), []).append(found)
    ways = {pattern: _merged(layers) for pattern, layers in by_pattern.items()}
    owned = {pattern for block in ways.values() for way in block for pattern in way}
    fixed = {pattern: words for pattern, words in fixed.items() if pattern not in owned}
    return Derived(_for_any_number(fixed), {name: [_for_any_number(way) for way in ways[name]] for name in ways})


def _for_any_number(recipe: Recipe) -> Recipe:
    """With an entry for all items of inner lists that have one style; the model may have more of them than the twin."""
    words: dict[str, set[str]] = {}
    for pattern in recipe:
        words.setdefault(starred(pattern), set()).add(recipe[pattern])
    return {**{pattern: found.pop() for pattern, found in words.items() if len(found) == 1}, **recipe}


def _merged(layers: list[list[Recipe]]) -> list[Recipe]:
    """The ways of a block in all layers, which may differ a little, such as in a bias that only the last one has."""
    count = max(len(ways) for ways in layers) - 1
    numbered = [[ways[min(number, len(ways) - 1)] for ways in layers] for number in range(count)]
    return [
        {pattern: words for way in ways for pattern, words in way.items()}
        for ways in [*numbered, [ways[-1] for ways in layers]]
    ]


def _inside(model: nn.Module, root: str, matrices: list[str], decoder: Decoder) -> list[str]:
    """Names of what belongs to a block and needs a style: below its root, or of a layer the matrices."""
    if root in decoder.layers:
        return matrices
    return [name for name in _with_weights(model) if name.startswith(f"{root}.")]


def _with_weights(model: nn.Module) -> Iterator[str]:
    """Modules with weights, and single parameters of modules that contain others."""
    for name, module in model.named_modules():
        own = [parameter for parameter, value in module._parameters.items() if value is not None]
        if own and is_leaf(model, name):
            yield name
        else:
            yield from (f"{name}.{parameter}" for parameter in own)


def _blocks(model: nn.Module, layer: str) -> dict[str, list[str]]:
    """{block: its matrices}: the layer's children that have several, and the layer itself for those it owns."""
    blocks: dict[str, list[str]] = {}
    for child_name, child in model.get_submodule(layer).named_children():
        name = f"{layer}.{child_name}"
        if is_matrix(child):
            blocks.setdefault(layer, []).append(name)
        elif matrices := [f"{name}.{inner}" for inner, module in child.named_modules() if is_matrix(module)]:
            blocks[_innermost(model, name, matrices)] = matrices
    return blocks


def _innermost(model: nn.Module, name: str, matrices: list[str]) -> str:
    """The module inside `name` that has all its matrices, e.g. the attention that GPT-Neo wraps in another."""
    for child, _ in model.get_submodule(name).named_children():
        if all(matrix.startswith(f"{name}.{child}.") for matrix in matrices):
            return _innermost(model, f"{name}.{child}", matrices)
    return name
