"""Optimizers and learning-rate schedules for the parameters of an already sharded model.

Flow: `build_optimizer` splits the parameters (decayed or not, Muon's hidden matrices or not) and returns a list of
torch optimizers, `build_schedulers` returns one schedule for each. The trainer steps both lists. All functions take
flat values; the `[optimizer]` and `[lr_scheduler]` sections are read by the caller.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

from parallelize.distributed import gathered

logger = logging.getLogger(__name__)

Implementation = Literal["for-loop", "foreach", "fused"]
DecayType = Literal["linear", "sqrt", "cosine"]

_FUSED_ADAMW_DEVICES = ("cuda", "cpu", "mps", "xpu")


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    name: Literal["AdamW", "Muon"],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    implementation: Implementation,
    matrix_names: AbstractSet[str] = frozenset(),
) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together update every parameter that requires a gradient, each exactly once.

    "AdamW" gives one optimizer. "Muon" gives Muon for the two-dimensional parameters among `matrix_names` (the
    hidden matrices, i.e. those inside decoder layers) and AdamW for the rest: embedding, head, norms, biases. Muon's
    update is scaled to the size of an AdamW update (https://arxiv.org/abs/2502.16982), so that `lr` and
    `weight_decay` serve both; `beta1`, `beta2` and `eps` are AdamW's.

    Weight decay applies to parameters of two or more dimensions only: norms and biases are kept off it.

    `implementation` is AdamW's: "fused" (one kernel for all parameters; where the device has none, "foreach"),
    "foreach" or "for-loop".
    """
    named_parameters = _trainable(named_parameters)
    if not named_parameters:
        raise ValueError("build_optimizer: no parameter requires a gradient; unfreeze some before training.")
    if name not in ("AdamW", "Muon"):
        raise ValueError(f'optimizer.name = "{name}": must be "AdamW" or "Muon".')
    is_matrix = {
        key: name == "Muon" and key in matrix_names and parameter.ndim == 2 for key, parameter in named_parameters
    }
    matrices = [parameter for key, parameter in named_parameters if is_matrix[key]]
    others = [parameter for key, parameter in named_parameters if not is_matrix[key]]

    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(ShardedMuon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(
            torch.optim.AdamW(
                _parameter_groups(others, weight_decay),
                lr=lr,
                betas=(beta1, beta2),
                eps=eps,
                **_adamw_flags(implementation, others),
            )
        )
    return optimizers


def _trainable(named_parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Parameters that require a gradient; one that is tied under two names is kept under the first."""
    seen: set[int] = set()
    kept = []
    for key, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            kept.append((key, parameter))
    return kept


def _parameter_groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Groups by (decayed or not, mesh): a fused or foreach kernel refuses a list of DTensors on different meshes."""
    groups: dict[tuple[bool, object], list[Tensor]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.ndim >= 2, mesh), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decayed else 0.0}
        for (decayed, _), members in groups.items()
    ]


def _adamw_flags(implementation: Implementation, parameters: Sequence[Tensor]) -> dict[str, bool]:
    if implementation not in ("for-loop", "foreach", "fused"):
        raise ValueError(f'optimizer.implementation = "{implementation}": must be "for-loop", "foreach" or "fused".')
    if implementation == "fused" and all(parameter.device.type in _FUSED_ADAMW_DEVICES for parameter in parameters):
        return {"fused": True, "foreach": False}
    return {"fused": False, "foreach": implementation != "for-loop"}


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon whose update of a sharded matrix is bit by bit that of the unsharded one.

    Muon orthogonalises whole matrices, in bf16. On DTensors torch's own step runs that iteration through sharded
    matrix products: 11 to 16 collectives a matrix and step, partial sums rounded to bf16 once more (measured on 2
    ranks: updates 0 to 3 % from the single-device ones, up to twice as far from exact ones), and a RuntimeError where
    a matrix has fewer rows than there are ranks. Here momentum stays sharded, the bf16 update is gathered once, every
    rank orthogonalises it, and each keeps its own shard. The price is that all ranks repeat the same work.

    Options, state and checkpoints are those of torch.optim.Muon. Call `step` on every rank of the parameters' mesh.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = update.bfloat16()  # before the gather: the orthogonalisation starts in bf16 anyway
        # A fused parameter comes in its stored order (parallelize/tensor_parallel/packing.py), a permutation P of its
        # original rows or columns, and needs no translation: Newton-Schulz on P X is P times Newton-Schulz on X.
        whole = gathered(update) if isinstance(update, DTensor) else update
        whole = orthogonalize(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        if isinstance(parameter, DTensor):
            # Every rank has the same matrix, so each cuts its own shard: no source rank, no communication.
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(whole, alpha=-group["lr"] * _shape_factor(parameter.shape, group["adjust_lr_fn"]))


def orthogonalize(
    matrix: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float = 1e-7
) -> Tensor:
    """Push all singular values of a plain (rows, columns) matrix towards 1; singular vectors stay. Returns bf16.

    Newton-Schulz iteration with the odd quintic polynomial a x + b x^3 + c x^5
    (https://kellerjordan.github.io/posts/muon/), on the side whose Gram matrix is the smaller one.
    """
    a, b, c = coefficients
    is_tall = matrix.size(0) > matrix.size(1)
    wide = (matrix.T if is_tall else matrix).bfloat16()
    wide = wide / wide.norm().clamp(min=eps)  # the iteration converges for singular values up to 1
    for _ in range(iterations):
        gram = wide @ wide.T  # (smaller side, smaller side)
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide


def _shape_factor(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    """torch.optim.Muon's two rules for how the step grows with a matrix's shape."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def build_schedulers(
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    warmup_steps: int,
    total_steps: int,
    decay_ratio: float | None,
    decay_type: DecayType,
    min_lr_factor: float,
) -> list[LambdaLR]:
    """Return a `warmup_stable_decay` schedule for each optimizer; call `.step()` on each after the optimizers' step.

    Phases that do not fit into `total_steps` are cut as described there, which is logged (on all ranks, so as no
    warning: those are shown for every rank).
    """
    if decay_type not in ("linear", "sqrt", "cosine"):
        raise ValueError(f'lr_scheduler.decay_type = "{decay_type}": must be "linear", "sqrt" or "cosine".')
    if warmup_steps > total_steps:
        logger.info("lr_scheduler.warmup_steps = %d: cut to the %d steps of the run.", warmup_steps, total_steps)
    elif decay_ratio is not None and warmup_steps + round(total_steps * decay_ratio) > total_steps:
        logger.info(
            "lr_scheduler.decay_ratio = %g: cut to the %d steps that %d warm-up steps leave of %d.",
            decay_ratio, total_steps - warmup_steps, warmup_steps, total_steps,
        )  # fmt: skip
    factor = functools.partial(
        warmup_stable_decay,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        decay_ratio=decay_ratio,
        decay_type=decay_type,
        min_lr_factor=min_lr_factor,
    )
    return [LambdaLR(optimizer, factor) for optimizer in optimizers]


def warmup_stable_decay(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    decay_ratio: float | None,
    decay_type: DecayType,
    min_lr_factor: float,
) -> float:
    """The factor on the learning rate for optimizer step `step`, counted from 0; torchtitan v0.2.2's numbers.

    Warm-up is linear: step 0 has 1 / warmup_steps, step warmup_steps - 1 has 1. The last round(total_steps *
    decay_ratio) steps decay to `min_lr_factor`, and the steps between stay at 1; decay_ratio None decays over
    everything after warm-up. The end of the decay is reached at step `total_steps`, one after the last, so that no
    step is wasted on a learning rate of 0; beyond it the factor stays.

    `decay_type` is the curve from 1 to 0 over the decay's progress p in (0, 1]: "linear" 1 - p, "sqrt" 1 - sqrt(p),
    "cosine" (1 + cos(pi p)) / 2; `min_lr_factor` lifts its end. Warm-up is cut to `total_steps`, decay to what
    warm-up leaves.
    """
    warmup_steps = min(warmup_steps, total_steps)
    after_warmup = total_steps - warmup_steps
    decay_steps = after_warmup if decay_ratio is None else min(round(total_steps * decay_ratio), after_warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    steps_left = max(total_steps - step, 0)
    if decay_steps == 0 or steps_left >= decay_steps:
        return 1.0
    progress = 1 - steps_left / decay_steps
    curves: dict[str, float] = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }
    return min_lr_factor + (1 - min_lr_factor) * curves[decay_type]
