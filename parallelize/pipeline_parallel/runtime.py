"""Running a batch through the stages of a pipeline: this rank's part of a schedule of torch.distributed.pipelining.

Between the model, which can run any of its stages on one micro-batch, and torch, which says what runs when and moves
hidden states and their gradients between ranks. Every rank has the micro-batches' tokens; only hidden states travel.
"""

from __future__ import annotations

import contextlib
import logging
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
        after_weights: Callable[[], None],
    ) -> None:
        """group: the ranks of the pipeline. rank_of_stage: for every stage, the rank (of `group`) that runs it.

        parameters: gives the trainable parameters of this rank as they are at the time, for schedules that compute
        their gradients separately. after_weights: called each time they have done so.
        """
        self._after_weights = after_weights
        self._run_stage, self._group, self._device = run_stage, group, device
        self._rank_of_stage, self._make_schedule, self._parameters = list(rank_of_stage), make_schedule, parameters
        rank = dist.get_rank(group)
        self.local = [stage for stage, owner in enumerate(self._rank_of_stage) if owner == rank]
        self._schedule, self._made_for = None, None

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
        with _plain_errors():
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
        travelling = torch.empty_like(like, device="meta").requires_grad_()
        return _Stage(
            _StageModule(self._run_stage, stage, self._parameters),
            stage,
            len(self._rank_of_stage),
            self._device,
            input_args=travelling if stage > 0 else (),
            output_args=travelling if stage < self._last else torch.empty((), device=self._device),
            group=self._group,
            like=like,
            after_weights=self._after_weights,
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
            # Asked for before anything is sent on: where two ranks send to each other, NCCL needs one order on both.
            receives = [] if stage == 0 or stage - 1 in self.local else [self._receive(stage, like) for _ in pieces]
            for index, piece in enumerate(pieces):
                received = kept[stage - 1][index] if stage - 1 in self.local else None
                if receives:
                    received, arrival = receives[index]
                    arrival.wait()
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

    def _receive(self, stage: int, like: torch.Tensor) -> tuple[torch.Tensor, dist.Work]:
        received = torch.empty_like(like)
        return received, dist.irecv(received, group=self._group, group_src=self._rank_of_stage[stage - 1])


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors of a stage as they were raised: torch wraps them in a RuntimeError, and logs the whole schedule first."""
    log = logging.getLogger("torch.distributed.pipelining.schedules")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise
    finally:
        log.disabled = was_disabled


class _Stage(PipelineStage):
    """torch's stage, with memory for what is received only while it is needed: torch keeps that of all micro-batches.

    What is received then lives as long as the activations that were computed from it. Of torch's internals it uses what
    versions from 2.11 to 2.13 have in common: where they keep what is received, not how they describe it.
    """

    def __init__(self, *args, like: torch.Tensor, after_weights: Callable[[], None], **options) -> None:
        """like: what travels, hidden states and their gradients, for their shape and dtype."""
        super().__init__(*args, **options)
        self._like, self._after_weights = like, after_weights

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Without those to another stage of this rank, which gloo cannot do and torch 2.11 asks for."""
        return [
            exchange for exchange in super()._get_init_p2p_neighbors_ops() if exchange.group_peer != self.group_rank
        ]

    def _prepare_forward_infra(self, *args, **kwargs):
        result = super()._prepare_forward_infra(*args, **kwargs)
        for received in self.args_recv_info.values():
            _free(received)
        return result

    def _prepare_backward_infra(self, *args, **kwargs):
        result = super()._prepare_backward_infra(*args, **kwargs)
        for received in self.grad_recv_info.values():
            _free(received)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int) -> None:
        self._allocate(self.grad_recv_info[mb_index])  # torch makes it zero where there is no gradient
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def _retrieve_recv_activations(self, fwd_chunk_id: int):
        activations = super()._retrieve_recv_activations(fwd_chunk_id)
        _free(self.args_recv_info[fwd_chunk_id])
        return tuple(one.requires_grad_() for one in activations)  # before torch 2.13, the buffer had it

    def _retrieve_recv_grads(self, bwd_chunk_id: int):
        gradients = super()._retrieve_recv_grads(bwd_chunk_id)
        _free(self.grad_recv_info[bwd_chunk_id])
        return gradients

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._after_weights()

    def _allocate(self, received: Iterable) -> None:
        for info in received:
            info.buffer = torch.empty_like(self._like)


def _free(received: Iterable) -> None:
    for info in received:
        info.buffer = torch.empty(0)  # not None, because torch 2.11 clears its gradient


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
