"""Attention over ranks (`methods.py`) as one operator of PyTorch, for what looks at operators: the compiler, which must
not look inside one that communicates, and per-operator recomputation, which keeps its result rather than to communicate
again.

An operator takes tensors, numbers and strings only, so that ranks and method are told by `RingAddress`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import _resolve_process_group

from parallelize.context_parallel.kernels import BLOCKS
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import AttentionRule, MaskRule
from parallelize.context_parallel.methods import METHODS
from parallelize.context_parallel.ring import HeadsGroup, Ring


@dataclass(frozen=True)
class RingAddress:
    """A `Ring` in strings and numbers."""

    group_name: str
    """ "" is a ring of one rank."""
    method: str
    length: int
    degree: int
    is_zigzag: bool
    blocks: str
    heads_name: str = ""
    """Of the heads group; "" is none."""
    heads_degree: int = 1
    heads_zigzag: bool = False

    @classmethod
    def of(cls, ring: Ring) -> RingAddress:
        assert ring.blocks.name in BLOCKS
        layout, heads = ring.layout, ring.heads
        group_name = "" if ring.group is None else ring.group.group_name
        around = (heads.group.group_name, heads.layout.degree, heads.layout.is_zigzag) if heads else ()
        return cls(group_name, ring.method, layout.length, layout.degree, layout.is_zigzag, ring.blocks.name, *around)

    def find(self) -> Ring:
        layout = SequenceLayout(self.length, self.degree, self.is_zigzag)
        group = _resolve_process_group(self.group_name) if self.group_name else None
        return Ring(group, layout, BLOCKS[self.blocks], self.method, self._heads())

    def _heads(self) -> HeadsGroup | None:
        if not self.heads_name:
            return None
        layout = SequenceLayout(self.length // self.degree, self.heads_degree, self.heads_zigzag)
        return HeadsGroup(_resolve_process_group(self.heads_name), layout)


def attention_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    address: RingAddress,
    rule: AttentionRule,
    *,
    sinks: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `methods.shared_attention` computes, with a ring by its address."""
    out, _ = _attend(
        query, key, value, sinks, documents, address.group_name, address.method, address.length, address.degree,
        address.is_zigzag, address.blocks, address.heads_name, address.heads_degree, address.heads_zigzag,
        rule.mask.window, rule.mask.chunk, rule.scale, rule.softcap,
    )  # fmt: skip
    return out


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? documents"
_RING = (
    "str group_name, str method, int length, int degree, bool is_zigzag, str blocks, "
    "str heads_name, int heads_degree, bool heads_zigzag"
)
_RULE = "int? window, int? chunk, float? scale, float? softcap"


@torch.library.custom_op(
    "parallelize::shared_attention", mutates_args=(), schema=f"({_TENSORS}, {_RING}, {_RULE}) -> (Tensor, Tensor)"
)
def _attend(query, key, value, sinks, documents, *options):
    ring, rule = _described(options)
    out, log_sum = METHODS[ring.method].forward(query, key, value, sinks, documents, ring, rule)
    return out.transpose(1, 2).contiguous().transpose(1, 2), log_sum  # heads beside each other, with every method


@_attend.register_fake
def _(query, key, value, sinks, documents, *options):
    group_size = RingAddress(*options[:-4]).heads_degree
    batch, heads, local, _ = query.shape
    log_sum = query.new_empty((batch, heads // group_size, group_size * local), dtype=torch.float32)
    out = query.new_empty((batch, local, heads, value.shape[-1])).transpose(1, 2)
    return out, log_sum


@torch.library.custom_op(
    "parallelize::shared_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_TENSORS}, Tensor out, Tensor log_sum, {_RING}, {_RULE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(grad_out, query, key, value, sinks, documents, out, log_sum, *options):
    ring, rule = _described(options)
    *found, grad_sinks = METHODS[ring.method].backward(
        grad_out, query, key, value, sinks, documents, out, log_sum, ring, rule
    )
    return *(gradient.contiguous() for gradient in found), query.new_empty(0) if sinks is None else grad_sinks


@_attend_backward.register_fake
def _(grad_out, query, key, value, sinks, documents, out, log_sum, *options):
    found = tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return *found, query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _described(options: tuple) -> tuple[Ring, AttentionRule]:
    *address, window, chunk, scale, softcap = options
    return RingAddress(*address).find(), AttentionRule(MaskRule(window, chunk), scale, softcap)


def _keep(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _backward(ctx, grad_out: torch.Tensor, _) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: recomputed activations can be had no second time
    *found, grad_sinks = _attend_backward(grad_out, *saved, *ctx.options)
    return *found, None if saved[3] is None else grad_sinks, *[None] * (1 + len(ctx.options))


_attend.register_autograd(_backward, setup_context=_keep)
