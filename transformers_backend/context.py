"""Context parallelism around a model: sequences shared out among ranks, and everything that must know of it.

Tokens, targets and positions are cut here, once, after the labels were shifted; attention runs over the ranks
(`context_attention.py`); everything else in a decoder works token by token. Whether that holds for an architecture is
tried on its twin over the actual ranks before it is trusted (`context_proof.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from parallelize.context_parallel.kernels import choose_blocks
from parallelize.context_parallel.layout import SequenceLayout, sequence_length_problems
from parallelize.context_parallel.ring import Ring
from transformers_backend.context_attention import ContextAttention
from transformers_backend.isolation import document_begins

_BATCH = ("input_ids", "targets", "position_ids")


@dataclass(frozen=True)
class ContextPlan:
    """How the sequences of a model are shared."""

    mesh: DeviceMesh
    """Of the ranks that share each of them."""
    method: str = "ring"
    """One of `methods.METHODS`."""
    is_zigzag: bool = True
    """How they lie on the ranks: see `layout.py`."""


class SharedContext:
    """The sequences of one model on the ranks of a mesh."""

    def __init__(self, hf_model: PreTrainedModel, plan: ContextPlan, dtype: torch.dtype = torch.float32) -> None:
        """Change the model's attention. dtype: that it computes in."""
        self.plan = plan
        self.own_attention = hf_model.config._attn_implementation
        """What the model attends with where it has whole sequences: the name of a function of Transformers."""
        self._mesh, self._group, self._rank = plan.mesh, plan.mesh.get_group(), plan.mesh.get_local_rank()
        self._attention = ContextAttention(hf_model, self.own_attention)
        self._blocks, self._why_blocks = choose_blocks(self._mesh.device_type, dtype)
        self._layout: SequenceLayout | None = None
        self.way = plan.method
        """How a query reaches the keys of other ranks: the method."""

    def share(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of `input_ids`, `targets` and `position_ids`, (batch, local); and `documents`, (batch, seq).

        Positions say where documents begin; a batch without them gets those of whole sequences.
        """
        rows, length = batch["input_ids"].shape
        degree, is_zigzag = self._mesh.size(), self.plan.is_zigzag
        if problems := sequence_length_problems("The length of the sequences", length, degree, is_zigzag=is_zigzag):
            raise ValueError(problems[0])
        self._layout = SequenceLayout(length, degree, is_zigzag)
        shared = {}
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=batch["input_ids"].device).expand(rows, -1)
        else:
            shared["documents"] = document_begins(positions).cumsum(1)
        whole = {**batch, "position_ids": positions}
        return {**{name: self._layout.shard(whole[name], self._rank, 1) for name in _BATCH}, **shared}

    def inputs(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the model is to be called with next, for what `share` returned or some rows of it.

        The mask of ones keeps it from reading documents out of positions, which it has only some of. Outside of
        `sharing` ranks have whole sequences.
        """
        if not self.is_sharing:
            return {"input_ids": input_ids}
        self._attention.documents = documents
        return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": torch.ones_like(input_ids)}

    @property
    def is_sharing(self) -> bool:
        return self._attention.is_sharing

    @property
    def masks_made(self) -> int:
        """How often the model has asked for a mask of shared sequences."""
        return self._attention.masks_made

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Within the block the model runs on what `share` returned."""
        with self._attention.sharing(Ring(self._group, self._layout, self._blocks, self.plan.method)):
            yield

    def describe(self) -> str:
        """How sequences are shared, for the summary of a run."""
        parts = "an early and a late part" if self.plan.is_zigzag else "one part"
        layout = "zigzag" if self.plan.is_zigzag else "contiguous"
        return (
            f"{self.plan.method} attention on {self._mesh.size()} ranks, each with {parts} of every sequence "
            f"({layout}); blocks by {self._why_blocks}"
        )
