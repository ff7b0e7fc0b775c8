"""Steps that went wrong: whether a step may update the weights, and where what is not finite came from."""

from __future__ import annotations

import math
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


class FiniteCheck:
    """Whether loss and gradient norm of each step are finite, known in time to leave the weights as they were.

    To read two numbers the host waits until the device has computed them, and the device then waits for the host. So on
    a GPU the optimizers themselves are told by a flag that stays there (`found_inf`, by which torch's GradScaler tells
    a fused optimizer to change neither weights nor state), and the host reads the numbers when it needs them or begins
    the next step: the optimizer's work then lies between them and an idle device.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], *, is_late: bool | None = None) -> None:
        """is_late: tell the optimizers by the flag; None decides by what they are and where their parameters live."""
        self._optimizers = optimizers
        self.is_late = all(map(_takes_flag_on_gpu, optimizers)) if is_late is None else is_late
        self._numbers: torch.Tensor | None = None  # loss and gradient norm on the host, once `_arrived`
        self._arrived: torch.cuda.Event | None = None

    def allows_update(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Whether to call the optimizers, for two fp32 scalars. Late it always says so, and `unseen` tells."""
        if not self.is_late:
            return math.isfinite(loss.item()) and math.isfinite(grad_norm.item())
        both = torch.stack([loss, grad_norm])
        flag = (~both.isfinite()).any().float()
        for optimizer in self._optimizers:
            optimizer.found_inf = flag
        on_gpu = both.device.type == "cuda"
        self._numbers = torch.empty(2, pin_memory=on_gpu)
        self._numbers.copy_(both, non_blocking=True)
        if on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return True

    def unseen(self) -> tuple[float, float] | None:
        """Loss and gradient norm of the latest step if they are not finite and `allows_update` could not tell; once."""
        if self._numbers is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm = self._numbers.tolist()
        self._numbers = self._arrived = None
        return None if math.isfinite(loss) and math.isfinite(grad_norm) else (loss, grad_norm)


def _takes_flag_on_gpu(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is a fused one, as GradScaler asks, with all its parameters on a GPU."""
    on_gpu = all(parameter.device.type == "cuda" for group in optimizer.param_groups for parameter in group["params"])
    return on_gpu and getattr(optimizer, "_step_supports_amp_scaling", False)
