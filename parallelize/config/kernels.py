"""What a user can choose about kernels: the `[kernels]` section."""

from __future__ import annotations

from dataclasses import dataclass, field

KERNELS = ("rms_norm", "gated_activation", "rotary", "linear_cross_entropy")
"""What `KernelConfig.enable` may name; see parallelize/kernels/."""


@dataclass
class KernelConfig:
    enable: list[str] = field(default_factory=lambda: ["auto"])
    """Triton kernels that modules may compute by, each proven equal to the module first: any of "rms_norm",
    "gated_activation", "rotary", "linear_cross_entropy"; or "none"; or "auto", those that make the run faster on its
    device, which on a CPU are none.

    "linear_cross_entropy" computes the loss without logits and without an fp32 copy of the head's gradient: for a
    vocabulary of 256,000 gigabytes less, for a third more matrix products of the head (logits are computed twice; with
    zero-bubble schedules, its backward twice). It is never part of "auto", as no GPU has measured it against the loss
    in chunks yet."""

    def __post_init__(self) -> None:
        if isinstance(self.enable, str):  # one name, as a TOML file may have it
            self.enable = [self.enable]

    def problems(self) -> list[str]:
        if self.enable in (["auto"], ["none"]):
            return []
        allowed = ", ".join(f'"{name}"' for name in KERNELS)
        return [
            f'kernels.enable has "{name}": must be "auto" or "none" alone, or a list of any of {allowed}; correct it.'
            for name in self.enable
            if name not in KERNELS
        ]
