"""The ways to split one block (attention, mlp) of a decoder layer, from what a run of the twin showed of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from transformers_backend.decoder import Decoder
from transformers_backend.tensor_plan.attention_heads import heads_of
from transformers_backend.tensor_plan.fused import fused_layouts
from transformers_backend.tensor_plan.matrices import input_features, output_features
from transformers_backend.tensor_plan.recipe import Recipe, pattern_of
from transformers_backend.tensor_plan.trace import BlockTrace


@dataclass(frozen=True)
class Block:
    """A block of the twin."""

    twin: PreTrainedModel
    decoder: Decoder
    root: str
    """The module, or the layer itself for linears that it owns."""
    matrices: list[str]
    parts: list[str]
    """Everything in it that needs a style: modules with weights, and parameters of modules that contain others."""
    trace: BlockTrace
    direct: set[str]
    """Modules whose parameters other code reads."""
    input_ids: torch.Tensor
    """What the twin runs on, (batch, seq)."""

    def input_features(self, matrix: str) -> int:
        return input_features(self.twin.get_submodule(matrix))

    def output_features(self, matrix: str) -> int:
        return output_features(self.twin.get_submodule(matrix))

    def matrices_feeding(self, name: str) -> set[str]:
        """The matrices whose outputs reach the input of `name` without passing another matrix."""
        found = set()
        for feeder in self.trace.feeders.get(name, ()):
            found |= {feeder} if feeder in self.matrices else self.matrices_feeding(feeder)
        return found


def ways_to_split(block: Block) -> list[Recipe]:
    """Styles of a block's parts that are not replicated, best first."""
    ran = [name for name in block.trace.order if name in block.matrices]
    if not block.trace.is_called or len(ran) < 2:
        return []
    *inner, last = ran
    hidden = block.trace.inputs[inner[0]][-1]
    if block.output_features(last) != hidden:  # it does not end in hidden states: a router's coefficients
        return []
    plain = _plain_way(block, inner, last)
    if block.root in block.decoder.layers or block.trace.bypasses:
        # What comes in between from elsewhere (gemma's inputs of every layer) has all features.
        return [] if block.trace.joined_by else [_regions_of_their_own(plain)]
    ways = [*_fused_ways(block, plain, last), plain]
    if heads_of(block.twin, block.decoder, block.root) is not None:
        ways.append({name: "packed_halves" if words == "colwise" else words for name, words in plain.items()})
    else:
        if len(inner) == 1 and block.output_features(inner[0]) == 3 * block.input_features(last):
            ways.insert(0, {inner[0]: "packed_qkv", last: "rowwise"})
        joined = dict.fromkeys(inner, "colwise+join") | {last: "rowwise+join"}
        ways.insert(0 if block.trace.reduces else len(ways), joined)
    return [_with_root(block, way) for way in ways]


def _plain_way(block: Block, inner: list[str], last: str) -> Recipe:
    """Outputs, then inputs are split; what feeds another linear is gathered for it (MLA's compressed inputs)."""
    heads = heads_of(block.twin, block.decoder, block.root)
    reading = {name: block.matrices_feeding(name) & set(inner) for name in inner}
    over_heads = {name for name in inner if reading[name] and block.output_features(name) in (heads or ())}
    feeders = {feeder for name in inner if name not in over_heads for feeder in reading[name]}
    way = {name: "colwise+gather" if name in feeders else "colwise" for name in inner}
    return {**way, **dict.fromkeys(over_heads, "norm_over_heads"), last: "rowwise"}


def _fused_ways(block: Block, plain: Recipe, last: str) -> list[Recipe]:
    """Ways for a block with a single colwise linear, which then yields queries, keys and values or gate and up."""
    colwise = [name for name, words in plain.items() if words == "colwise"]
    if len(colwise) != 1:
        return []
    heads = heads_of(block.twin, block.decoder, block.root)
    layouts = fused_layouts(block.twin, colwise[0], last, heads and heads[0], block.input_ids)
    ways = [{**plain, colwise[0]: words, last: last_words} for words, last_words in layouts]
    return [way for way in ways if way != plain]


def whole_way(block: Block) -> Recipe:
    """The way that splits nothing. What mixes tokens must see the whole sequence even so."""
    mixes = heads_of(block.twin, block.decoder, block.root) is not None or any(
        isinstance(module, nn.Conv1d) for module in block.twin.get_submodule(block.root).modules()
    )
    if not mixes or not block.trace.is_called or block.root in block.decoder.layers:
        return {}
    styles = {name: "whole+direct" if name in block.direct else "whole" for name in block.parts}
    return {pattern_of(name): words for name, words in {**styles, block.root: "whole_region"}.items()}


def _regions_of_their_own(way: Recipe) -> Recipe:
    """Every matrix enters the region itself, so that what else reads the block's input stays outside."""
    return {pattern_of(name): words if words == "rowwise" else f"{words}+region" for name, words in way.items()}


def _with_root(block: Block, way: Recipe) -> Recipe:
    styles = {name: way.get(name) or _style(block, name, way) for name in block.parts}
    styles = {name: words + "+direct" if name in block.direct else words for name, words in styles.items()}
    return {pattern_of(name): words for name, words in {**styles, block.root: "region"}.items()}


def _style(block: Block, name: str, way: Recipe) -> str:
    """The style of a part that is no matrix: a norm, a convolution, a parameter of the attention itself."""
    is_module = name in dict(block.twin.named_modules())
    parameter = next(block.twin.get_submodule(name).parameters()) if is_module else block.twin.get_parameter(name)
    names = {f"{name}.{own}" for own, _ in block.twin.get_submodule(name).named_parameters()} if is_module else {name}
    if name in block.trace.order and not names & block.trace.inside:
        return "outside"
    if not is_module and name not in block.trace.inside and name not in block.matrices:
        return "outside"
    heads = heads_of(block.twin, block.decoder, block.root)
    if "colwise+join" in way.values():
        return "whole"
    if is_module:
        return _style_of_module(block, name, parameter, way, heads)
    return "split" if heads is not None and parameter.shape[0] in heads and parameter.shape[0] > 1 else "replicate"


def _style_of_module(
    block: Block, name: str, parameter: nn.Parameter, way: Recipe, heads: tuple[int, int] | None
) -> str:
    module = block.twin.get_submodule(name)
    if isinstance(module, nn.Conv1d):
        return "split" if module.groups == module.out_channels else "replicate"
    shape = block.trace.inputs.get(name)
    if shape is None:
        return "replicate"
    size = parameter.numel()
    if len(shape) > 3:
        by_head = heads is not None and size in {count * shape[-1] for count in heads if count > 1}
        return "split" if by_head and size != shape[-1] else "replicate"
    split_widths = {
        block.output_features(feeder)
        for feeder in block.matrices_feeding(name)
        if way.get(feeder, "").startswith(("colwise", "packed")) and not way[feeder].endswith("gather")
    }
    last = next(matrix for matrix, words in way.items() if words.startswith("rowwise"))
    if split_widths and size == shape[-1] and size in {*split_widths, block.input_features(last)}:
        return "norm_over_heads"
    return "replicate"
