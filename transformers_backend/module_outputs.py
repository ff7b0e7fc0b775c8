"""Where a split model goes wrong: the first module whose output is no part of the plain model's.

`tensor_proof.py` asks when a plan of the user's is not exact. Forward hooks record what every module returns, in order
of execution, on the plain and on the split twin, and each rank looks for its part in the plain output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from parallelize.distributed import gather_objects
from parallelize.tensor_parallel import TensorPlan
from parallelize.tensor_parallel.plan import Segment
from transformers_backend.proof import MODEL_ERRORS

_TOLERANCE = 1e-4  # of fp32, relative to the largest value of an output; mistakes are far larger

Call = tuple[str, int]
"""Name of a module, and how often it ran before in this forward."""


@dataclass
class Outputs:
    """What one forward returned, module by module."""

    calls: dict[Call, list[torch.Tensor]] = field(default_factory=dict)
    """The tensors that each call returned, in the order in which calls ended: inner modules before outer ones."""
    raised_in: Call | None = None
    """The innermost call that an exception ended, if one did."""


def record_outputs(model: nn.Module, run: Callable[[], object]) -> Outputs:
    """Call `run`, which runs `model`, and keep what modules returned; one that raises keeps what ran before."""
    outputs, running, counts = Outputs(), [], {}
    handles = []

    def begin(name: str) -> None:
        counts[name] = counts.get(name, -1) + 1
        running.append((name, counts[name]))

    def end(output: object) -> None:
        tensors = [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        outputs.calls[running.pop()] = tensors

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: begin(name)))
        handles.append(module.register_forward_hook(lambda module, args, output: end(output)))
    try:
        with torch.no_grad():
            run()
    except MODEL_ERRORS:
        outputs.raised_in = running[-1] if running else None
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def first_difference(plain: Outputs, split: Outputs, plan: TensorPlan, group: dist.ProcessGroup) -> str | None:
    """The first module, in the plain model's order, that raised or returned no part of the plain output on some rank.

    None where there is none. Every rank of the tensor-parallel `group` calls it and gets the same name.
    """
    rank = dist.get_rank(group)
    layouts = {split.segments for split in plan.splits.values() if split.segments}
    own = None
    for position, (call, expected) in enumerate(plain.calls.items()):
        raised = call == split.raised_in
        if raised or (call in split.calls and not _are_parts(split.calls[call], expected, layouts, rank, plan.degree)):
            own = (position, call[0])
            break
    found = [difference for difference in gather_objects(own, group) if difference is not None]
    return (min(found)[1] or "the whole model") if found else None


def _are_parts(
    local: list[torch.Tensor],
    plain: list[torch.Tensor],
    layouts: set[tuple[Segment, ...]],
    rank: int,
    degree: int,
) -> bool:
    if len(local) != len(plain):
        return False
    return all(
        any(_is_close(part, candidate) for candidate in _parts(part, whole, layouts, rank, degree))
        for part, whole in zip(local, plain, strict=True)
    )


def _parts(
    part: torch.Tensor, whole: torch.Tensor, layouts: set[tuple[Segment, ...]], rank: int, degree: int
) -> Iterator[torch.Tensor]:
    """What a rank may have of the tensor `whole`, of the shape of `part`."""
    if part.shape == whole.shape:
        yield whole
        return
    if part.dim() != whole.dim():
        return
    dims = [dim for dim in range(whole.dim()) if part.shape[dim] != whole.shape[dim]]
    if len(dims) > 1 or part.shape[dims[0]] > whole.shape[dims[0]]:
        return
    (dim,) = dims
    full, size = whole.shape[dim], part.shape[dim]
    # Rounded down, for heads that several ranks share; DTensor's way, for what the degree does not divide.
    starts = {rank * full // degree // max(size, 1) * size, rank * -(-full // degree)}
    for start in starts:
        if start + size <= full:
            yield whole.narrow(dim, start, size)
    for segments in layouts:
        if sum(segment.size for segment in segments) == full:
            packed = [_own_part(whole, dim, segment, rank, degree) for segment in _with_starts(segments)]
            yield torch.cat(packed, dim)


def _with_starts(segments: tuple[Segment, ...]) -> Iterator[tuple[int, Segment]]:
    start = 0
    for segment in segments:
        yield start, segment
        start += segment.size


def _own_part(whole: torch.Tensor, dim: int, placed: tuple[int, Segment], rank: int, degree: int) -> torch.Tensor:
    """A rank's part of one segment: its share, or the head that it shares with others."""
    start, segment = placed
    parts = segment.heads if segment.is_shared(degree) else degree
    width = segment.size // parts
    return whole.narrow(dim, start + rank * parts // degree * width, width)


def _is_close(part: torch.Tensor, candidate: torch.Tensor) -> bool:
    if part.shape != candidate.shape:
        return False
    if not part.is_floating_point():
        return torch.equal(part, candidate)
    finite = candidate[candidate.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 1.0
    return torch.allclose(part, candidate, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True)
