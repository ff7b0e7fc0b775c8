"""Context parallelism around a model: sequences shared out among ranks, and everything that must know of it.

Tokens, targets and positions are cut here, once, after the labels were shifted; attention runs over the ranks
(`context_attention.py`); everything else in a decoder works token by token. Whether that holds for an architecture is
tried on its twin over the actual ranks before it is trusted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.context_parallel.kernels import choose_blocks
from parallelize.context_parallel.layout import SequenceLayout, sequence_length_problems
from parallelize.context_parallel.ring import Ring
from parallelize.distributed import gather_objects, sum_over
from transformers_backend.context_attention import ContextAttention
from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.isolation import document_begins
from transformers_backend.loss import count_targets, install_loss, shift_labels
from transformers_backend.proof import MODEL_ERRORS, difference, example_batch, gradients, loss_and_gradients
from transformers_backend.twin import build_twin

logger = logging.getLogger(__name__)

_BATCH = ("input_ids", "targets", "position_ids")


class SharedContext:
    """The sequences of one model on the ranks of a mesh."""

    def __init__(
        self,
        hf_model: PreTrainedModel,
        decoder: Decoder,
        mesh: DeviceMesh,
        *,
        method: str = "ring",
        is_zigzag: bool = True,
        dtype: torch.dtype = torch.float32,
        is_proven: bool = False,
    ) -> None:
        """Change the model's attention. Raises a ValueError where the model would compute something else.

        method: one of `methods.METHODS`. is_zigzag: how sequences lie on the ranks. dtype: that attention computes in.
        """
        own = hf_model.config._attn_implementation
        if not is_proven:
            _prove(hf_model.config, type(hf_model), own, mesh, method=method, is_zigzag=is_zigzag)
        self._attention = ContextAttention(hf_model, own)
        self._mesh, self._group, self._rank = mesh, mesh.get_group(), mesh.get_local_rank()
        self._accepts_position_ids = decoder.accepts_position_ids
        self._method, self._is_zigzag = method, is_zigzag
        self._blocks, reason = choose_blocks(mesh.device_type, dtype)
        if not is_proven:
            layout = "zigzag" if is_zigzag else "contiguous"
            logger.info("Attention over %s ranks (%s, %s): blocks by %s", mesh.size(), method, layout, reason)
        self._layout: SequenceLayout | None = None

    @property
    def way(self) -> str:
        """How a query reaches the keys of other ranks: the method, or the modules that run on the gathered sequence."""
        return self._method

    def share(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of `input_ids`, `targets` and `position_ids`, (batch, local); and `documents`, (batch, seq).

        Positions say where documents begin; a batch without them gets those of whole sequences.
        """
        rows, length = batch["input_ids"].shape
        degree, is_zigzag = self._mesh.size(), self._is_zigzag
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

    def inputs(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What the model is called with for this rank's tokens. The mask of ones keeps it from reading documents out of
        positions, which it has only some of."""
        return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": torch.ones_like(input_ids)}

    @contextlib.contextmanager
    def sharing(self, batch: dict[str, torch.Tensor]) -> Iterator[None]:
        """Within the block the model runs on what `share` returned; takes the documents out of it."""
        ring = Ring(self._group, self._layout, self._blocks, self._method)
        with self._attention.sharing(ring, batch.pop("documents", None)):
            yield


@torch.enable_grad()
def _prove(
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    attn_implementation: str,
    mesh: DeviceMesh,
    *,
    method: str,
    is_zigzag: bool,
) -> None:
    """Run the twin on the ranks of the mesh, against the same twin on one: the loss and every gradient."""
    own = attn_implementation if attn_implementation in ("sdpa", "eager") else None

    def build() -> PreTrainedModel:
        # Ulysses shares out heads: the twin needs enough of them. Whether the model has is asked when it runs.
        degree = mesh.size() if method == "ulysses" else 1
        return build_twin(hf_config, model_class, degree=degree, attn_implementation=own).to(mesh.device_type)

    input_ids, labels = (tensor.to(mesh.device_type) for tensor in example_batch(seq=_example_length(mesh.size())))
    try:
        expected = loss_and_gradients(build(), input_ids, labels, chunked=False)
        reason = difference(expected, _shared_loss_and_gradients(build(), mesh, input_ids, labels, method, is_zigzag))
    except MODEL_ERRORS as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    reason = next((found for found in gather_objects(reason, mesh.get_group()) if found is not None), None)
    if reason is not None:
        raise ValueError(
            f"{model_class.__name__}: on {mesh.size()} ranks that share its sequences it computes something else "
            f"({reason}), so it is refused. Set parallelism.context_parallel_degree = 1."
        )


def _example_length(degree: int) -> int:
    """Tokens of a sequence that has several windows of the twin and can be shared out: at least 24."""
    return 2 * degree * max(2, -(-24 // (2 * degree)))


def _shared_loss_and_gradients(
    twin: PreTrainedModel,
    mesh: DeviceMesh,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    method: str,
    is_zigzag: bool,
) -> tuple[float, dict[str, torch.Tensor]]:
    decoder = describe_decoder(twin)
    install_loss(twin, decoder, chunked=False)
    context = SharedContext(twin, decoder, mesh, method=method, is_zigzag=is_zigzag, is_proven=True)
    batch = context.share({"input_ids": input_ids, "targets": shift_labels(labels)})
    with context.sharing(batch):
        inputs = context.inputs(batch["input_ids"], batch["position_ids"])
        loss = twin(**inputs, targets=batch["targets"]) / count_targets(labels)
        loss.backward()
    found = {name: sum_over(gradient, [mesh]) for name, gradient in gradients(twin).items()}
    return sum_over(loss.detach(), [mesh]).item(), found
