"""Full attention in float64, with a matrix of all scores: what shared sequences must come to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from parallelize.context_parallel.masks import CAUSAL, AttentionRule, MaskRule


@dataclass(frozen=True)
class Case:
    """An attention to try: sizes, mask and options."""

    rule: MaskRule = CAUSAL
    softcap: float | None = None
    has_sinks: bool = False
    document_lengths: tuple[int, ...] = ()
    """Of the first row of the batch; the second has them in reverse order."""
    heads: int = 4
    key_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    length: int = 256
    dtype: torch.dtype = torch.float32
    scale: float | None = None

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """query, key, value, sinks, grad_out (float64, of values that `dtype` has) and documents."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).double()

        sizes = {"query": (self.heads, self.dim), "key": (self.key_heads, self.dim),
                 "value": (self.key_heads, self.value_dim), "grad_out": (self.heads, self.value_dim)}  # fmt: skip
        drawn = {name: draw(2, heads, self.length, dim) for name, (heads, dim) in sizes.items()}
        return {**drawn, "sinks": draw(self.heads) if self.has_sinks else None, "documents": self.documents()}

    def attention_rule(self) -> AttentionRule:
        return AttentionRule(self.rule, self.scale, self.softcap)

    def documents(self) -> torch.Tensor | None:
        if not self.document_lengths:
            return None
        assert sum(self.document_lengths) == self.length
        rows = (self.document_lengths, self.document_lengths[::-1])
        return torch.stack([
            torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows
        ])  # fmt: skip

    def but(self, **changes) -> Case:
        return replace(self, **changes)


def full_attention(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and the gradients of query, key, value and, where there are any, sinks; in float64."""
    given = case.tensors()
    inputs = {name: given[name] for name in ("query", "key", "value", "sinks") if given[name] is not None}
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    groups = case.heads // case.key_heads
    key, value = (inputs[name].repeat_interleave(groups, 1) for name in ("key", "value"))
    scale = case.dim**-0.5 if case.scale is None else case.scale
    scores = inputs["query"] @ key.transpose(-1, -2) * scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~visible(case), -math.inf)
    if "sinks" in inputs:
        scores = torch.cat([scores, inputs["sinks"][None, :, None, None].expand(2, -1, case.length, 1)], -1)
    out = scores.softmax(-1)[..., : case.length] @ value
    grads = torch.autograd.grad(out, list(inputs.values()), given["grad_out"])
    return out.detach(), dict(zip(inputs, grads, strict=True))


def visible(case: Case) -> torch.Tensor:
    """Which pairs are seen, (1 or 2, 1, seq, seq), said without the rule's own words."""
    queries, keys = torch.arange(case.length)[:, None], torch.arange(case.length)
    seen = (keys <= queries)[None, None]
    if case.rule.window is not None:
        seen = seen & (keys > queries - case.rule.window)
    if case.rule.chunk is not None:
        seen = seen & (
            torch.div(keys, case.rule.chunk, rounding_mode="floor") * case.rule.chunk + case.rule.chunk > queries
        )
    documents = case.documents()
    return seen if documents is None else seen & (documents[:, None, :, None] == documents[:, None, None, :])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a tensor, relative to the norm of what is expected."""
    return ((found.double() - expected).norm() / expected.norm()).item()


CASES = {
    "causal": Case(),
    "window": Case(rule=MaskRule(window=70)),
    "window of a chunk": Case(rule=MaskRule(window=33)),
    "narrow window": Case(rule=MaskRule(window=7)),
    "chunks": Case(rule=MaskRule(chunk=50)),
    "softcap": Case(softcap=3.0, scale=0.7),
    "sinks": Case(has_sinks=True, rule=MaskRule(window=64)),
    "documents": Case(document_lengths=(70, 100, 1, 85)),
    "documents and window": Case(document_lengths=(70, 100, 1, 85), rule=MaskRule(window=40), has_sinks=True),
    "everything": Case(
        document_lengths=(150, 106), rule=MaskRule(window=40), has_sinks=True, softcap=5.0, value_dim=24, dim=8
    ),
    "values of another width": Case(value_dim=8, dim=24),
    "one key head": Case(key_heads=1),
    "as many key heads": Case(key_heads=4),
    "uneven groups": Case(heads=12, key_heads=6, dim=8, value_dim=8),
}
"""By name; the sizes divide by what 2 and 4 ranks need, the others do not by anything."""
