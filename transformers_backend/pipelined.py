"""A model in a pipeline, on one rank: its stages, the schedule that runs them, and what it shares with other ranks.

`HFTransformerModel` has one of these where `pipeline_parallel_degree` is above 1. In the order of a run: the model is
cut (constructor), parallelised like any other, made ready (`start`), and then runs batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from parallelize.config import ParallelismConfig
from parallelize.fsdp import add_up_precisely, reduced_once, reshard
from parallelize.pipeline_parallel.runtime import Pipeline
from parallelize.pipeline_parallel.schedules import batch_problems, build_schedule
from parallelize.pipeline_parallel.shared import summed_gradients
from parallelize.tensor_parallel import Stack
from transformers_backend.decoder import Decoder
from transformers_backend.evaluation import evaluation_mode
from transformers_backend.pipeline_plan import PipelinePlan, refuse_gradient_checkpointing
from transformers_backend.stages import LocalStages
from transformers_backend.weights import named_tensors

Batch = dict[str, torch.Tensor]
"""`input_ids`, `targets` and possibly `position_ids` on the rank's device, all (batch, seq)."""


class PipelinedModel:
    """This rank's part of a model that is cut into the stages of a pipeline."""

    def __init__(
        self,
        hf_model: PreTrainedModel,
        decoder: Decoder,
        plan: PipelinePlan,
        mesh: DeviceMesh,
        parallelism: ParallelismConfig,
    ) -> None:
        """Cut `hf_model`, in place, down to the stages of this rank. mesh: that of the whole job."""
        self.plan = plan
        self.rank, self.group = mesh.get_local_rank("pp"), mesh.get_group("pp")
        self._model, self._parallelism = hf_model, parallelism
        self._places = {name: place for place, name in enumerate(named_tensors(hf_model))}
        self._stages = LocalStages(hf_model, decoder, plan.split, plan.stages_of_rank(self.rank))
        self._stages.drop_the_rest()
        self._shared = {name: ranks for name, _ in hf_model.named_parameters() if len(ranks := plan.ranks_of(name)) > 1}
        self._sound_rows: int | None = None  # number of sequences of the latest batch
        # Of hidden states: dtype and device, dimensions before (batch, seq, hidden) (few have some), and width.
        self._hidden: tuple[torch.Tensor, torch.Size, int] | None = None

    @property
    def layers(self) -> list[str]:
        """Names of the layers on this rank, in order."""
        return self._stages.layers

    @property
    def stacks(self) -> list[Stack]:
        return self._stages.stacks

    @property
    def has_last_stage(self) -> bool:
        return self._stages.has_last

    @property
    def microbatch_size(self) -> int:
        """Sequences of one micro-batch."""
        return self._parallelism.pipeline_parallel_microbatch_size

    def start(
        self,
        make_inputs: Callable[..., dict],
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        sequence_parallel_degree: int,
    ) -> None:
        """Make the parallelised, filled model ready to run.

        make_inputs: from `input_ids` and possibly `position_ids` of a micro-batch to what the model is called with.
        compute_dtype: of the hidden states. sequence_parallel_degree: number of ranks that share the sequence of
        hidden states between stages.
        """
        self._make_inputs, self._sequence_parallel_degree = make_inputs, sequence_parallel_degree
        self._stages.place_stand_ins(device, compute_dtype)
        self._stages.install()
        # What is trained, whatever stands in the modules as they compute: FSDP2 puts gathered parameters there, and
        # mixed precision casts.
        self._parameters = dict(self._model.named_parameters())
        self._pipeline = Pipeline(
            self._run_stage,
            group=self.group,
            device=device,
            rank_of_stage=self.plan.rank_of_stage,
            make_schedule=self._make_schedule,
            parameters=self._trained,
            after_weights=lambda: add_up_precisely(self._model),
        )

    def _trained(self) -> list[torch.Tensor]:
        """The trained parameters in which a backward ends: with FSDP2 those that are gathered now."""
        gathered = isinstance(self._model, FSDPModule)
        parameters = self._model.parameters() if gathered else self._parameters.values()
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _make_schedule(self, stages, micro_batches: int, loss_function: Callable):
        parallelism = self._parallelism
        return build_schedule(
            parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_schedule_csv,
            stages, micro_batches, loss_function,
        )  # fmt: skip

    def _run_stage(
        self, stage: int, hidden_states: torch.Tensor | None, *, targets: torch.Tensor | None = None, **micro_batch
    ) -> torch.Tensor:
        inputs = self._make_inputs(**micro_batch)
        if targets is not None:
            inputs["targets"] = targets.view_as(inputs["input_ids"])
        return self._model(stage=stage, hidden_states=hidden_states, **inputs)

    # -- running --------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, targets: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a batch and return its loss divided by `targets`; 0 on ranks without the last stage."""
        rows, size = batch["input_ids"].shape[0], self._parallelism.pipeline_parallel_microbatch_size
        if rows != self._sound_rows:  # for some schedules this reads a file
            self._check_rows(rows)
        refuse_gradient_checkpointing(self._model)
        like = self._hidden_states_like(batch, size)
        shared = {
            parameter: ranks
            for name, ranks in self._shared.items()
            if (parameter := self._parameters[name]).requires_grad
        }
        with summed_gradients(shared, self.group), reduced_once(self._model):
            return self._pipeline.forward_backward(batch, rows // size, like, targets)

    def _check_rows(self, rows: int) -> None:
        """A ValueError, before anything is sent, where a batch of so many sequences cannot go through the pipeline."""
        problems = batch_problems(
            {"The number of sequences of a batch": rows},
            microbatch_size=self._parallelism.pipeline_parallel_microbatch_size,
            schedule=self._parallelism.pipeline_parallel_schedule,
            pp=self._parallelism.pipeline_parallel_degree,
            csv=self._parallelism.pipeline_parallel_schedule_csv,
        )
        if problems:
            raise ValueError(problems[0])
        self._sound_rows = rows

    def sum_loss(self, batch: Batch) -> torch.Tensor:
        """The summed loss of a batch of any number of rows, forward only; 0 on ranks without the last stage."""
        rows = batch["input_ids"].shape[0]
        micro_batches = rows // math.gcd(rows, self._parallelism.pipeline_parallel_microbatch_size)
        losses = self._pipeline.forward(batch, micro_batches, self._hidden_states_like(batch, rows // micro_batches))
        return sum(losses, torch.zeros((), device=batch["input_ids"].device))

    def next_token_logits(self, input_ids: torch.Tensor, position: int) -> torch.Tensor:
        """Logits of the token after a position of one row (1, seq): fp32 (vocabulary,) on every rank's CPU."""
        outputs = self._pipeline.forward(
            {"input_ids": input_ids}, 1, self._hidden_states_like({"input_ids": input_ids}, 1)
        )
        found = [logits[0, position].float().cpu() for logits in outputs] or [None]
        dist.broadcast_object_list(found, group=self.group, group_src=self.plan.rank_of_stage[-1])
        return found[0]

    def _hidden_states_like(self, batch: Batch, rows: int) -> torch.Tensor:
        """Hidden states of the first `rows` rows as they travel between stages, for their shape and dtype; no memory.

        The model is run for the first batch alone, which is everyone's first. Later ones may have another shape on some
        data ranks only, and what FSDP2 gathers for a run all of these have to gather.
        """
        micro_batch = {name: tensor[:rows] for name, tensor in batch.items() if name != "targets"}
        inputs = self._make_inputs(**micro_batch)  # which may join rows
        tokens = inputs["input_ids"].shape
        if self._hidden is None:
            with evaluation_mode(self._model):
                like = self._stages.hidden_states_like(**inputs)
            reshard(self._model)
            assert like.shape[-3:-1] == tokens, "which the twin has been looked at for"
            self._hidden = (like.new_empty(()), like.shape[:-3], like.shape[-1])
        like, streams, width = self._hidden
        rows, seq = tokens
        return like.expand(*streams, rows, -(-seq // self._sequence_parallel_degree), width)

    # -- what other ranks have ------------------------------------------------------------------------------------

    def counted_elsewhere(self) -> list[torch.nn.Parameter]:
        """Parameters of this rank of which an earlier rank of the pipeline has a copy."""
        return [self._parameters[name] for name, ranks in self._shared.items() if ranks[0] != self.rank]

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Names of parameters and buffers of any rank as the whole model lists them."""
        return sorted(names, key=self._places.__getitem__)
