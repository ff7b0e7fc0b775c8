"""What a user can choose about recomputation: the `[activation_checkpoint]` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parallelize.config.checks import choice_problems

MODES = ("none", "full", "selective", "memory_budget")


@dataclass
class ActivationCheckpointConfig:
    mode: Literal["none", "full", "selective", "memory_budget"] = "none"
    """What the backward recomputes: "none" keeps all activations, "full" keeps each layer's input only, "selective"
    see selective_ac_option, "memory_budget" (for compiled layers) see memory_budget."""

    selective_ac_option: str = "2"
    """With mode "selective": an integer n recomputes every n-th layer, "op" recomputes inside every layer all but
    attention, every second matrix product and communication."""

    memory_budget: float = 0.5
    """With mode "memory_budget": the share of a layer's activations that the compiler keeps, 0 as few as with "full", 1
    all. It recomputes what is cheapest for its size: near 1 norms and activation functions, lower matrix products."""

    preserve_rng_state: bool = True
    """Replay the random state in the recomputation, so that dropout draws the same mask. False is faster where a
    model has no dropout."""

    @property
    def compilers_budget(self) -> float:
        """Of a layer's activations, the share that the compiler is to keep."""
        return self.memory_budget if self.mode == "memory_budget" else 1.0

    def problems(self) -> list[str]:
        found = choice_problems("activation_checkpoint", self, "mode", MODES)
        if not (isinstance(self.memory_budget, (int, float)) and 0 <= self.memory_budget <= 1):
            found.append(
                f"activation_checkpoint.memory_budget = {self.memory_budget!r}: must be a number from 0 to 1, the "
                "share of activations that is kept."
            )
        option = str(self.selective_ac_option)
        if option != "op" and not (option.isdigit() and int(option) > 0):
            found.append(
                f'activation_checkpoint.selective_ac_option = "{option}": must be "op" or a positive integer n, '
                'as a string, for every n-th layer, e.g. "2".'
            )
        return found
