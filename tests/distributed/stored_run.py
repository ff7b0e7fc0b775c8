"""Steps of a tiny model on the batches of their numbers, and its checkpoints: a run without data, logs and config."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from transformers_backend.checkpoint import Checkpointer
from transformers_backend.checkpoint.local import LocalStorage
from transformers_backend.model import HFTransformerModel
from transformers_backend.optimizer import build_optimizer

TOKENS = 27  # the size of the vocabulary
BATCH, SEQUENCE = 4, 9  # neither divides by 2 and 4 after the shift

_CONFIG_TEXT = "[training]\nlocal_batch_size = 1\nglobal_batch_size = 4\n"


class _NoData:
    """Stands for the batches of a run: a position that is always the same."""

    def state_dict(self) -> dict[str, int]:
        return {"position": 0}

    def load_state_dict(self, positions: list[dict[str, int]]) -> None:
        assert {position["position"] for position in positions} == {0}


class StoredRun:
    """A model that is parallelised, or to train on one device, with an optimizer and a checkpointer."""

    def __init__(
        self,
        model: HFTransformerModel,
        folder: str,
        *,
        mode: str = "disabled",
        optimizer: Literal["AdamW", "Muon"] = "AdamW",
        accumulation_steps: int = 1,
    ) -> None:
        self.model, self._mode, self._accumulation_steps = model, mode, accumulation_steps
        if model.mesh is None:
            model.full_state_dict()  # fills the parameters before an optimizer takes them
        layers = tuple(f"{layer}." for layer in model.decoder.layers)
        trained = [
            (name, parameter) for name, parameter in model.hf_model.named_parameters() if parameter.requires_grad
        ]
        self.optimizers = []
        if trained:  # a rank of a pipeline may have frozen ones only
            self.optimizers = build_optimizer(
                trained, name=optimizer, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
                implementation="foreach", matrix_names={name for name, _ in trained if name.startswith(layers)},
            )  # fmt: skip
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1.0) for one in self.optimizers]
        self.checkpointer = Checkpointer(
            LocalStorage(Path(folder)), model=model, optimizers=self.optimizers, schedulers=self.schedulers,
            data=_NoData(), data_rank=model.data_rank, config_text=_CONFIG_TEXT, async_mode=mode,
        )  # fmt: skip

    def train(self, step: int) -> float:
        """One step, clipped, on the part of its batch that is this data rank's."""
        tokens = torch.randint(TOKENS, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(self.model.dims.data_parallel_size)[self.model.data_rank].chunk(self._accumulation_steps)
        targets = BATCH * (SEQUENCE - 1)
        loss = sum(self.model.forward_backward(part, part, num_items_in_batch=targets).item() for part in mine)
        self.model.clip_grad_norm_(1.0)
        self.checkpointer.wait_until_staged()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()
        return loss

    def go_on(self, first: int, last: int) -> list[float]:
        """Losses of the steps first < step <= last. With an asynchronous mode it is saved before the last one, and
        always after it; then closed."""
        losses = []
        for step in range(first + 1, last + 1):
            losses.append(self.train(step))
            if step == last - 1 and self._mode != "disabled":
                self.checkpointer.save(step)  # is being written while the next step runs
        self.checkpointer.save_last(last)
        self.checkpointer.close(timeout_seconds=60)
        return losses

    def averages(self) -> dict[str, torch.Tensor]:
        """What the optimizers hold in the shape of a parameter, full, in Transformers' order."""
        state = {parameter: held for optimizer in self.optimizers for parameter, held in optimizer.state.items()}
        averages = {}
        for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            for parameter in self.model.hf_model.parameters():
                parameter.grad = state.get(parameter, {}).get(kind)
            averages |= {f"{name} {kind}": value for name, value in self.model.full_gradients().items()}
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return averages
