"""Summed cross-entropy of a linear head, without all logits: from hidden states, the head's weight and targets.

    logits = cap(scale * (hidden @ weight^T + bias))       cap(z) = softcap * tanh(z / softcap), or z
    loss   = sum over tokens of lse - logits[target] + z_loss * lse^2,    lse = log(sum(exp(logits)))

The forward keeps lse (with what its rounding lost) and the target's logit of every token: a program goes through its
part of the vocabulary for a block of tokens, with a running maximum and sum in fp32. The backward computes logits
again, for all tokens and a slice of the vocabulary at a time, and keeps their gradient (tokens, slice) in the dtype of
the hidden states, as plain torch does, for two matrix products:

    grad_hidden    summed over the vocabulary in fp32, also from slice to slice; rounded once, at the end
    grad_weight    of a slice is complete at once: one program adds a tile up over all tokens in fp32, rounds it once,
                   and writes it once

So nothing is added up in low precision, no sum depends on timing (there are no atomics), and results are the same at
every run with the same tiles (`search.py`). Tokens without a target are sorted behind the others, where no kernel
looks: they cost nothing, and the device is never waited for. The price: logits are computed twice, four matrix products
instead of three.

The idea of cut-cross-entropy (Wijmans et al., https://arxiv.org/abs/2411.09009); its skipping of small gradients, which
changes results, is left out. A vocabulary that is split over ranks: `group`, and tensor_parallel/vocabulary.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallelize.kernels.language import launches_on
from parallelize.kernels.linear_cross_entropy_kernels import launch_gradients, launch_statistics, sum_precisely
from parallelize.tensor_parallel.vocabulary import join_statistics

_SLICE_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}  # tokens x vocabulary entries whose gradients exist at one time


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    first: int = 0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Summed cross-entropy, an fp32 scalar (fp64 for inputs in fp64).

    hidden (..., features), weight (vocabulary, features) and bias (vocabulary,) of one dtype; targets (...) int64,
    `ignore_index` counts nothing, and a target outside the vocabulary makes the loss infinite. softcap: above 0.
    group: ranks that hold parts of the vocabulary; weight and bias are then this rank's entries from `first` on
    (possibly none), targets are global, hidden and the loss are the same on every rank. The gradient of hidden is this
    rank's term: hidden comes from `tensor_parallel.collectives.enter`, which sums it.
    """
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise ValueError(f"hidden states in {hidden.dtype} and a head in {weight.dtype}: cast one of them.")
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    lse, _, found = _statistics(hidden, weight, bias, targets, first, ignore_index, scale, softcap or 0.0)
    if group is not None:
        lse, found = join_statistics(lse, found, group)
    losses = lse - found
    if z_loss:
        losses = losses + z_loss * lse.square()
    return torch.where(targets != ignore_index, losses, 0.0).sum()


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The same in plain torch, with all logits, computed in fp32 or more; differentiable as often as one likes."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = targets.flatten() != ignore_index
    hidden, targets = hidden.flatten(0, -2)[kept].to(wide), targets.flatten()[kept]
    logits = _logits(hidden, weight, bias, scale, softcap or 0.0)
    lse = logits.logsumexp(-1)
    return (lse - logits.gather(-1, targets[:, None])[:, 0] + z_loss * lse.square()).sum()


# -- operators ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("parallelize::linear_cross_entropy", mutates_args=())
def _statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    first: int,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token over these entries of the vocabulary the log-sum-exp, what its rounding lost, and the target's
    logit, each (tokens,) in fp32.

    The first and the last are -inf where there is nothing to sum or no target among the entries; all are 0 for ignored
    tokens. softcap 0: none.
    """
    if _launches(hidden):
        return launch_statistics(hidden, weight, bias, targets, first, ignore_index, scale, softcap)
    kept = (targets != ignore_index).nonzero()[:, 0]
    wide = hidden[kept].to(_wide(hidden))
    largest, found = wide.new_full((2, *kept.shape), -torch.inf)
    total = torch.zeros_like(largest)
    for entries in _slices(weight.shape[0], len(kept), hidden.device):
        logits = _logits(wide, weight[entries], None if bias is None else bias[entries], scale, softcap)
        larger = torch.maximum(largest, logits.amax(-1))
        shift = torch.where(larger == -torch.inf, 0.0, larger)
        total = total * (largest - shift).exp() + (logits - shift[:, None]).exp_().sum(-1)
        largest = larger
        columns, is_here = _columns(targets[kept], first, entries)
        found = torch.where(is_here, logits.gather(-1, columns[:, None])[:, 0], found)
    everywhere = wide.new_zeros((3, len(targets)))
    everywhere[:, kept] = torch.stack([*sum_precisely(largest, total.log()), found])
    return everywhere[0].clone(), everywhere[1].clone(), everywhere[2].clone()


@_statistics.register_fake
def _(hidden, weight, bias, targets, first, ignore_index, scale, softcap):
    return tuple(hidden.new_empty(targets.shape, dtype=_wide(hidden)) for _ in range(3))


@torch.library.custom_op("parallelize::linear_cross_entropy_backward", mutates_args=())
def _gradients(
    grad_lse: torch.Tensor,
    grad_found: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    lse_lost: torch.Tensor,
    first: int,
    ignore_index: int,
    scale: float,
    softcap: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias, each empty where it is not wanted or there is none."""
    if _launches(hidden):
        entries = max(1, _SLICE_ELEMENTS["cuda" if hidden.is_cuda else "cpu"] // max(len(targets), 1))
        return launch_gradients(
            grad_lse, grad_found, hidden, weight, bias, targets, lse, lse_lost, first, ignore_index, scale, softcap,
            wants_hidden, wants_weight, slice_entries=entries,
        )  # fmt: skip
    kept = (targets != ignore_index).nonzero()[:, 0]
    wide = hidden[kept].to(lse.dtype)
    grad_hidden = torch.zeros_like(wide)
    grad_weight = weight.new_empty(weight.shape if wants_weight else (0,))
    grad_bias = weight.new_empty(weight.shape[:1] if wants_weight and bias is not None else (0,))
    for entries in _slices(weight.shape[0], len(kept), hidden.device):
        part = weight[entries].to(wide.dtype)
        logits = _logits(wide, part, None if bias is None else bias[entries], scale, softcap)
        grad = (logits - lse[kept, None]).exp_() * (grad_lse * (1 - lse_lost))[kept, None]  # exp(-lost) is 1 - lost
        columns, is_here = _columns(targets[kept], first, entries)
        grad.scatter_add_(-1, columns[:, None], (grad_found[kept] * is_here)[:, None])
        if softcap:
            grad *= 1 - (logits / softcap).square()
        grad *= scale
        if wants_hidden:
            grad_hidden += grad @ part
        if wants_weight:
            grad_weight[entries] = (grad.T @ wide).to(weight.dtype)
            if bias is not None:
                grad_bias[entries] = grad.sum(0).to(bias.dtype)
    if not wants_hidden:
        return hidden.new_empty(0), grad_weight, grad_bias
    everywhere = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    everywhere[kept] = grad_hidden.to(hidden.dtype)
    return everywhere, grad_weight, grad_bias


@_gradients.register_fake
def _(grad_lse, grad_found, hidden, weight, bias, targets, lse, lse_lost, first, ignore_index, scale, softcap, wants_hidden, wants_weight):  # fmt: skip # noqa: E501
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        weight.new_empty(weight.shape[:1] if wants_weight and bias is not None else (0,)),
    )


def _keep(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, *output[:2])


def _backward(ctx, grad_lse, _, grad_found):
    hidden, weight, bias, targets, *lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    # Nothing is changed in place: zero-bubble schedules come here twice, for the inputs and for the weights. Torch does
    # not say which of the two it is, so that both compute everything.
    gradients = _gradients(
        grad_lse, grad_found, hidden, weight, bias, targets, *lse, *ctx.options, wanted[0], any(wanted[1:])
    )
    return *[gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)], *[None] * 5


_statistics.register_autograd(_backward, setup_context=_keep)


def _launches(hidden: torch.Tensor) -> bool:
    # Triton's interpreter multiplies matrices in bf16 as if their bits were integers.
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if hidden.is_cuda else (torch.float32, torch.float16)
    return launches_on(hidden.device) and hidden.dtype in dtypes


def _wide(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)) * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _slices(entries: int, tokens: int, device: torch.device) -> Iterator[slice]:
    size = max(1, _SLICE_ELEMENTS.get(device.type, _SLICE_ELEMENTS["cpu"]) // max(tokens, 1))
    return (slice(start, min(start + size, entries)) for start in range(0, entries, size))


def _columns(targets: torch.Tensor, first: int, entries: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Where targets stand among some entries (0 for those that do not), and which do."""
    columns = targets - first - entries.start
    is_here = (columns >= 0) & (columns < entries.stop - entries.start)
    return torch.where(is_here, columns, 0), is_here
