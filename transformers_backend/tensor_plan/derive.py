"""Recipes derived from the twin: one run shows which matrices read a block's input and which one comes last."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from transformers_backend.decoder import Decoder
from transformers_backend.tensor_plan.recipe import Derived, Recipe, pattern_of


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def derive(twin: PreTrainedModel, decoder: Decoder, input_ids: torch.Tensor) -> Derived:
    """Styles of every module with weights, from one run of the twin."""
    fixed = {pattern_of(name): "replicate" for name, _ in _modules_with_weights(twin)}
    fixed[decoder.embedding] = fixed[decoder.head] = "vocabulary"
    blocks = {name: block for layer in decoder.layers for name, block in _blocks(twin, layer).items()}
    runs = _trace(twin, [name for names in blocks.values() for name in names], input_ids)
    ways: dict[str, list[Recipe]] = {}
    for root, matrices in blocks.items():
        replicated = {pattern_of(name): "replicate" for name in _inside(twin, root, matrices, decoder)}
        for index, way in enumerate([*_ways(root, matrices, runs, decoder), {}]):
            block = ways.setdefault(pattern_of(root), [])
            if index == len(block):
                block.append({})
            block[index] = {**replicated, **block[index], **way}
    owned = {pattern for block in ways.values() for way in block for pattern in way}
    return Derived({pattern: words for pattern, words in fixed.items() if pattern not in owned}, ways)


def _ways(root: str, matrices: list[str], runs: _Runs, decoder: Decoder) -> list[Recipe]:
    """How a block may be split, best first, without the modules that are replicated."""
    ran = [name for name in runs.order if name in matrices]
    if len(ran) < 2:
        return []
    *inner, last = ran
    feeders = {name for reader in inner for name in runs.feeding[reader]}
    way = {pattern_of(name): "replicate" if name in feeders else "colwise" for name in inner}
    way[pattern_of(last)] = "rowwise"
    if root in ran or is_layer(root, decoder):
        way = {pattern: words + "+region" if words != "rowwise" else words for pattern, words in way.items()}
    else:
        way[pattern_of(root)] = "region"
    return [way]


def _inside(model: nn.Module, root: str, matrices: list[str], decoder: Decoder) -> list[str]:
    """Names of the modules with weights that belong to a block: below its root, or of a layer the matrices."""
    if is_layer(root, decoder):
        return matrices
    return [name for name, _ in _modules_with_weights(model) if name == root or name.startswith(f"{root}.")]


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
