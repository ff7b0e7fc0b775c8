"""Running a batch through the stages of a pipeline: this rank's part of a schedule of torch.distributed.pipelining.

Between the model, which can run any of its stages on one micro-batch, and torch, which says what runs when and moves
hidden states and their gradients between ranks. Every rank has the micro-batches' tokens; only hidden states travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

Inputs = Mapping[str, torch.Tensor]
"""What every stage gets of a (micro-)batch, by name: tensors of (batch, ...)."""
RunStage = Callable[..., torch.Tensor]
"""run_stage(stage, hidden_states, **inputs) of a micro-batch: hidden states, or from the last stage its loss."""
MakeSchedule = Callable[[list[PipelineStage], int, Callable], object]
"""make_schedule(stages, micro_batches, loss_fn): a schedule of torch for this rank's stages."""


class Pipeline:
    """This rank's stages, and the schedule by which they run."""

    def __init__(
        self,
        run_stage: RunStage,
        *,
        group: dist.ProcessGroup,
        device: torch.device,
        rank_of_stage: Sequence[int],
        make_schedule: MakeSchedule,
        parameters: Callable[[], Iterable[nn.Parameter]],
    ) -> None:
        """group: the ranks of the pipeline. rank_of_stage: for every stage, the rank (of `group`) that runs it.

        parameters: gives the trainable parameters of this rank as they are at the time, for schedules that compute
        their gradients separately.
        """
        self._run_stage, self._group, self._device = run_stage, group, device
        self._rank_of_stage, self._make_schedule, self._parameters = list(rank_of_stage), make_schedule, parameters
        rank = dist.get_rank(group)
        self.local = [stage for stage, owner in enumerate(self._rank_of_stage) if owner == rank]
        self._schedule, self._made_for = None, None

    @property
    def has_last_stage(self) -> bool:
        return self._last in self.local

    @property
    def _last(self) -> int:
        return len(self._rank_of_stage) - 1

    def forward_backward(
        self, inputs: Inputs, micro_batches: int, like: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Add the gradients of a batch, and return its loss: fp32 scalar, 0 on ranks without the last stage.

        inputs: of the whole batch, whose rows `micro_batches` divides. like: hidden states of one micro-batch as they
        travel between stages, for their shape and dtype. targets: what the summed loss is divided by.
        """
        schedule = self._schedule_for(micro_batches, like)
        self._targets = targets
        losses: list[torch.Tensor] = []
        schedule.step(**inputs, target=next(iter(inputs.values())), losses=losses, return_outputs=False)
        total = torch.zeros((), device=self._device)
        for loss in losses:
            total += loss.detach()
        return total

    def _schedule_for(self, micro_batches: int, like: torch.Tensor):
        """torch's schedules receive into buffers of one shape, so another shape needs another schedule."""
        wanted = (micro_batches, like.shape, like.dtype)
        if self._made_for != wanted:
            stages = [self._stage(stage, like) for stage in self.local]
            self._schedule = self._make_schedule(stages, micro_batches, lambda loss, _: loss / self._targets)
            self._made_for = wanted
        return self._schedule

    def _stage(self, stage: int, like: torch.Tensor) -> PipelineStage:
        travelling = torch.empty_like(like).requires_grad_()
        return PipelineStage(
            _StageModule(self._run_stage, stage, self._parameters),
            stage,
            len(self._rank_of_stage),
            self._device,
            input_args=travelling if stage > 0 else (),
            output_args=travelling if stage < self._last else torch.empty((), device=self._device),
            group=self._group,
        )

    @torch.no_grad()
    def forward(self, inputs: Inputs, micro_batches: int, like: torch.Tensor) -> list[torch.Tensor]:
        """What the last stage yields for each micro-batch, in order; nothing on ranks without it."""
        pieces = [
            dict(zip(inputs, rows, strict=True))
            for rows in zip(*(t.chunk(micro_batches) for t in inputs.values()), strict=True)
        ]
        kept: dict[int, list[torch.Tensor]] = {}  # outputs for a next stage on this rank
        outputs, sends = [], []
        for stage in self.local:
            for index, piece in enumerate(pieces):
                received = None
                if stage - 1 in self.local:
                    received = kept[stage - 1][index]
                elif stage > 0:
                    received = torch.empty_like(like)
                    dist.recv(received, group=self._group, group_src=self._rank_of_stage[stage - 1])
                output = self._run_stage(stage, received, **piece)
                if stage == self._last:
                    outputs.append(output)
                elif stage + 1 in self.local:
                    kept.setdefault(stage, []).append(output)
                else:
                    output = output.contiguous()
                    sends.append(
                        (output, dist.isend(output, group=self._group, group_dst=self._rank_of_stage[stage + 1]))
                    )
        for _, send in sends:
            send.wait()
        return outputs


class _StageModule(nn.Module):
    """One stage as torch.distributed.pipelining calls it."""

    def __init__(self, run_stage: RunStage, stage: int, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        super().__init__()
        self._run_stage, self._stage, self._trainable = run_stage, stage, parameters

    def forward(self, hidden_states: torch.Tensor | None = None, **inputs) -> torch.Tensor:
        return self._run_stage(self._stage, hidden_states, **inputs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the whole rank; torch leaves alone what a micro-batch of this stage does not depend on."""
        yield from self._trainable()
