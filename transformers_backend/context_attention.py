"""Attention over the ranks that share a sequence, as Transformers' own attention function of one model.

Transformers lets a model's attention and its masks be functions of one's own (AttentionInterface and
AttentionMaskInterface). The mask function here returns no tensor of (seq, seq) but says what the mask is (`MaskRule`),
found by asking Transformers' own function about pairs of tokens; the attention function runs the ring or another
method (`parallelize/context_parallel/operator.py`). Outside `sharing` both are the ones that the model had before, so
that it can be called with whole sequences.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parallelize.context_parallel.masks import AttentionRule, MaskRule
from parallelize.context_parallel.operator import RingAddress, attention_operator
from parallelize.context_parallel.ring import Ring

# What attention functions are given that says nothing about what attends to what.
_WITHOUT_EFFECT = frozenset({
    "position_ids", "cache_position", "is_causal", "output_attentions", "output_hidden_states", "use_cache",
    "return_dict", "num_items_in_batch", "position_embeddings",
})  # fmt: skip


@dataclass(frozen=True)
class SharedMask:
    """What layers get for a mask. It says all that attention needs to know, so that a layer which is recomputed later,
    when another micro-batch has begun, is recomputed with its own documents."""

    rule: MaskRule
    address: RingAddress
    documents: torch.Tensor | None
    """The number of every token's document, (batch, seq) on the CPU; None where sequences are one document each."""


class ContextAttention:
    """The attention of one model, whose sequences lie on several ranks."""

    def __init__(self, hf_model: PreTrainedModel, own: str) -> None:
        """Register under a name of its own and set it in the model's config. own: what the model attends with now."""
        self._own = own
        self._ring: Ring | None = None
        self.documents: torch.Tensor | None = None
        """Of the next call of the model: the number of every token's, (batch, seq)."""
        self.masks_made = 0
        """How often the model has asked for a mask of shared sequences."""
        self.name = f"context_parallel_{id(self)}"
        AttentionInterface.register(self.name, self._attend)
        AttentionMaskInterface.register(self.name, self._describe_mask)
        hf_model.set_attn_implementation(self.name)

    @property
    def is_sharing(self) -> bool:
        return self._ring is not None

    @contextlib.contextmanager
    def sharing(self, ring: Ring) -> Iterator[None]:
        """Within the block sequences lie on the ranks of `ring`."""
        self._ring = ring
        try:
            yield
        finally:
            self._ring = self.documents = None

    def _describe_mask(self, *args, mask_function: Callable, attention_mask: torch.Tensor | None = None, **kwargs):
        if self._ring is None:
            usual = ALL_MASK_ATTENTION_FUNCTIONS[self._own]
            return usual(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
        self.masks_made += 1
        rule = describe_mask(mask_function, self._ring.layout.length)
        return SharedMask(rule, RingAddress.of(self._ring), self.documents)

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: SharedMask | torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        sliding_window: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        if self._ring is None:
            options = {"softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window}
            given = {name: option for name, option in options.items() if option is not None}
            usual = _attention_function(self._own, module)
            return usual(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **given, **kwargs)
        name = type(module).__name__
        if not isinstance(attention_mask, SharedMask):
            raise ValueError(
                f"{name} makes an attention mask of its own, which ranks that share a sequence cannot know"
            )
        if dropout:
            raise ValueError(
                f"{name}: attention dropout = {dropout} is not available where ranks share sequences; set it to 0"
            )
        unknown = [name for name, item in kwargs.items() if item is not None and name not in _WITHOUT_EFFECT]
        if any(isinstance(kwargs[name], torch.Tensor) for name in unknown):
            raise ValueError(f"{name}: attention with {', '.join(unknown)} is not available with context parallelism")
        out = attention_operator(
            query, key, value, attention_mask.address, AttentionRule(attention_mask.rule, scaling, softcap),
            sinks=s_aux, documents=attention_mask.documents,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None


def _attention_function(name: str, module: nn.Module) -> Callable:
    """Transformers' function of that name; "eager" is in the file of every model, beside its attention modules."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def describe_mask(mask_function: Callable, length: int) -> MaskRule:
    """What a mask function of Transformers, from (batch, head, query, key) places to bool, says of `length` tokens.

    It is asked about pairs of tokens; a ValueError where no causal mask with a window or chunks answers so.
    """

    def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.int64)
        return torch.as_tensor(mask_function(zero, zero, queries, keys)).expand(queries.shape)

    rule = _candidate(sees, length)
    pairs = _pairs(length, rule)
    if not torch.equal(sees(*pairs), rule.sees(*pairs)):
        raise ValueError("the model's attention mask is no causal mask with a sliding window or chunks")
    return rule


def _candidate(sees: Callable, length: int) -> MaskRule:
    """The only rule that may answer as `sees` does."""

    def first_seen(query: int) -> int:
        low, high = 0, query
        while low < high:
            middle = (low + high) // 2
            if sees(torch.tensor([query]), torch.tensor([middle])).item():
                high = middle
            else:
                low = middle + 1
        return low

    first = first_seen(length - 1)
    if first == 0:
        return MaskRule()
    # With a window the query at `first` sees keys before it. Otherwise it begins the last chunk, and the one before it
    # ends a whole chunk (of one token, which is a window of one).
    if first_seen(first) < first:
        return MaskRule(window=length - first)
    size = first - first_seen(first - 1)
    return MaskRule(window=1) if size == 1 else MaskRule(chunk=size)


def _pairs(length: int, rule: MaskRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of queries and keys to ask about: all of short sequences, else many at random, near the diagonal and at
    the rule's own borders."""
    if length <= 128:
        places = torch.arange(length)
        return places.repeat_interleave(length), places.repeat(length)
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randint(0, length, (2, 8192), generator=generator)
    some, few = queries[:2048], queries[:256]
    beside = [(few, few - distance) for distance in range(-1, 31)]
    beside += [(some, some % 8)]  # the first tokens, which some masks let all queries see
    if rule.window is not None:
        beside += [(some, some - rule.window + shift) for shift in (0, 1)]
    if rule.chunk is not None:
        begins = some // rule.chunk * rule.chunk
        beside += [(some, begins - 1), (some, begins), (begins, begins - 1), (begins + rule.chunk - 1, begins)]
    every = [(queries, keys), *beside]
    return tuple(torch.cat(places).clamp(0, length - 1) for places in zip(*every, strict=True))
