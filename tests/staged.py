"""A model in a pipeline without processes: a copy of the model for each rank, cut for good, and what travels by hand.

The copies share nothing, so that what a stage needs of another one, and does not get, is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from transformers_backend.decoder import describe_decoder
from transformers_backend.loss import count_targets, install_loss, shift_labels
from transformers_backend.stages import LocalStages, StageSplit


class StagedModel:
    """The ranks of a pipeline, each with a model of its own that has only its stages."""

    def __init__(
        self, build: Callable[[], PreTrainedModel], split: StageSplit, stages_of_ranks: Sequence[Sequence[int]]
    ) -> None:
        """build: makes the model, with the same weights each time. stages_of_ranks: for each rank its stages."""
        self.models, self.local = [], []
        for stages in stages_of_ranks:
            model = build()
            decoder = describe_decoder(model)
            local = LocalStages(model, decoder, split, stages)
            local.drop_the_rest()
            if local.has_last:
                install_loss(model, decoder, chunked=True, chunk_elements=4096)
            local.place_stand_ins(torch.device("cpu"), torch.float32)
            for module, name in weights_not_held(model):
                vars(module)[name] = torch.full((), torch.nan).expand(vars(module)[name].shape)  # whoever reads it
            local.install()
            self.models.append(model)
            self.local.append(local)
        self.split = split
        self.rank_of_stage = {stage: rank for rank, stages in enumerate(stages_of_ranks) for stage in stages}

    def forward_backward(self, input_ids: torch.Tensor, labels: torch.Tensor, micro_batches: int = 1) -> float:
        """The mean loss of a batch, whose gradients are added: all forwards, then all backwards, last ones first."""
        count = count_targets(labels)
        pieces = zip(input_ids.chunk(micro_batches), shift_labels(labels).chunk(micro_batches), strict=True)
        passed = [self._forward(tokens, targets) for tokens, targets in pieces]
        loss = sum(travelled[-1][1].item() for travelled in passed) / count.item()
        for travelled in reversed(passed):
            gradient = torch.ones(()) / count
            for received, sent in reversed(travelled):
                sent.backward(gradient)
                gradient = None if received is None else received.grad
        return loss

    def _forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
        """For each stage what it received and what it sent on."""
        travelled, received = [], None
        for stage in range(len(self.split.stages)):
            model = self.models[self.rank_of_stage[stage]]
            before = None if received is None else received.detach().clone()
            sent = model(stage=stage, hidden_states=received, input_ids=tokens, targets=targets)
            assert received is None or torch.equal(received, before), "what was received belongs to the sender"
            travelled.append((received, sent))
            received = sent.detach().clone().requires_grad_()
        return travelled

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of every parameter, summed over the ranks that hold it."""
        total: dict[str, torch.Tensor] = {}
        for model in self.models:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] = total[name] + parameter.grad if name in total else parameter.grad.clone()
        return total


def weights_not_held(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules and names of the tensors that stand where a weight of another stage was."""
    return [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    ]
