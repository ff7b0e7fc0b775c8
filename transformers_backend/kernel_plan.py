"""Which modules of a model compute by a kernel: found by what they compute, and proven before they are replaced.

    "auto" or names -> the twin on the run's device: does each kernel compute there what it should?
                    -> norms (`kernel_norms.py`), gates (`kernel_gates.py`), rotary embeddings (`kernel_rotary.py`) and
                       the head (`head_kernel.py`), each compared with a kernel's plain-torch reference
                    -> {module's name: kernel} -> parallelize/kernels/

Modules that no kernel fits stay as they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from parallelize.config import KERNELS, KernelConfig
from parallelize.distributed import gather_objects
from parallelize.kernels.language import KERNEL_ERRORS
from parallelize.kernels.replace import ModuleKernel, RotaryKernel, apply_kernels
from transformers_backend.decoder import describe_decoder
from transformers_backend.head_kernel import find_linear_head
from transformers_backend.kernel_gates import gate_kernels
from transformers_backend.kernel_norms import norm_kernels
from transformers_backend.kernel_rotary import rotary_kernels
from transformers_backend.loss import LinearHead
from transformers_backend.proof import GRADIENT_TOLERANCE, example_batch, loss_and_gradients, relative_errors
from transformers_backend.twin import build_twin

logger = logging.getLogger(__name__)


@dataclass
class KernelPlan:
    """What computes by a kernel, and what could not."""

    kernels: dict[str, ModuleKernel | RotaryKernel] = field(default_factory=dict)
    """By name of the module."""
    linear_head: LinearHead | None = None
    """What the head is, where the loss is computed from it without logits; `loss.py` does so."""
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many modules there are of (class, the kernel's name or why it has none)."""

    def add(self, name: str, module: nn.Module, found: ModuleKernel | RotaryKernel | str) -> None:
        """found: the module's kernel, or why it has none."""
        if not isinstance(found, str):
            self.kernels[name] = found
        self.kinds[type(module).__name__, found if isinstance(found, str) else found.kernel] += 1

    def summary(self) -> str:
        """How many modules compute by which kernel, e.g. "rms_norm 5"."""
        counts = Counter(kernel.kernel for kernel in self.kernels.values())
        if self.linear_head is not None:
            counts[self.linear_head.kernel] = 1
        return ", ".join(f"{name} {count}" for name, count in counts.items())


def choose_kernels(
    hf_model: PreTrainedModel, config: KernelConfig, device: torch.device, dtype: torch.dtype, *, is_compiled: bool
) -> KernelPlan:
    """Find the modules of a whole model that may have one of the enabled kernels. Changes nothing.

    device, dtype: of the computation. A kernel that does not compute what it should on this very device is left out
    with a warning. Every rank calls this, and all leave out the same.
    """
    names = enabled_kernels(config, device, is_compiled=is_compiled)
    if names and device.type == "cuda":
        found = gather_objects(wrong_on_device(hf_model, names, device, dtype))
        reasons = {name: reason for of_rank in found for name, reason in of_rank.items()}
        for name, reason in reasons.items():
            logger.warning('Without the kernel "%s", which is wrong on this device: %s', name, reason)
        names = [name for name in names if name not in reasons]
    return find_kernels(hf_model, names)


def find_kernels(hf_model: PreTrainedModel, names: Collection[str]) -> KernelPlan:
    """The modules that are what one of these kernels computes."""
    plan = KernelPlan()
    twin = build_twin(hf_model.config, type(hf_model)) if {"gated_activation", "rotary"} & set(names) else None
    searches = {
        "rms_norm": lambda: norm_kernels(hf_model),
        "gated_activation": lambda: gate_kernels(hf_model, twin),
        "rotary": lambda: rotary_kernels(hf_model, twin),
    }
    for name, search in searches.items():
        if name in names:
            for module_and_kernel in search():
                plan.add(*module_and_kernel)
    if "linear_cross_entropy" in names:
        head = find_linear_head(hf_model)
        plan.linear_head = head if isinstance(head, LinearHead) else None
        plan.kinds[describe_decoder(hf_model).head, head if isinstance(head, str) else head.kernel] += 1
    return plan


@torch.enable_grad()
def wrong_on_device(
    hf_model: PreTrainedModel, names: Collection[str], device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Which kernels are wrong on a device, and in what: tried on the twin, in fp32 and in the run's dtype.

    A gradient may be off by twice what it is without the kernel, from that in fp32 without it.
    """

    def run(precision: torch.dtype, *kernels: str) -> dict[str, torch.Tensor]:
        twin = build_twin(hf_model.config, type(hf_model))
        plan = find_kernels(twin, kernels)
        apply_kernels(twin, plan.kernels)
        batch = (tensor.to(device) for tensor in example_batch())
        twin = twin.to(device, precision)
        return loss_and_gradients(twin, *batch, chunked=False, linear_head=plan.linear_head)[1]

    exact = run(torch.float32)
    usual = {precision: max(relative_errors(exact, run(precision)).values()) for precision in {torch.float32, dtype}}

    def why_not(name: str) -> str | None:
        for precision, size in usual.items():
            try:
                errors = relative_errors(exact, run(precision, name))
            except KERNEL_ERRORS as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            worst = max(errors, key=errors.get)
            if not errors[worst] <= max(2 * size, GRADIENT_TOLERANCE):
                return f"in {precision} the gradient of {worst} is off by {errors[worst]:.1e} instead of {size:.1e}"
        return None

    return {name: reason for name in names if (reason := why_not(name)) is not None}


def enabled_kernels(config: KernelConfig, device: torch.device, *, is_compiled: bool) -> tuple[str, ...]:
    """The names that "auto" stands for: on a GPU all that the compiler does not make as well itself.

    Not linear_cross_entropy: it saves memory for a fourth matrix product, and how long that takes is unmeasured.
    """
    if config.enable == ["none"]:
        return ()
    if config.enable != ["auto"]:
        return tuple(config.enable)
    if device.type != "cuda" or is_compiled:
        return ()
    return tuple(name for name in KERNELS if name != "linear_cross_entropy")
