"""Where a step went wrong: which ranks have a loss, and which parameters gradients, that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from parallelize.distributed import gather_objects
from transformers_backend.weights import local_part


def describe_nonfinite(
    gradients: Mapping[str, torch.Tensor], *, loss_is_finite: bool, pipeline: Sequence[int] = ()
) -> str:
    """A sentence that is the same on every rank; all call it.

    gradients: this rank's, or its shards, by parameter. pipeline: the ranks of the one that it is in, of which only the
    last knows the loss, and any may be the cause.
    """
    bad = [name for name, gradient in gradients.items() if not local_part(gradient).isfinite().all()]
    reports = gather_objects((loss_is_finite, bad, pipeline))
    ranks = [
        f"{rank} (the end of a pipeline of ranks {', '.join(map(str, pipeline))})" if pipeline else str(rank)
        for rank, (is_finite, _, pipeline) in enumerate(reports)
        if not is_finite
    ]
    names = sorted({name for _, found, _ in reports for name in found})
    on_ranks = f"Non-finite loss on rank {', '.join(ranks)}" if ranks else "Finite loss on every rank"
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{on_ranks}; non-finite gradients of {listed or 'no parameter'}."
