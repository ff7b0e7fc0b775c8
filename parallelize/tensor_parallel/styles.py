"""What modules compute: one function a style, each of which says what it communicates, forward and backward.

Below `apply.py`. Shapes are those of one rank; T ranks share a model with hidden size H, `features` of an attention or
mlp, and vocabulary V. `b` is the batch, `s` the sequence.
"""

from __future__ import annotations

import copy
import functools
import inspect

import torch
import torch.distributed as dist
from torch import nn

from parallelize.tensor_parallel.collectives import cut, enter, gather_and_enter, join, leave
from parallelize.tensor_parallel.local import LocalValue, compute_locally
from parallelize.tensor_parallel.plan import Region, Segment, Split
from parallelize.tensor_parallel.randomness import ForkedRandomness
from parallelize.tensor_parallel.sequence import SequenceShards
from parallelize.tensor_parallel.vocabulary import VocabularyShard, embed, local_padding_index


def leave_region(
    module: nn.Module,
    group: dist.ProcessGroup,
    sequence: SequenceShards | None,
    randomness: ForkedRandomness | None,
    *,
    is_joined: bool = False,
) -> None:
    """Rowwise linear: input (b, s, features / T), weight (H, features / T); the output is one term of a sum.

    With `is_joined` the input is (b, s, features) on every rank, which takes its part (backward: all-gather).

    Forward: all-reduce of (b, s, H), or with sequence parallelism reduce-scatter to (b, s / T, H). Backward: nothing,
    or all-gather of the gradient. "colwise" linears, whose output (b, s, features / T) is a shard, communicate nothing.
    randomness: what was forked at the region's entry; what the module does after its exit is the same on every rank.
    """
    plain_forward = module.forward

    @functools.wraps(plain_forward)
    def forward(features: torch.Tensor) -> torch.Tensor:
        term = plain_forward(cut(features, features.dim() - 1, group) if is_joined else features)
        if randomness is not None:
            randomness.leave()
        return leave(term, group) if sequence is None else sequence.leave_region(term)

    module.forward = forward


def enter_region(
    module: nn.Module,
    region: Region,
    group: dist.ProcessGroup,
    sequence: SequenceShards | None,
    randomness: ForkedRandomness | None,
) -> None:
    """Attention, mlp, or first linear: hidden states (b, s, H) come in whole and every rank computes with its part.

    Forward: nothing, or with sequence parallelism all-gather of (b, s / T, H). Backward: all-reduce of the gradient's
    terms (b, s, H), or reduce-scatter. randomness: forked here in training, so that ranks drop numbers of their own.
    """
    if region.is_whole:
        if sequence is not None:
            sequence.compute_whole(module)
        return
    for name, value in region.attributes.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, value)
    if region.config:
        module.config = copy.copy(module.config)
        for name, value in region.config.items():
            setattr(module.config, name, value)
    plain_forward = module.forward
    order = list(inspect.signature(plain_forward).parameters)

    @functools.wraps(plain_forward)
    def forward(*args, **kwargs):
        arguments = {**dict(zip(order, args, strict=False)), **kwargs}
        whole = arguments[order[0]]
        entered = enter(whole, group) if sequence is None else sequence.enter_region(whole)
        if randomness is not None and module.training:
            randomness.enter()

        def own(name: str, value):
            if value is whole:  # CTRL passes its input three times, as queries, keys and values
                return entered
            if name in region.head_arguments and isinstance(value, torch.Tensor):
                return own_heads_of(value, region.head_arguments[name], group)
            return value

        positional = [own(name, value) for name, value in zip(order, args, strict=False)]
        return plain_forward(
            *positional, *args[len(order) :], **{name: own(name, value) for name, value in kwargs.items()}
        )

    module.forward = forward


def own_heads_of(argument: torch.Tensor, heads: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's heads of a mask or bias (..., heads or batch x heads, queries, keys), or all of one without heads."""
    dim = argument.dim() - 3
    if dim < 0 or argument.shape[dim] % heads:
        return argument
    degree, rank = dist.get_world_size(group), dist.get_rank(group)
    by_head = argument.unflatten(dim, (-1, heads))
    return by_head.narrow(dim + 1, rank * (heads // degree), heads // degree).flatten(dim, dim + 1)


def join_features(module: nn.Module, split: Split, group: dist.ProcessGroup) -> None:
    """Colwise linear whose output features (b, s, features) are used together, by statistics over all of them.

    Forward: all-gather of (b, s, features / T). With `is_joined` every rank then computes alike until a rowwise linear
    cuts; backward: own part of the gradient, which is whole. With `is_gathered` every rank goes on with its part of
    another linear; backward: reduce-scatter of the gradient's terms.
    """
    plain_forward = module.forward

    @functools.wraps(plain_forward)
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        features = plain_forward(hidden_states)
        return (join if split.is_joined else gather_and_enter)(features, features.dim() - 1, group)

    module.forward = forward


def norm_over_heads(module: nn.Module, segment: Segment, group: dist.ProcessGroup) -> None:
    """A norm over the features of all heads (OLMo 2's of queries and keys): (b, s, features / T) in and out.

    Forward: all-gather of the features, the norm on every rank, own features. Backward: all-gather of the gradient.
    Where ranks share heads, each head counts once in the norm, and gets the gradients of all that share it.
    """
    degree = dist.get_world_size(group)
    sharing = degree // segment.heads if segment.is_shared(degree) else 1
    plain_forward = module.forward

    @functools.wraps(plain_forward)
    def forward(features: torch.Tensor) -> torch.Tensor:
        dim = features.dim() - 1
        whole = join(features, dim, group)
        if sharing == 1:
            return cut(plain_forward(whole), dim, group)
        distinct = whole.unflatten(dim, (segment.heads, sharing, -1)).select(dim + 1, 0).flatten(dim)
        by_head = plain_forward(distinct).unflatten(dim, (segment.heads, -1))
        return cut(by_head.repeat_interleave(sharing, dim).flatten(dim), dim, group)

    module.forward = forward


def look_up_vocabulary(module: nn.Embedding, values: dict[str, LocalValue], group: dist.ProcessGroup) -> None:
    """Embedding whose rows (V / T, H) are this rank's part of the vocabulary; token ids (b, s) are whole.

    Forward: all-reduce of (b, s, H), of which a rank contributes the tokens of its rows. Backward: nothing.
    """
    vocabulary = VocabularyShard.of(module.weight.shape[0], group)
    module.padding_idx = local_padding_index(module.padding_idx, first=vocabulary.first, rows=vocabulary.size)
    plain_forward = module.forward
    # Inside, `module.weight` is the local one.
    module.forward = lambda input_ids: embed(plain_forward, input_ids, first=vocabulary.first, weight=module.weight)
    compute_locally(module, values)
    local_forward = module.forward

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        # Every rank would take such an id for another's and add zeros. Raises at once on a CPU, later on CUDA.
        is_known = (input_ids >= 0) & (input_ids < vocabulary.total)
        torch._assert_async(is_known.all(), f"a token id is outside of the vocabulary of {vocabulary.total}")
        return leave(local_forward(input_ids), group)

    module.forward = forward
