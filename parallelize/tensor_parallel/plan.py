"""What a tensor-parallel plan says: for every module with weights, how they are split and what is communicated.

A plan is a table from names to styles that a reader checks by eye. `transformers_backend/tensor_plan/` makes it,
`apply.py` beside this file carries it out. For Llama, with "*" for the number of the layer, over two ranks:

    model.embed_tokens                         vocabulary
    model.layers.*.input_layernorm             replicate
    model.layers.*.self_attn                   region, num_attention_heads 16
    model.layers.*.self_attn.q_proj            colwise
    model.layers.*.self_attn.k_proj            colwise
    model.layers.*.self_attn.v_proj            colwise
    model.layers.*.self_attn.o_proj            rowwise
    model.layers.*.post_attention_layernorm    replicate
    model.layers.*.mlp                         region
    model.layers.*.mlp.gate_proj               colwise
    model.layers.*.mlp.up_proj                 colwise
    model.layers.*.mlp.down_proj               rowwise
    model.norm                                 replicate
    lm_head                                    vocabulary
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

NUMBER = re.compile(r"\.\d+(?=\.|$)")
"""A number in the name of a module: of a layer, or within a list of modules."""

Style = Literal["colwise", "rowwise", "vocabulary", "replicate", "outside", "whole", "split", "norm_over_heads"]
"""How a module's weights are split, or one parameter.

colwise           a linear's output features; its input is whole
rowwise           a linear's input features; its output is a term of a sum over ranks, the exit of a region
vocabulary        rows, one a token
replicate         not at all; inside a region every rank computes a part of the gradient
outside           not at all; in the module of a region, but behind its exit, as if it were no part of it
whole             not at all; in a region, but computing with all features: every rank computes the whole gradient
split             the first dimension (one value or row a head, or a channel), each rank computes with its own
norm_over_heads   not at all; every rank computes it whole from the features of all heads and keeps its own
"""


@dataclass(frozen=True)
class Segment:
    """A part of a (possibly fused) projection's output features, e.g. the keys of [queries | keys | values]."""

    size: int
    """Features, of the whole model."""
    heads: int | None = None
    """Heads among which they are divided and which stay whole, or None where any feature may be on any rank."""

    def is_shared(self, degree: int) -> bool:
        """Whether there are fewer heads than ranks, so that several ranks compute with the same head."""
        return self.heads is not None and self.heads < degree


@dataclass(frozen=True)
class Split:
    """How the weights of one module, or one parameter, are split over the tensor-parallel ranks."""

    style: Style
    segments: tuple[Segment, ...] = ()
    """For "colwise": the fused parts of the output, in order; empty where it is one part without heads. For "rowwise"
    those of the input, where a rank's part of it is not one piece."""
    is_transposed: bool = False
    """Whether the weight is (in, out), as GPT-2's Conv1D has it, rather than (out, in)."""
    is_joined: bool = False
    """For "colwise": every rank gets the features of all; for "rowwise": they come in so, and each takes its own."""
    is_gathered: bool = False
    """For "colwise" in front of another colwise linear (MLA's compressed keys): every rank gets the features of all."""
    is_direct: bool = False
    """Whether code of the layer around the module reads the parameters, rather than the module's own forward."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Attributes that the module's forward reads, such as its number of outputs, and their values on one rank."""

    def output_dim(self, parameter: str) -> int:
        """The dimension of outputs of a linear's own `parameter`, "weight" or "bias"."""
        return 1 if self.is_transposed and parameter == "weight" else 0

    def __str__(self) -> str:
        words = self.style + "+join" * self.is_joined + "+gather" * self.is_gathered + "+direct" * self.is_direct
        if len(self.segments) < 2:
            return words
        return f"{words} [{' | '.join(str(segment.size) for segment in self.segments)}]"


@dataclass(frozen=True)
class Region:
    """A module whose input is whole and whose inside is split: attention, an mlp, or a linear that is both ends."""

    is_whole: bool = False
    """Whether nothing inside is split: every rank computes all of it, from the whole sequence."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Attributes (head counts, widths) and their values on one rank; of inner modules as "norm.num_heads"."""
    config: dict[str, Any] = field(default_factory=dict)
    """The same for fields of the config that the instance reads in its forward; it gets a copy of its own."""
    head_arguments: dict[str, int] = field(default_factory=dict)
    """Arguments of its forward that may be (..., heads, queries, keys) or (batch x heads, queries, keys), as alibi is,
    and the heads of the whole model: each rank takes those of its own."""

    def __str__(self) -> str:
        values = {**self.attributes, **self.config}
        arguments = "".join(f", own heads of {key}" for key in self.head_arguments)
        name = "whole_region" if self.is_whole else "region"
        return name + "".join(f", {key} {value}" for key, value in values.items()) + arguments


@dataclass(frozen=True)
class TensorPlan:
    """The plan of one model for one degree; names are full names of modules, or of single parameters."""

    degree: int
    splits: dict[str, Split]
    regions: dict[str, Region]
    sequence_arguments: tuple[str, ...] = ()
    """Arguments of the layers, beside the hidden states, that are (batch, seq, features) and used outside regions."""

    def split_of(self, parameter_name: str) -> Split | None:
        """The decision for a parameter: its own, or that of its module."""
        return self.splits.get(parameter_name) or self.splits.get(parameter_name.rpartition(".")[0])

    def region_of(self, name: str) -> str | None:
        """The region that the module or parameter `name` is in (or is), if any."""
        return next((region for region in self.regions if name == region or name.startswith(f"{region}.")), None)

    def of_part(self, model: nn.Module) -> TensorPlan:
        """The plan of a model of which some modules have lost their parameters, to other ranks of a pipeline."""
        here = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        owners = {*here, *(name.rpartition(".")[0] for name in here)}
        splits = {name: split for name, split in self.splits.items() if name in owners}
        regions = {
            name: region for name, region in self.regions.items() if any(own.startswith(f"{name}.") for own in here)
        }
        return dataclasses.replace(self, splits=splits, regions=regions)

    def lines(self) -> list[str]:
        """The plan as a table, with layers that are alike on one line."""
        entries: dict[str, list[str]] = {}
        for name in sorted({*self.splits, *self.regions}, key=_natural):
            parts = [str(part[name]) for part in (self.regions, self.splits) if name in part]
            entries.setdefault(pattern_of(name), []).append("; ".join(parts))
        width = max(map(len, entries), default=0)
        return [f"{name:<{width}}  {' or '.join(dict.fromkeys(texts))}" for name, texts in entries.items()]


def pattern_of(name: str) -> str:
    """The name with "*" for the number of the layer."""
    return NUMBER.sub(".*", name, count=1)  # a later one tells modules of a Sequential apart


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
