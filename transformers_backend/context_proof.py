"""Whether a model that shares its sequences among ranks computes what it should: tried on its twin, over those ranks.

The twin on one rank, with whole sequences, is the reference: the loss and every gradient. `choose_context` comes before
anything is trained; documents in one row, and layers that are compiled, are tried where they are asked for.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.compile import COMPILE_ERRORS, apply_compile, compiled_for_now
from parallelize.config import ActivationCheckpointConfig, ParallelismConfig
from parallelize.context_parallel.ulysses import heads_problem
from parallelize.distributed import first_reason, sum_over
from transformers_backend.context import ContextPlan, Kind, SharedContext, summarize
from transformers_backend.context_calls import choose_blocks_for, refuse_attention_dropout
from transformers_backend.context_mixers import find_mixers
from transformers_backend.decoder import describe_decoder
from transformers_backend.flops import attention_costs
from transformers_backend.isolation import Isolation, find_isolation, packed_inputs
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

logger = logging.getLogger(__name__)


def choose_context(
    hf_model: PreTrainedModel, mesh: DeviceMesh, parallelism: ParallelismConfig, dtype: torch.dtype
) -> SharedContext | None:
    """Share the sequences of a model among the ranks of a mesh, of which one alone means None. Changes the model.

    dtype: that attention computes in. The first kind is taken that is exact; a ValueError where none is.
    """
    if mesh.size() == 1:
        return None
    method, layout = parallelism.context_parallel_method, parallelism.context_parallel_layout
    reasons: list[str] = []
    for kind in get_args(Kind):
        plan = ContextPlan(mesh, method, layout == "zigzag", kind, parallelism.context_parallel_ulysses_degree)
        proof = ContextProof.of(hf_model, plan)
        reason = proof.why_not()
        if reason is None:
            break
        reasons.append(reason)
    else:
        raise ValueError(
            f"{type(hf_model).__name__}: on {mesh.size()} ranks that share its sequences it computes something else "
            f"(with attention over the ranks: {reasons[0]}; with the modules that mix tokens on the whole sequence: "
            f"{reasons[1]}), so it is refused. Set parallelism.context_parallel_degree = 1."
        )
    if kind == "attention":
        _check_heads(hf_model.config, plan, parallelism)
        refuse_attention_dropout(hf_model.config, type(hf_model), mesh.size())
        layer_count = len(describe_decoder(hf_model).layers)
        blocks = choose_blocks_for(hf_model.config, type(hf_model), layer_count, mesh.device_type, dtype)
        return SharedContext(hf_model, plan, blocks=blocks)
    mixers = proof.mixers_of_model()
    logger.warning(
        "%s: no attention over the ranks, because with it the model computes something else (%s). Instead every rank "
        "of a context-parallel group computes these modules for the whole sequence, so that their work and memory are "
        "not divided by context_parallel_degree = %d: %s",
        type(hf_model).__name__, reasons[0], mesh.size(), summarize(mixers),
    )  # fmt: skip
    return SharedContext(hf_model, plan, mixers=mixers)


def isolate_shared(
    hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], context: SharedContext
) -> Isolation:
    """How packed documents stay apart where ranks share them; a ValueError where they do not."""
    isolation, reason = Isolation("shared attention"), None
    if context.takes_whole_sequences:
        isolation = find_isolation(hf_config, model_class, context.own_attention)
        reason = isolation.reason
        if isolation.way == "joined rows":
            reason = f'"{context.own_attention}" joins rows'
    if reason is None:
        reason = ContextProof.again(hf_config, model_class, context).why_documents_mix(isolation)
    if reason is None:
        return isolation
    raise ValueError(
        f"{model_class.__name__} does not keep packed documents apart where ranks share its sequences ({reason}). Set "
        'training.packing = "concat", or parallelism.context_parallel_degree = 1.'
    )


def _check_heads(hf_config: PreTrainedConfig, plan: ContextPlan, parallelism: ParallelismConfig) -> None:
    costs = attention_costs(hf_config, 1)
    if not costs:
        return
    heads, tensor_ranks = costs[0].heads, parallelism.tensor_parallel_degree
    own = heads if heads % tensor_ranks else heads // tensor_ranks
    if problem := heads_problem(own, plan.heads_degree, is_ring=plan.method == "ring"):
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

    def why_documents_mix(self, isolation: Isolation) -> str | None:
        """Why packed documents do not stay apart in this way, or None."""
        length = _example_length(self.plan.mesh.size())
        input_ids, position_ids, labels = (tensor.to(self._device) for tensor in _packed_example(length))
        return _on_all_ranks(
            lambda: difference(
                _one_by_one(self._twin(), input_ids, position_ids, labels),
                self._shared(self._twin(), input_ids, labels, position_ids, isolation),
            )
        )

    def why_not_compile(self, backend: str, activation_checkpoint: ActivationCheckpointConfig) -> str | None:
        """Why layers that are compiled compute something else, or None."""
        input_ids, labels = self._example()

        def compiled() -> PreTrainedModel:
            twin = self._twin()
            layers = [twin.get_submodule(name) for name in describe_decoder(twin).layers]
            recompute(layers, activation_checkpoint)
            apply_compile(layers, backend=backend, memory_budget=activation_checkpoint.compilers_budget)
            return twin

        with compiled_for_now(), warnings.catch_warnings():
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

    def mixers_of_model(self) -> tuple[str, ...]:
        """The modules of the model, rather than of the twin, that run on the whole sequence."""
        return self._mixers(self._twin(all_layers=True))

    def _mixers(self, twin: PreTrainedModel) -> tuple[str, ...]:
        decoder = describe_decoder(twin)
        if self.plan.kind == "mixers":
            return find_mixers(twin, decoder, self._example()[0])
        return decoder.layers if self.plan.kind == "layers" else ()

    def _twin(self, all_layers: bool = False) -> PreTrainedModel:
        own = self.attn_implementation if self.attn_implementation in ("sdpa", "eager") else None
        degree = self.plan.heads_degree  # heads are shared out: the twin needs enough of them
        return build_twin(
            self.hf_config, self.model_class, degree=degree, all_layers=all_layers, attn_implementation=own
        ).to(self._device)

    def _example(self) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, labels = example_batch(seq=_example_length(self.plan.mesh.size()))
        return input_ids.to(self._device), labels.to(self._device)

    def _shared(
        self,
        twin: PreTrainedModel,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        isolation: Isolation | None = None,
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients of a twin that shares the sequences. isolation: of packed documents."""
        decoder = describe_decoder(twin)
        install_loss(twin, decoder, chunked=False)
        context = SharedContext(twin, self.plan, mixers=self._mixers(self._twin()))
        context.install()
        whole = {"input_ids": input_ids, "targets": shift_labels(labels)}
        batch = context.share(whole if position_ids is None else whole | {"position_ids": position_ids})
        if position_ids is not None:
            _refuse_masks_in_layers(twin, context)
        targets = batch.pop("targets")
        with context.sharing():
            if not context.takes_whole_sequences:
                batch = context.inputs(**batch)
            elif isolation is not None:
                accepts = decoder.accepts_position_ids
                batch = packed_inputs(isolation.way, **batch, accepts_position_ids=accepts, dtype=torch.float32)
            loss = twin(**batch, targets=targets) / count_targets(labels)
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
    return first_reason(reason)


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
