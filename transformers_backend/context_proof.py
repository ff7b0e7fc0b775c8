"""Whether a model that shares its sequences among ranks computes what it should: tried on its twin, over those ranks.

The twin on one rank, with whole sequences, is the reference: the loss and every gradient. `choose_context` comes before
anything is trained; documents in one row, and layers that are compiled, are tried where they are asked for.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.compile import COMPILE_ERRORS, apply_compile
from parallelize.config import ActivationCheckpointConfig, ParallelismConfig
from parallelize.context_parallel.ulysses import ulysses_problem
from parallelize.distributed import gather_objects, sum_over
from transformers_backend.context import ContextPlan, SharedContext
from transformers_backend.decoder import describe_decoder
from transformers_backend.flops import attention_costs
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


def choose_context(
    hf_model: PreTrainedModel, mesh: DeviceMesh, parallelism: ParallelismConfig, dtype: torch.dtype
) -> SharedContext | None:
    """Share the sequences of a model among the ranks of a mesh, of which one alone means None. Changes the model.

    dtype: that attention computes in. Raises a ValueError where the model would compute something else.
    """
    if mesh.size() == 1:
        return None
    plan = ContextPlan(
        mesh, parallelism.context_parallel_method, is_zigzag=parallelism.context_parallel_layout == "zigzag"
    )
    _check_heads(hf_model.config, plan, parallelism)
    reason = ContextProof.of(hf_model, plan).why_not()
    if reason is not None:
        raise ValueError(
            f"{type(hf_model).__name__}: on {mesh.size()} ranks that share its sequences it computes something else "
            f"({reason}), so it is refused. Set parallelism.context_parallel_degree = 1."
        )
    return SharedContext(hf_model, plan, dtype)


def _check_heads(hf_config: PreTrainedConfig, plan: ContextPlan, parallelism: ParallelismConfig) -> None:
    costs = attention_costs(hf_config, 1)
    if plan.method != "ulysses" or not costs:
        return
    heads, tensor_ranks = costs[0].heads, parallelism.tensor_parallel_degree
    if problem := ulysses_problem(heads if heads % tensor_ranks else heads // tensor_ranks, plan.mesh.size()):
        raise ValueError(problem)


@dataclass(frozen=True)
class ContextProof:
    """The twin of a model, and how its sequences are shared."""

    hf_config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    attn_implementation: str | None
    plan: ContextPlan

    @classmethod
    def of(cls, hf_model: PreTrainedModel, plan: ContextPlan) -> ContextProof:
        """Of a model that does not share its sequences yet."""
        return cls(hf_model.config, type(hf_model), hf_model.config._attn_implementation, plan)

    @classmethod
    def again(cls, hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], context: SharedContext):
        """Of a model that does. model_class: its own, which FSDP2 changes."""
        return cls(hf_config, model_class, context.own_attention, context.plan)

    def why_not(self) -> str | None:
        """Why it computes something else than on one rank, or None."""
        input_ids, labels = self._example()
        return _on_all_ranks(
            lambda: difference(
                loss_and_gradients(self._twin(), input_ids, labels, chunked=False),
                self._shared(self._twin(), input_ids, labels),
            )
        )

    def why_documents_mix(self) -> str | None:
        """Why packed documents do not stay apart, or None."""
        length = _example_length(self.plan.mesh.size())
        input_ids, position_ids, labels = (tensor.to(self._device) for tensor in _packed_example(length))
        return _on_all_ranks(
            lambda: difference(
                _one_by_one(self._twin(), input_ids, position_ids, labels),
                self._shared(self._twin(), input_ids, labels, position_ids),
            )
        )

    def why_not_compile(self, backend: str, activation_checkpoint: ActivationCheckpointConfig) -> str | None:
        """Why layers that are compiled compute something else, or None."""
        input_ids, labels = self._example()

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
                    self._shared(compiled(), input_ids, labels),
                )
            )

    @property
    def _device(self) -> str:
        return self.plan.mesh.device_type

    def _twin(self) -> PreTrainedModel:
        own = self.attn_implementation if self.attn_implementation in ("sdpa", "eager") else None
        # Ulysses shares out heads: the twin needs enough of them.
        degree = self.plan.mesh.size() if self.plan.method == "ulysses" else 1
        return build_twin(self.hf_config, self.model_class, degree=degree, attn_implementation=own).to(self._device)

    def _example(self) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, labels = example_batch(seq=_example_length(self.plan.mesh.size()))
        return input_ids.to(self._device), labels.to(self._device)

    def _shared(
        self,
        twin: PreTrainedModel,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients of a twin that shares the sequences."""
        install_loss(twin, describe_decoder(twin), chunked=False)
        context = SharedContext(twin, self.plan)
        whole = {"input_ids": input_ids, "targets": shift_labels(labels)}
        batch = context.share(whole if position_ids is None else whole | {"position_ids": position_ids})
        if position_ids is not None:
            _refuse_masks_in_layers(twin, context)
        targets = batch.pop("targets")
        with context.sharing():
            loss = twin(**context.inputs(**batch), targets=targets) / count_targets(labels)
            loss.backward()
        found = {name: sum_over(gradient, [self.plan.mesh]) for name, gradient in gradients(twin).items()}
        return sum_over(loss.detach(), [self.plan.mesh]).item(), found


def _on_all_ranks(find: Callable[[], str | None]) -> str | None:
    """What `find` returns, or the error of the model that ended it: the first on any rank of the job."""
    try:
        with torch.enable_grad():
            reason = find()
    except (*MODEL_ERRORS, *COMPILE_ERRORS) as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return next((found for found in gather_objects(reason) if found is not None), None)


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


def _refuse_masks_in_layers(twin: PreTrainedModel, context: SharedContext) -> None:
    """Let a layer fail that asks for a mask itself.

    A mask says which documents it is for: those of the rows that the model was called with last. In a pipeline a layer
    may be recomputed when these are other ones already.
    """
    before: list[int] = []

    def check(layer: torch.nn.Module, args: tuple, output: object) -> None:
        if context.masks_made > before.pop():
            raise ValueError(f"{type(layer).__name__} makes its attention mask itself")

    for name in describe_decoder(twin).layers:
        layer = twin.get_submodule(name)
        layer.register_forward_pre_hook(lambda *_: before.append(context.masks_made))
        layer.register_forward_hook(check)
