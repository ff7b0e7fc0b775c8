"""Context parallelism around a model: sequences shared out among ranks, and everything that must know of it.

Tokens, targets and positions are cut here, once, after the labels were shifted; attention runs over the ranks
(`context_attention.py`); everything else in a decoder works token by token. Whether that holds for an architecture is
tried on its twin over the actual ranks before it is trusted. Where it does not hold, the modules that mix tokens run on
the whole sequence (`context_mixers.py`), which is tried likewise.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.context_parallel.blocks import BlockAttention, ReferenceBlocks
from parallelize.context_parallel.layout import SequenceLayout, sequence_length_problems
from parallelize.context_parallel.ring import Ring
from parallelize.distributed import gather_objects, sum_over
from transformers_backend.context_attention import ContextAttention
from transformers_backend.context_mixers import GatheredMixers, find_mixers
from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.isolation import document_begins
from transformers_backend.loss import count_targets, install_loss, shift_labels
from transformers_backend.proof import MODEL_ERRORS, difference, example_batch, gradients, loss_and_gradients
from transformers_backend.twin import build_twin

logger = logging.getLogger(__name__)

_BATCH = ("input_ids", "targets", "position_ids")


Kind = Literal["ring", "mixers", "layers"]
"""How a model is computed: attention as a ring; or what mixes tokens on the whole sequence, as finely as it can be told
apart, or layer by layer."""


class SharedContext:
    """The sequences of one model on the ranks of a mesh."""

    def __init__(self, hf_model: PreTrainedModel, decoder: Decoder, mesh: DeviceMesh) -> None:
        """Change the model. Raises a ValueError where it would compute something else in every way."""
        kind, no_ring = _choose(hf_model.config, type(hf_model), hf_model.config._attn_implementation, mesh)
        mixers = _mixers(hf_model, decoder, kind)
        self._set_up(hf_model, mesh, decoder, mixers)
        if mixers:
            logger.warning(
                "%s: no ring, because with it the model computes something else (%s). Instead every rank of a context-"
                "parallel group computes these modules for the whole sequence, so that their work and memory are not "
                "divided by context_parallel_degree = %d: %s",
                type(hf_model).__name__, no_ring, mesh.size(), summarize(mixers),
            )  # fmt: skip

    @classmethod
    def as_tried(
        cls, twin: PreTrainedModel, decoder: Decoder, mesh: DeviceMesh, mixers: Sequence[str]
    ) -> SharedContext:
        """A context that nothing was proven of. mixers: modules that run on the whole sequence; none is the ring."""
        context = cls.__new__(cls)
        context._set_up(twin, mesh, decoder, mixers)
        return context

    def _set_up(self, hf_model: PreTrainedModel, mesh: DeviceMesh, decoder: Decoder, mixers: Sequence[str]) -> None:
        self._mesh, self._group, self._rank = mesh, mesh.get_group(), mesh.get_local_rank()
        self._blocks: BlockAttention = ReferenceBlocks()
        self._layout: SequenceLayout | None = None
        self._attention: ContextAttention | None = None
        self._mixers: GatheredMixers | None = None
        if mixers:
            self._mixers = GatheredMixers(hf_model, decoder, mixers, self._group)
        else:
            self._attention = ContextAttention(hf_model, hf_model.config._attn_implementation)
        self.way = f"whole sequence: {summarize(mixers)}" if mixers else "ring"
        """How the model is computed: "ring", or which of its modules get the whole sequence."""

    @property
    def takes_whole_sequences(self) -> bool:
        """Whether the model is called with whole sequences, as without context parallelism, though it yields parts."""
        return self._mixers is not None

    def check_others(self, *, pipeline: bool, tensor: bool) -> None:
        """Raise a ValueError where other ways to split the model do not go together with this one."""
        key = "pipeline_parallel_degree" if pipeline else "tensor_parallel_degree"
        if self.takes_whole_sequences and (pipeline or tensor):
            raise ValueError(
                f"parallelism.{key} > 1 with context_parallel_degree = {self._mesh.size()}: this needs ring attention, "
                f"which is not exact for this model (it runs on the {self.way}). Set either of them to 1."
            )

    def install(self) -> None:
        """What must stand around everything else that wraps layers; call it once, last."""
        if self._mixers is not None:
            self._mixers.install()

    def share(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of `input_ids`, `targets` and `position_ids`, (batch, local); and `documents`, (batch, seq).

        Positions say where documents begin; a batch without them gets those of whole sequences. A model that takes
        whole sequences gets all as it is, but for the targets.
        """
        rows, length = batch["input_ids"].shape
        if problems := sequence_length_problems("The length of the sequences", length, self._mesh.size()):
            raise ValueError(problems[0])
        self._layout = SequenceLayout(length, self._mesh.size())
        if self.takes_whole_sequences:
            return {**batch, "targets": self._layout.shard(batch["targets"], self._rank, 1)}
        shared = {}
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=batch["input_ids"].device).expand(rows, -1)
        else:
            shared["documents"] = document_begins(positions).cumsum(1)
        whole = {**batch, "position_ids": positions}
        return {**{name: self._layout.shard(whole[name], self._rank, 1) for name in _BATCH}, **shared}

    def inputs(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """What the model is called with for this rank's tokens. The mask of ones keeps it from reading documents out of
        positions, which it has only some of."""
        return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": torch.ones_like(input_ids)}

    @contextlib.contextmanager
    def sharing(self, batch: dict[str, torch.Tensor]) -> Iterator[None]:
        """Within the block the model runs on what `share` returned; takes the documents out of it."""
        if self._mixers is not None:
            with self._mixers.sharing(self._layout):
                yield
            return
        ring = Ring(self._group, self._layout, self._blocks)
        with self._attention.sharing(ring, batch.pop("documents", None)):
            yield


def summarize(mixers: Sequence[str]) -> str:
    """Names of modules, those that differ only in the number of their layer as one: "model.layers.*.self_attn (32)"."""
    patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in mixers)
    return ", ".join(f"{pattern} ({count})" for pattern, count in patterns.items())


def _choose(
    hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], attn_implementation: str | None, mesh: DeviceMesh
) -> tuple[Kind, str | None]:
    """The first kind that is exact on the twin, and why the ring is not; a ValueError where none is."""
    reasons = []
    for kind in get_args(Kind):
        reason = _why_not(kind, hf_config, model_class, attn_implementation, mesh)
        if reason is None:
            return kind, reasons[0] if reasons else None
        reasons.append(reason)
    raise ValueError(
        f"{model_class.__name__}: on {mesh.size()} ranks that share its sequences it computes something else (with a "
        f"ring: {reasons[0]}; with the modules that mix tokens on the whole sequence: {reasons[1]}), so it is refused. "
        "Set parallelism.context_parallel_degree = 1."
    )


def _mixers(hf_model: PreTrainedModel, decoder: Decoder, kind: Kind) -> tuple[str, ...]:
    """The modules of a model that run on the whole sequence, found on a twin with as many layers."""
    if kind != "mixers":
        return decoder.layers if kind == "layers" else ()
    own = _own_attention(hf_model.config._attn_implementation)
    twin = build_twin(hf_model.config, type(hf_model), attn_implementation=own, all_layers=True)
    return find_mixers(twin, describe_decoder(twin), example_batch()[0])


def _own_attention(attn_implementation: str | None) -> str | None:
    return attn_implementation if attn_implementation in ("sdpa", "eager") else None


@torch.enable_grad()
def _why_not(
    kind: Kind,
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    attn_implementation: str | None,
    mesh: DeviceMesh,
) -> str | None:
    """Run the twin on the ranks of the mesh, against the same twin on one: how loss and gradients differ, or None."""
    own = _own_attention(attn_implementation)

    def build() -> PreTrainedModel:
        return build_twin(hf_config, model_class, attn_implementation=own)

    input_ids, labels = example_batch(seq=_example_length(mesh.size()))
    try:
        twin = build()
        decoder, mixers = describe_decoder(twin), ()
        if kind != "ring":
            mixers = decoder.layers if kind == "layers" else find_mixers(twin, decoder, input_ids)
        input_ids, labels = input_ids.to(mesh.device_type), labels.to(mesh.device_type)
        expected = loss_and_gradients(build().to(mesh.device_type), input_ids, labels, chunked=False)
        context = SharedContext.as_tried(twin.to(mesh.device_type), decoder, mesh, mixers)
        reason = difference(expected, _shared_loss_and_gradients(twin, context, mesh, input_ids, labels))
    except MODEL_ERRORS as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return next((found for found in gather_objects(reason, mesh.get_group()) if found is not None), None)


def _example_length(degree: int) -> int:
    """Tokens of a sequence that has several windows of the twin and can be shared out: at least 24."""
    return 2 * degree * max(2, -(-24 // (2 * degree)))


def _shared_loss_and_gradients(
    twin: PreTrainedModel, context: SharedContext, mesh: DeviceMesh, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    install_loss(twin, describe_decoder(twin), chunked=False)
    context.install()
    batch = context.share({"input_ids": input_ids, "targets": shift_labels(labels)})
    with context.sharing(batch):
        targets = batch.pop("targets")
        inputs = batch if context.takes_whole_sequences else context.inputs(**batch)
        loss = twin(**inputs, targets=targets) / count_targets(labels)
        loss.backward()
    found = {name: sum_over(gradient, [mesh]) for name, gradient in gradients(twin).items()}
    return sum_over(loss.detach(), [mesh]).item(), found
