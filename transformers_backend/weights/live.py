"""The tensors of a model as it trains: sharded, and in a pipeline on some of the ranks only. The source of exports.

Between the shards of one tensor (`shards.py`) and those who want whole ones: `export.py`, and `full_state_dict` and
`full_gradients` of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from parallelize.pipeline_parallel.holders import Holders
from transformers_backend.weights.shards import full_tensor


class LiveTensors:
    """Tensors by name: ranks gather them together, and the ones that do not keep them drop them."""

    def __init__(
        self, model: nn.Module, tensors: Mapping[str, torch.Tensor], pipeline_group: dist.ProcessGroup | None
    ) -> None:
        """tensors: those of this rank, parameters or buffers of `model` or what has their shape (gradients).

        pipeline_group: ranks that hold others, which then all call this; None where this rank has all.
        """
        self._model, self._tensors = model, tensors
        self._holders = None if pipeline_group is None else Holders(tensors, pipeline_group)

    @property
    def names(self) -> list[str]:
        """Of the tensors of all ranks."""
        return list(self._tensors if self._holders is None else self._holders)

    def meta(self, name: str) -> torch.Tensor:
        """Shape and dtype of the full tensor, on the meta device."""
        if self._holders is not None:
            return self._holders.meta(name)
        tensor = self._tensors[name]
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def read(self, names: tuple[str, ...], *, keep: bool) -> dict[str, torch.Tensor]:
        """{name: full tensor on the CPU, in Transformers' order}; empty without `keep`.

        Every rank calls it for the same names in the same order.
        """
        kept = {}
        for name in names:
            full = self._full(name)
            if keep:
                kept[name] = full.to("cpu", copy=True)
        return kept

    def _full(self, name: str) -> torch.Tensor:
        def read() -> torch.Tensor:
            return full_tensor(self._model, name, self._tensors[name])

        return read() if self._holders is None else self._holders.fetch(name, read)
