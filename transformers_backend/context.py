"""Context parallelism around a model: sequences shared out among ranks, and everything that must know of it.

Tokens, targets and positions are cut here, once, after the labels were shifted; attention runs over the ranks
(`context_attention.py`); everything else in a decoder works token by token. Whether that holds for an architecture is
tried on its twin over the actual ranks before it is trusted (`context_proof.py`). Where it does not hold, the modules
that mix tokens run on the whole sequence (`context_mixers.py`), which is tried likewise.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from parallelize.context_parallel.blocks import BlockAttention
from parallelize.context_parallel.kernels import choose_blocks
from parallelize.context_parallel.layout import SequenceLayout, sequence_length_problems
from parallelize.context_parallel.levels import levels_of
from parallelize.context_parallel.ring import Ring
from transformers_backend.batch_checks import check_positions, check_vocabulary
from transformers_backend.context_attention import ContextAttention
from transformers_backend.context_mixers import GatheredMixers
from transformers_backend.context_rotary import WholeLengths
from transformers_backend.decoder import describe_decoder, learned_positions, rotaries_by_length
from transformers_backend.isolation import document_begins
from transformers_backend.loss import IGNORE_INDEX

_BATCH = ("input_ids", "targets", "position_ids")


Kind = Literal["attention", "mixers", "layers"]
"""How a model is computed: attention over the ranks; or what mixes tokens on the whole sequence, as finely as it can be
told apart, or layer by layer."""


@dataclass(frozen=True)
class ContextPlan:
    """How the sequences of a model are shared."""

    mesh: DeviceMesh
    """Of the ranks that share each of them."""
    method: str = "ring"
    """As `ParallelismConfig.context_parallel_method`."""
    is_zigzag: bool = True
    """How they lie on the ranks: see `layout.py`."""
    kind: Kind = "attention"
    ulysses_degree: int = 1
    """As `ParallelismConfig.context_parallel_ulysses_degree`."""

    @property
    def heads_degree(self) -> int:
        """How many ranks exchange tokens for heads; the ring is over the rest, which "ulysses" has none of."""
        return self.mesh.size() if self.method == "ulysses" else self.ulysses_degree

    @property
    def way(self) -> str:
        """The method in a few words."""
        if self.ulysses_degree == 1:
            return self.method
        return f"ring {self.mesh.size() // self.ulysses_degree} x ulysses {self.ulysses_degree}"


class SharedContext:
    """The sequences of one model on the ranks of a mesh."""

    def __init__(
        self,
        hf_model: PreTrainedModel,
        plan: ContextPlan,
        *,
        mixers: Sequence[str] = (),
        blocks: tuple[BlockAttention, str] | None = None,
    ) -> None:
        """Change the model, before anything else does.

        blocks: what computes attention's, and a sentence that says why; None chooses for fp32.
        mixers: modules that run on the whole sequence, where attention does not run over the ranks.
        """
        assert bool(mixers) == (plan.kind != "attention")
        self.plan = plan
        self.own_attention = hf_model.config._attn_implementation
        """What the model attends with where it has whole sequences: the name of a function of Transformers."""
        self._mesh, self._group, self._rank = plan.mesh, plan.mesh.get_group(), plan.mesh.get_local_rank()
        self._blocks, self._why_blocks = blocks or choose_blocks(self._mesh.device_type, torch.float32)
        decoder = describe_decoder(hf_model)
        self._learned_positions = learned_positions(hf_model, decoder)
        self._vocabulary_size = hf_model.get_submodule(decoder.embedding).weight.shape[0]
        self._layout: SequenceLayout | None = None
        self._attention: ContextAttention | None = None
        self._lengths: WholeLengths | None = None
        self._mixers: GatheredMixers | None = None
        self.way = f"whole sequence: {summarize(mixers)}" if mixers else plan.way
        """How a query reaches the keys of other ranks: the method, or which modules get the whole sequence."""
        if mixers:
            self._mixers = GatheredMixers(hf_model, decoder, mixers, self._group)
        else:
            self._attention = ContextAttention(hf_model, self.own_attention)
            self._lengths = WholeLengths(rotaries_by_length(hf_model))
            self._levels = levels_of(plan.mesh, plan.heads_degree)

    @property
    def takes_whole_sequences(self) -> bool:
        """Whether the model is called with whole sequences, as without context parallelism, though it yields parts."""
        return self._mixers is not None

    def check_others(self, *, pipeline: bool, tensor: bool) -> None:
        """Raise a ValueError where other ways to split the model do not go together with this one."""
        key = "pipeline_parallel_degree" if pipeline else "tensor_parallel_degree"
        if self.takes_whole_sequences and (pipeline or tensor):
            raise ValueError(
                f"parallelism.{key} > 1 with context_parallel_degree = {self._mesh.size()}: this needs attention over "
                f"the ranks, which is not exact for this model (it runs on the {self.way}). Set either of them to 1."
            )

    def install(self) -> None:
        """What must stand around everything else that wraps layers; call it once, last."""
        if self._mixers is not None:
            self._mixers.install()

    def share(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of `input_ids`, `targets` and `position_ids`, (batch, local); `documents`, (batch, seq); and
        the `latest` position of each whole sequence, (batch,).

        Positions say where documents begin; a batch without them gets those of whole sequences. `documents` are on the
        CPU (int32), where attention reads them for every block: give the positions as they came, before they go to a
        device, which they do here. A model that takes whole sequences gets all as it is, but for the targets.
        """
        rows, length = batch["input_ids"].shape
        degree, is_zigzag = self._mesh.size(), self.plan.is_zigzag
        if problems := sequence_length_problems("The length of the sequences", length, degree, is_zigzag=is_zigzag):
            raise ValueError(f"{problems[0]} Pad it at the end, with labels {IGNORE_INDEX}, or cut it.")
        check_vocabulary(batch["input_ids"], batch["targets"], self._vocabulary_size)
        if self._learned_positions is not None and "position_ids" in batch:
            check_positions(batch["position_ids"], self._learned_positions)
        self._layout = SequenceLayout(length, degree, is_zigzag)
        if self.takes_whole_sequences:
            whole = {name: tensor.to(batch["input_ids"].device, non_blocking=True) for name, tensor in batch.items()}
            return {**whole, "targets": self._layout.shard(batch["targets"], self._rank, 1)}
        shared: dict[str, torch.Tensor] = {}
        device, positions = batch["input_ids"].device, batch.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=device).expand(rows, -1)
        else:
            shared["documents"] = document_begins(positions.cpu()).cumsum(1, dtype=torch.int32)
        whole = {**batch, "position_ids": positions.to(device, non_blocking=True)}
        shared["latest"] = whole["position_ids"].amax(1)
        return {**{name: self._layout.shard(whole[name], self._rank, 1) for name in _BATCH}, **shared}

    def inputs(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        latest: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the model is to be called with next, for what `share` returned or some rows of it.

        The mask of ones keeps it from reading documents out of positions, which it has only some of. Outside of
        `sharing` ranks have whole sequences.
        """
        if not self.is_sharing:
            return {"input_ids": input_ids}
        self._attention.documents = documents
        self._lengths.latest = None if latest is None else latest.max()
        return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": torch.ones_like(input_ids)}

    @property
    def is_sharing(self) -> bool:
        return self._attention is not None and self._attention.is_sharing

    @property
    def masks_made(self) -> int:
        """How often the model has asked for a mask of shared sequences."""
        return 0 if self._attention is None else self._attention.masks_made

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Within the block the model runs on what `share` returned."""
        if self._mixers is not None:
            with self._mixers.sharing(self._layout):
                yield
            return
        try:
            with self._attention.sharing(self._ring()):
                yield
        finally:
            self._lengths.latest = None

    def _ring(self) -> Ring:
        if self.plan.method == "allgather":
            return Ring(self._group, self._layout, self._blocks, "allgather")
        return self._levels.over(self._layout, self._blocks)

    def describe(self) -> str:
        """How sequences are shared, for the summary of a run."""
        parts = "an early and a late part" if self.plan.is_zigzag else "one part"
        layout = "zigzag" if self.plan.is_zigzag else "contiguous"
        if self.takes_whole_sequences:
            return (
                f"{self._mesh.size()} ranks, each with {parts} of every sequence ({layout}), but for modules that "
                f"every rank computes for all of it: {summarize(self._mixers.names)}"
            )
        return (
            f"{self.way} attention on {self._mesh.size()} ranks, each with {parts} of every sequence "
            f"({layout}); blocks by {self._why_blocks}"
        )


def summarize(mixers: Sequence[str]) -> str:
    """Names of modules, those that differ only in the number of their layer as one: "model.layers.*.self_attn (32)"."""
    patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in mixers)
    return ", ".join(f"{pattern} ({count})" for pattern, count in patterns.items())
