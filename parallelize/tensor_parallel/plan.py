"""What a tensor-parallel plan says: for every module with weights, how they are split and what is communicated.

A plan is a table from names to styles that a reader checks by eye. `transformers_backend/tensor_plan.py` makes it,
`apply.py` beside this file carries it out. For Llama, with "*" for the number of the layer:

    model.embed_tokens                         vocabulary
    model.layers.*.input_layernorm             replicate
    model.layers.*.self_attn                   region      num_heads 32 -> 16
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

import re
from dataclasses import dataclass, field
from typing import Any, Literal

Style = Literal["colwise", "rowwise", "vocabulary", "replicate", "split", "norm_over_heads"]


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
    """For "colwise": the fused parts of the output, in order; empty where it is one part without heads."""
    is_transposed: bool = False
    """Whether the weight is (in, out), as GPT-2's Conv1D has it, rather than (out, in)."""

    def __str__(self) -> str:
        if len(self.segments) < 2:
            return self.style
        return f"{self.style} [{' | '.join(str(segment.size) for segment in self.segments)}]"


@dataclass(frozen=True)
class Region:
    """A module whose input is whole and whose inside is split: attention, an mlp, or a linear that is both ends."""

    attributes: dict[str, Any] = field(default_factory=dict)
    """Attributes of the instance (head counts, widths) and the values that they have on one rank."""
    config: dict[str, Any] = field(default_factory=dict)
    """The same for fields of the config that the instance reads in its forward; it gets a copy of its own."""
    head_arguments: dict[str, int] = field(default_factory=dict)
    """Arguments of its forward that have a dimension of heads (or batch x heads), and which: each rank takes its own."""

    def __str__(self) -> str:
        values = {**self.attributes, **self.config}
        return "region" + "".join(f", {name} {value}" for name, value in values.items())


@dataclass(frozen=True)
class TensorPlan:
    """The plan of one model for one degree; names are full names of modules, or of single parameters."""

    degree: int
    splits: dict[str, Split]
    regions: dict[str, Region]

    def split_of(self, parameter_name: str) -> Split | None:
        """The decision for a parameter: its own, or that of its module."""
        return self.splits.get(parameter_name) or self.splits.get(parameter_name.rpartition(".")[0])

    def region_of(self, name: str) -> str | None:
        """The region that the module or parameter `name` is in (or is), if any."""
        return next((region for region in self.regions if name == region or name.startswith(f"{region}.")), None)

    def lines(self) -> list[str]:
        """The plan as a table, with layers that are alike on one line."""
        entries: dict[str, list[str]] = {}
        for name in sorted({*self.splits, *self.regions}, key=_natural):
            parts = [str(part[name]) for part in (self.regions, self.splits) if name in part]
            entries.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append("; ".join(parts))
        width = max(map(len, entries), default=0)
        return [f"{name:<{width}}  {' or '.join(dict.fromkeys(texts))}" for name, texts in entries.items()]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
