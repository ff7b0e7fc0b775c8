"""Context parallelism around a model: sequences shared out among ranks, and everything that must know of it.

Tokens, targets and positions are cut here, once, after the labels were shifted; attention runs over the ranks
(`context_attention.py`); everything else in a decoder works token by token. Whether that holds for an architecture is
tried on its twin over the actual ranks before it is trusted.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.compile import COMPILE_ERRORS, apply_compile
from parallelize.config import ActivationCheckpointConfig
from parallelize.context_parallel.blocks import BlockAttention, ReferenceBlocks
from parallelize.context_parallel.layout import SequenceLayout, sequence_length_problems
from parallelize.context_parallel.ring import Ring
from parallelize.distributed import gather_objects, sum_over
from transformers_backend.context_attention import ContextAttention
from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.isolation import document_begins
from transformers_backend.loss import IGNORE_INDEX, count_targets, install_loss, shift_labels
from transformers_backend.proof import (
    MODEL_ERRORS,
    difference,
    example_batch,
    gradients,
    loss_and_gradients,
    recompute,
)
from transformers_backend.twin import build_twin

_BATCH = ("input_ids", "targets", "position_ids")


class SharedContext:
    """The sequences of one model on the ranks of a mesh."""

    def __init__(
        self, hf_model: PreTrainedModel, decoder: Decoder, mesh: DeviceMesh, *, is_proven: bool = False
    ) -> None:
        """Change the model's attention. Raises a ValueError where the model would compute something else."""
        own = hf_model.config._attn_implementation
        self._twin = functools.partial(_build, hf_model.config, type(hf_model), own, mesh)
        if not is_proven:
            _prove(self._twin, mesh)
        self.own_attention = own
        """What the model attends with where it has whole sequences: the name of a function of Transformers."""
        self._attention = ContextAttention(hf_model, own)
        self._mesh, self._group, self._rank = mesh, mesh.get_group(), mesh.get_local_rank()
        self._accepts_position_ids = decoder.accepts_position_ids
        self._blocks: BlockAttention = ReferenceBlocks()
        self._layout: SequenceLayout | None = None

    def share(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of `input_ids`, `targets` and `position_ids`, (batch, local); and `documents`, (batch, seq).

        Positions say where documents begin; a batch without them gets those of whole sequences.
        """
        rows, length = batch["input_ids"].shape
        if problems := sequence_length_problems("The length of the sequences", length, self._mesh.size()):
            raise ValueError(problems[0])
        self._layout = SequenceLayout(length, self._mesh.size())
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

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Within the block the model runs on what `share` returned."""
        with self._attention.sharing(Ring(self._group, self._layout, self._blocks)):
            yield

    def describe(self) -> str:
        """How sequences are shared, for the summary of a run."""
        return (
            f"ring attention on {self._mesh.size()} ranks, each with an early and a late part of every sequence "
            f"(zigzag); blocks by {self._blocks.name}"
        )

    def why_documents_mix(self) -> str | None:
        """Why packed documents do not stay apart on the ranks of the mesh, or None: tried on the twin."""
        input_ids, position_ids, labels = (
            tensor.to(self._mesh.device_type) for tensor in _packed_example(_example_length(self._mesh.size()))
        )
        return _on_all_ranks(
            lambda: difference(
                _one_by_one(self._twin(), input_ids, position_ids, labels),
                _shared_loss_and_gradients(self._twin(), self._mesh, input_ids, labels, position_ids),
            )
        )

    def why_not_compile(self, backend: str, activation_checkpoint: ActivationCheckpointConfig) -> str | None:
        """Why layers that are compiled do not compute over the ranks what they should, or None: tried on the twin."""
        input_ids, labels = _example(self._mesh)

        def compiled() -> PreTrainedModel:
            twin = self._twin()
            layers = [twin.get_submodule(name) for name in describe_decoder(twin).layers]
            recompute(layers, activation_checkpoint)
            apply_compile(layers, backend=backend)
            return twin

        with warnings.catch_warnings():
            # The compiler itself reads that attribute; where warnings are errors it would take this for a failure.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            return _on_all_ranks(
                lambda: difference(
                    loss_and_gradients(self._twin(), input_ids, labels, chunked=False),
                    _shared_loss_and_gradients(compiled(), self._mesh, input_ids, labels),
                )
            )


def _build(
    hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], attn_implementation: str, mesh: DeviceMesh
) -> PreTrainedModel:
    own = attn_implementation if attn_implementation in ("sdpa", "eager") else None
    return build_twin(hf_config, model_class, attn_implementation=own).to(mesh.device_type)


def _prove(twin: Callable[[], PreTrainedModel], mesh: DeviceMesh) -> None:
    """Run the twin on the ranks of the mesh, against the same twin on one: the loss and every gradient."""
    input_ids, labels = _example(mesh)
    reason = _on_all_ranks(
        lambda: difference(
            loss_and_gradients(twin(), input_ids, labels, chunked=False),
            _shared_loss_and_gradients(twin(), mesh, input_ids, labels),
        )
    )
    if reason is not None:
        raise ValueError(
            f"{twin.args[1].__name__}: on {mesh.size()} ranks that share its sequences it computes something else "
            f"({reason}), so it is refused. Set parallelism.context_parallel_degree = 1."
        )


def _on_all_ranks(find: Callable[[], str | None]) -> str | None:
    """What `find` returns, or the error of the model that ended it: the first on any rank of the job."""
    try:
        with torch.enable_grad():
            reason = find()
    except (*MODEL_ERRORS, *COMPILE_ERRORS) as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return next((found for found in gather_objects(reason) if found is not None), None)


def _example(mesh: DeviceMesh) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids, labels = example_batch(seq=_example_length(mesh.size()))
    return input_ids.to(mesh.device_type), labels.to(mesh.device_type)


def _example_length(degree: int) -> int:
    """Tokens of a sequence that has several windows of the twin and can be shared out: at least 24."""
    return 2 * degree * max(2, -(-24 // (2 * degree)))


def _packed_example(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and labels (2, length): a document of one token, and one longer than the twin's windows."""
    input_ids, _ = example_batch(seq=length)
    rows = ((7, 1, length - 8), (11, length - 11))
    position_ids = torch.stack([torch.cat([torch.arange(part) for part in row]) for row in rows])
    return input_ids, position_ids, input_ids.masked_fill(position_ids == 0, IGNORE_INDEX)


def _one_by_one(
    twin: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and every gradient of packed documents that are computed each alone."""
    install_loss(twin, describe_decoder(twin), chunked=False)
    targets, total = shift_labels(labels), 0.0
    for row in range(len(input_ids)):
        begins = (position_ids[row] == 0).nonzero().flatten().tolist()
        for start, end in itertools.pairwise([*begins, input_ids.shape[1]]):
            part = slice(row, row + 1), slice(start, end)
            loss = twin(input_ids=input_ids[part], targets=targets[part].clone()) / count_targets(labels)
            loss.backward()
            total += loss.item()
    return total, gradients(twin)


def _shared_loss_and_gradients(
    twin: PreTrainedModel,
    mesh: DeviceMesh,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    decoder = describe_decoder(twin)
    install_loss(twin, decoder, chunked=False)
    context = SharedContext(twin, decoder, mesh, is_proven=True)
    whole = {"input_ids": input_ids, "targets": shift_labels(labels)}
    batch = context.share(whole if position_ids is None else whole | {"position_ids": position_ids})
    targets = batch.pop("targets")
    with context.sharing():
        loss = twin(**context.inputs(**batch), targets=targets) / count_targets(labels)
        loss.backward()
    found = {name: sum_over(gradient, [mesh]) for name, gradient in gradients(twin).items()}
    return sum_over(loss.detach(), [mesh]).item(), found
