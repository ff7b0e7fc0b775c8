"""Random numbers of ranks that share a model: dropout must be the same in some places and must differ in others.

All tensor-parallel ranks of a data rank begin with the same state of the default generators. Where they compute the
same thing (embeddings, and without sequence parallelism everything between regions), they must drop the same numbers.
Where each has a part of its own (its heads, its features, its tokens), one mask for all would repeat: head 1 would
lose what head 5 loses. There the default generators are *forked*: they go on with a seed of the rank's own, and come
back as they were.

    same on all ranks ─┬─ enter: draw a seed, remember the state, seed + rank ── a mask of each rank's own ─┐
                       └──────────────────────── the remembered state ─────────── leave ─────────────────────┴─ same

Without sequence parallelism a fork lasts from a region's entry to its exit; with it, from where the sequence is cut to
where it is joined. A model without dropout gets none of this.

The seed is drawn from the CPU's generator, so nothing waits for a GPU, and a recomputed layer (activation
checkpointing), whose random state is put back before it runs again, draws the same seed and so the same masks.
"""

from __future__ import annotations

import functools

import torch
from torch import nn


class ForkedRandomness:
    """The default generators (of the CPU, and of the current CUDA device where that computes) in two roles."""

    def __init__(self, rank: int, device_type: str) -> None:
        """rank: within the tensor-parallel group. device_type: where the model computes, "cpu" or "cuda"."""
        self._rank = rank
        self._uses_cuda = device_type == "cuda"
        self._shared: list[torch.Tensor] | None = None  # the state of all ranks, while each is in one of its own

    @property
    def is_forked(self) -> bool:
        return self._shared is not None

    def enter(self) -> None:
        """Go on with numbers of this rank's own. Within a fork it does nothing: a region may have two entries."""
        if self.is_forked:
            return
        seed = int(torch.randint(2**62, (), device="cpu"))  # the same on every rank, another one every time
        self._shared = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self._uses_cuda else [])]
        torch.default_generator.manual_seed(seed + self._rank)
        if self._uses_cuda:
            torch.cuda.manual_seed(seed + self._rank)

    def leave(self) -> None:
        """Go back to the state that all ranks share. Outside a fork it does nothing."""
        if self._shared is None:
            return
        states, self._shared = self._shared, None
        torch.set_rng_state(states[0])
        if self._uses_cuda:
            torch.cuda.set_rng_state(states[1])

    def leave_after(self, module: nn.Module) -> None:
        """However `module.forward` ends (an error, a recomputation that stops early), no fork outlasts it."""
        plain_forward = module.forward

        @functools.wraps(plain_forward)
        def forward(*args, **kwargs):
            try:
                return plain_forward(*args, **kwargs)
            finally:
                self.leave()

        module.forward = forward
