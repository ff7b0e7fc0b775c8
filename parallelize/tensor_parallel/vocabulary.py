"""The vocabulary split over tensor-parallel ranks: token embedding, entry of the head, cross-entropy.

Each rank holds the rows of the embedding and of the head that belong to its part of the vocabulary. This is where
tensor parallelism begins and ends in a step: `embed` turns token ids into partial hidden states that the caller
all-reduces; after the layers, `enter` marks where hidden states enter the head, whose logits are local, and
`sum_cross_entropy` makes of them the loss of the whole vocabulary. No rank ever holds the logits of all of it,
except where a user asks for logits (`gather_logits`).

The method is Megatron-LM's (Shoeybi et al., arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallelize.tensor_parallel.collectives import all_gather, all_reduce


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary that this rank holds; `VocabularyShard.of` makes it."""

    first: int
    """Its first entry; `total` where the part is empty."""
    size: int
    """How many entries it has; 0 on the last ranks of a vocabulary that is too small."""
    total: int
    """Entries of the whole vocabulary."""
    group: dist.ProcessGroup
    """The ranks that share the vocabulary."""

    @classmethod
    def of(cls, total: int, group: dist.ProcessGroup) -> VocabularyShard:
        """The part of a vocabulary of `total` entries that DTensor's Shard(0) leaves on this rank of `group`."""
        largest = -(-total // group.size())
        first = min(group.rank() * largest, total)
        return cls(first=first, size=min(largest, total - first), total=total, group=group)

    @property
    def largest(self) -> int:
        """Entries of the largest part, that of the first rank: what ranks must use that decide something together."""
        return -(-self.total // self.group.size())


# -- embedding ----------------------------------------------------------------------------------------------------


def embed(
    embedding_forward: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    *,
    first: int,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Look up those of `input_ids` that this rank holds: a partial output, zero for the others, to be all-reduced.

    embedding_forward: the embedding module's own forward while it holds the local `weight`, (rows, hidden), of the
    vocabulary entries from `first` on. What it does beyond the lookup (Gemma scales) stays in. input_ids: any shape,
    global ids. Returns (*input_ids.shape, hidden). The module's `padding_idx` must be `local_padding_index`.
    """
    rows, hidden = weight.shape
    if rows == 0:  # nothing to look up, and no row to look up in its place; the empty weight still gets a gradient
        return weight.new_zeros(*input_ids.shape, hidden) + weight.sum()
    is_here = (input_ids >= first) & (input_ids < first + rows)
    output = embedding_forward(torch.where(is_here, input_ids - first, 0))
    return output.masked_fill(~is_here[..., None], 0)


def local_padding_index(padding_index: int | None, *, first: int, rows: int) -> int | None:
    """`padding_idx` of an embedding that holds `rows` entries from `first` on, `padding_index` being the whole one's.

    nn.Embedding leaves that entry without a gradient; a rank that does not hold it has no such entry.
    """
    if padding_index is None or not first <= padding_index < first + rows:
        return None
    return padding_index - first


# -- loss ---------------------------------------------------------------------------------------------------------


def sum_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, first: int, group: dist.ProcessGroup, ignore_index: int = -100
) -> torch.Tensor:
    """Summed fp32 cross-entropy of logits that are split over the vocabulary: the same scalar on every rank.

    logits: (..., local vocabulary), this rank's entries from `first` on, of any floating dtype; a part may be empty.
    targets: (...), global ids; `ignore_index` counts nothing, an id that no rank holds makes the loss infinite.

    Forward: two all-reduces, of (2, tokens) and (tokens), in fp32. Backward: none, each rank's gradient is its part of
    softmax - one_hot. Beside the logits one fp32 buffer of their size is kept, which the backward overwrites, so a
    second backward raises.
    """
    return _SumCrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), first, group, ignore_index)


class _SumCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: torch.Tensor, targets: torch.Tensor, first: int, group: dist.ProcessGroup, ignore_index: int
    ):
        positions = targets - first  # of the targets among the columns of `logits`
        is_here = (positions >= 0) & (positions < logits.shape[-1])
        # Both through one maximum, and not the target's logit through a sum: a target that no rank holds stays at -inf.
        largest_logits, target_logits = all_reduce(
            torch.stack([_largest(logits), _look_up(logits, positions, is_here)]), "max", group
        )
        # (tokens, vocabulary): of bf16 logits and fp32 maxima the difference is fp32, without a copy of the logits.
        exponentials = torch.sub(logits, largest_logits[:, None]).float().exp_()
        sums = all_reduce(exponentials.sum(-1), "sum", group)
        is_target = targets != ignore_index
        ctx.save_for_backward(exponentials, sums, positions, is_here, is_target)
        ctx.logits_dtype = logits.dtype
        return torch.where(is_target, sums.log() + largest_logits - target_logits, 0.0).sum()

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        exponentials, sums, positions, is_here, is_target = ctx.saved_tensors
        scales = grad_output * is_target  # (tokens,)
        gradient = exponentials.mul_((scales / sums)[:, None])
        if gradient.shape[-1] > 0:
            positions = torch.where(is_here, positions, 0)
            gradient.scatter_add_(-1, positions[:, None], -(scales * is_here)[:, None])
        return gradient.to(ctx.logits_dtype), None, None, None, None


def join_statistics(
    lse: torch.Tensor, target_logits: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and target's logit over the whole vocabulary, from those over each rank's part; all (tokens,).

    Both are -inf where a rank has nothing: an empty part, a target of another rank; a target that no rank holds stays
    at -inf. Forward: two all-reduces, of (2, tokens) and (tokens). Backward: none, as every rank computes the same
    loss, and each has the gradient of its own part.
    """
    return _JoinStatistics.apply(lse, target_logits, group)


class _JoinStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lse: torch.Tensor, target_logits: torch.Tensor, group: dist.ProcessGroup):
        largest, found = all_reduce(torch.stack([lse, target_logits]), "max", group)
        whole = largest + all_reduce((lse - largest).exp(), "sum", group).log()
        ctx.save_for_backward(lse, whole)
        return whole, found.clone()

    @staticmethod
    def backward(ctx, grad_lse: torch.Tensor, grad_found: torch.Tensor):
        lse, whole = ctx.saved_tensors
        return grad_lse * (lse - whole).exp(), grad_found, None


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) -> (tokens,) in fp32; -inf where the vocabulary is empty."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:1], -torch.inf, dtype=torch.float32)
    return logits.amax(-1).float()


def _look_up(logits: torch.Tensor, positions: torch.Tensor, is_here: torch.Tensor) -> torch.Tensor:
    """The logit of each token at its position, (tokens,) in fp32; -inf for positions that are not here."""
    if logits.shape[-1] == 0:
        return _largest(logits)
    found = logits.gather(-1, torch.where(is_here, positions, 0)[:, None])[:, 0]
    return found.float().masked_fill(~is_here, -torch.inf)


# -- logits for those who ask for them ----------------------------------------------------------------------------


def gather_logits(logits: torch.Tensor, vocabulary: VocabularyShard) -> torch.Tensor:
    """Logits of the whole vocabulary, (..., total), the same on every rank, from local ones, (..., size).

    Forward: all-gather over the vocabulary. Backward: the own part, because every rank computes the same with them.
    """
    return _GatherLogits.apply(logits, vocabulary)


class _GatherLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, vocabulary: VocabularyShard) -> torch.Tensor:
        ctx.vocabulary = vocabulary
        padded = F.pad(logits, (0, vocabulary.largest - vocabulary.size))
        gathered = all_gather(padded[None], 0, vocabulary.group)  # (ranks, ..., largest)
        starts = range(0, vocabulary.largest * len(gathered), vocabulary.largest)
        sizes = [min(max(vocabulary.total - start, 0), vocabulary.largest) for start in starts]
        # Joined without the padding, and not cut afterwards: FSDP2 warns of a model whose output is a view.
        return torch.cat([part[..., :size] for part, size in zip(gathered, sizes, strict=True)], dim=-1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient.narrow(-1, ctx.vocabulary.first, ctx.vocabulary.size), None
