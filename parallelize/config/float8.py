"""What a user can choose about matrix products in float8: the `[float8]` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from parallelize.config.checks import choice_problems

FLOAT8_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""What `Float8Config.recipe` may be: torchao's names."""


@dataclass
class Float8Config:
    enable: bool = False
    """Multiply in float8 in the linears of the decoder layers, by torchao: faster in compiled layers on GPUs that have
    it (compute capability 8.9), and an approximation, within a few per cent of the gradients in bf16. Weights,
    optimizer, checkpoints and exports stay as they are. See docs/kernels.md."""

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """How numbers are scaled to float8's range: "tensorwise" by one factor a tensor (fastest), "rowwise" by one a row
    (more precise), "rowwise_with_gw_hp" likewise, with the gradients of weights computed in bf16 (most precise)."""

    exclude: list[str] = field(default_factory=list)
    """Linears that stay as they are, by parts of their names, such as "down_proj", "self_attn" or "layers.0."."""

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):  # one part, whose letters would be parts of every name
            self.exclude = [self.exclude]

    def problems(self) -> list[str]:
        found = choice_problems("float8", self, "recipe", FLOAT8_RECIPES)
        if not all(self.exclude):
            found.append('float8.exclude has "", which is part of every name: name a part of some, or remove it.')
        return found
