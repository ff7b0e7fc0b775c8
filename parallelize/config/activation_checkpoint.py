"""What a user can choose about recomputation: the `[activation_checkpoint]` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parallelize.config.checks import choice_problems


@dataclass
class ActivationCheckpointConfig:
    mode: Literal["none", "full", "selective"] = "none"
    """What the backward recomputes: "none" keeps all activations, "full" keeps each layer's input only, "selective"
    see selective_ac_option."""

    selective_ac_option: str = "2"
    """With mode "selective": an integer n recomputes every n-th layer, "op" recomputes inside every layer all but
    attention, every second matrix product and communication."""

    preserve_rng_state: bool = True
    """Replay the random state in the recomputation, so that dropout draws the same mask. False is faster where a
    model has no dropout."""

    def problems(self) -> list[str]:
        found = choice_problems("activation_checkpoint", self, "mode", ("none", "full", "selective"))
        option = str(self.selective_ac_option)
        if option != "op" and not (option.isdigit() and int(option) > 0):
            found.append(
                f'activation_checkpoint.selective_ac_option = "{option}": must be "op" or a positive integer n, '
                'as a string, for every n-th layer, e.g. "2".'
            )
        return found
