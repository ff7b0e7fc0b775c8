"""Attention over the ranks that share a sequence, as Transformers' own attention function of one model.

Transformers lets a model's attention and its masks be functions of one's own (AttentionInterface and
AttentionMaskInterface). The mask function here returns no tensor of (seq, seq) but says what the mask is (`MaskRule`),
found by asking Transformers' own function about pairs of tokens; the attention function runs the ring or another
method (`parallelize/context_parallel/methods.py`). Outside `sharing` both are the ones that the model had before, so
that it can be called with whole sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parallelize.context_parallel.masks import MaskRule
from parallelize.context_parallel.methods import METHODS
from parallelize.context_parallel.ring import Ring

# What attention functions are given that says nothing about what attends to what.
_WITHOUT_EFFECT = frozenset({
    "position_ids", "cache_position", "is_causal", "output_attentions", "output_hidden_states", "use_cache",
    "return_dict", "num_items_in_batch", "position_embeddings",
})  # fmt: skip


class ContextAttention:
    """The attention of one model, whose sequences lie on several ranks."""

    def __init__(self, hf_model: PreTrainedModel, own: str) -> None:
        """Register under a name of its own and set it in the model's config. own: what the model attends with now."""
        self._own = own
        self._ring: Ring | None = None
        self._documents: torch.Tensor | None = None
        self.name = f"context_parallel_{id(self)}"
        AttentionInterface.register(self.name, self._attend)
        AttentionMaskInterface.register(self.name, self._describe_mask)
        hf_model.set_attn_implementation(self.name)

    @contextlib.contextmanager
    def sharing(self, ring: Ring, documents: torch.Tensor | None) -> Iterator[None]:
        """Within the block sequences lie on the ranks of `ring`. documents: number of every token's, (batch, seq)."""
        self._ring, self._documents = ring, documents
        try:
            yield
        finally:
            self._ring = self._documents = None

    def _describe_mask(self, *args, mask_function: Callable, attention_mask: torch.Tensor | None = None, **kwargs):
        if self._ring is None:
            usual = ALL_MASK_ATTENTION_FUNCTIONS[self._own]
            return usual(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
        return describe_mask(mask_function, self._ring.layout.length)

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: MaskRule | torch.Tensor | None,
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
            usual = ALL_ATTENTION_FUNCTIONS[self._own]
            return usual(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **given, **kwargs)
        name = type(module).__name__
        if not isinstance(attention_mask, MaskRule):
            raise ValueError(
                f"{name} makes an attention mask of its own, which ranks that share a sequence cannot know"
            )
        if dropout:
            raise ValueError(
                f"{name}: attention dropout = {dropout} is not available with context parallelism; set it to 0"
            )
        unknown = [name for name, item in kwargs.items() if item is not None and name not in _WITHOUT_EFFECT]
        if any(isinstance(kwargs[name], torch.Tensor) for name in unknown):
            raise ValueError(f"{name}: attention with {', '.join(unknown)} is not available with context parallelism")
        out = METHODS[self._ring.method](
            query, key, value, self._ring, attention_mask,
            scale=scaling, softcap=softcap, sinks=s_aux, documents=self._documents,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None


def describe_mask(mask_function: Callable, length: int) -> MaskRule:
    """What a mask function of Transformers, from (batch, head, query, key) places to bool, says of `length` tokens.

    It is asked about pairs of tokens; a ValueError where the answers are those of no causal mask with a window or
    chunks.
    """

    def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.int64)
        return torch.as_tensor(mask_function(zero, zero, queries, keys)).expand(queries.shape)

    last = length - 1
    keys = torch.arange(length)
    seen = int(sees(torch.full((length,), last), keys).sum())  # of all keys, by the last query
    candidates = [MaskRule()] if seen == length else [MaskRule(window=seen)]
    if seen < length:
        first = last + 1 - seen  # that a query of the last chunk sees
        sizes = [size for size in range(seen, first + 1) if first % size == 0]
        candidates += [MaskRule(chunk=size) for size in sizes[:64]]
    queries, keys = _pairs(length)
    answers = sees(queries, keys)
    for rule in candidates:
        if torch.equal(answers, rule.sees(queries, keys)):
            return rule
    raise ValueError("the model's attention mask is no causal mask with a sliding window or chunks")


def _pairs(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of queries and keys to ask about: all of short sequences, else many at random and all by the diagonal."""
    if length <= 128:
        places = torch.arange(length)
        return places.repeat_interleave(length), places.repeat(length)
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randint(0, length, (2, 8192), generator=generator)
    near = torch.arange(length)
    beside = [(near + shift).clamp(0, length - 1) for shift in (-1, 0, 1)]
    return torch.cat([queries, near, near, near]), torch.cat([keys, *beside])
