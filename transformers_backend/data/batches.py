"""From documents to batches: tokens are concatenated, cut into blocks of `seq_len` and split over data ranks.

`PackedBatches` is what `train_step` calls `next()` on; its `state_dict()` goes into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transformers_backend.data.sources import IndexedSource, StreamedSource
from transformers_backend.loss import IGNORE_INDEX


@dataclass(eq=False)
class PackedBatches:
    """Iterator over batches {"input_ids", "labels"}, both int64 of shape (batch_size, seq_len), on the CPU.

    Documents are tokenized as they are needed, concatenated and cut into blocks; a batch is the next `batch_size`
    blocks of this data rank. Labels follow Transformers: aligned with `input_ids` (the model shifts them), -100 is
    ignored.

    `repeat=True`: each data rank reads documents of its own, reshuffled every epoch, without end.

    `repeat=False`: the data ends, and the ranks must end after the same number of batches, or those that go on wait
    for ever in a collective. Without a word between them they can only agree on what all of them see. So every rank
    tokenizes everything, in the order of the source, and of these blocks, numbered 0, 1, ..., keeps
    `data_rank, data_rank + data_world_size, ...`. Where the data ends inside a block or a round of batches, the rest
    is filled with ignored labels: shapes never change, no token is lost, and each is seen by exactly one rank.
    """

    source: IndexedSource | StreamedSource
    encode: Callable[[str], np.ndarray]
    seq_len: int
    batch_size: int
    data_rank: int
    data_world_size: int
    repeat: bool
    fill_token: int
    fingerprint: dict[str, Any]

    def __post_init__(self) -> None:
        self.reset()

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        blocks = [self._next_block() for _ in range(self.batch_size)] if self.repeat else self._share_of_round()
        input_ids = np.full((self.batch_size, self.seq_len), self.fill_token, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        for row, block in enumerate(blocks):
            input_ids[row, : len(block)] = block
            labels[row, : len(block)] = block
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def reset(self) -> None:
        """Start over with the first batch of the first epoch (each validation does)."""
        self._start(epoch=0, position=None, leftover=())

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts, as plain numbers, strings, lists and dicts; each data rank has its own."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "leftover": self._tokens.tolist(),  # read and tokenized, but not yet part of a batch
            "data_rank": self.data_rank,
            "data_world_size": self.data_world_size,
            "fingerprint": dict(self.fingerprint),
        }

    def load_state_dict(self, states: list[dict[str, Any]] | dict[str, Any]) -> None:
        """Go on exactly where the states of all data ranks were taken, in rank order. Raises ValueError for those of
        other data or of another number of data ranks."""
        state = states if isinstance(states, dict) else states[min(self.data_rank, len(states) - 1)]
        saved, here = ((s["data_rank"], s["data_world_size"]) for s in (state, self.state_dict()))
        if saved != here:
            raise ValueError(
                f"The checkpoint's data state is of data rank {saved[0]} of {saved[1]}, and this is data rank "
                f"{here[0]} of {here[1]}: documents are split over data ranks, so their number must stay the same. "
                "Set parallelism.data_parallel_replicate_degree and data_parallel_shard_degree so that their product "
                "is what it was, or start a new run from the checkpoint's weights."
            )
        saved, here = state["fingerprint"], self.fingerprint
        differences = [
            f"{key} = {saved.get(key)!r} there and {here.get(key)!r} here"
            for key in sorted(saved.keys() | here.keys())
            if saved.get(key) != here.get(key)
        ]
        if differences:
            raise ValueError(
                f"The checkpoint's data state is of other data: {'; '.join(differences)}. Its position has a meaning "
                "only in the same data: give dataset, dataset_path, text_column, tokenizer and seed as they were, or "
                "start a new run from the checkpoint's weights."
            )
        self._start(state["epoch"], state["position"], state["leftover"])

    def require_first_block(self) -> None:
        """Read up to the first block, and raise ValueError if an epoch does not hold one (validation: any token)."""
        self._fill(self.seq_len, across_epochs=False)
        needed = self.seq_len if self.repeat else 1
        if len(self._tokens) < needed:
            raise ValueError(
                f"{self.source.name}: data rank {self.data_rank} of {self.data_world_size} gets "
                f"{len(self._tokens)} tokens of text in an epoch, and needs at least {needed} (seq_len = "
                f"{self.seq_len}). Use more text, a smaller seq_len or fewer data ranks."
            )

    def _start(self, epoch: int, position: Any, leftover: Any) -> None:
        self._epoch = epoch
        self._position = position
        self._tokens = np.asarray(leftover, dtype=np.int64)
        self._documents = self.source.read_from(epoch, position)

    def _fill(self, count: int, *, across_epochs: bool) -> None:
        """Tokenize documents until at least `count` tokens are there, or the epoch ends and may not be passed."""
        chunks, available = [self._tokens], len(self._tokens)
        while available < count:
            position_and_text = next(self._documents, None)
            if position_and_text is not None:
                self._position, text = position_and_text
                if text:
                    chunks.append(self.encode(text))
                    available += len(chunks[-1])
            elif across_epochs:
                self._start(self._epoch + 1, None, ())
            else:
                break
        self._tokens = np.concatenate(chunks)

    def _next_block(self) -> np.ndarray:
        """The next `seq_len` tokens; fewer, or none, at the end of the data (only with `repeat=False`)."""
        if len(self._tokens) < self.seq_len:
            self._fill(self.seq_len, across_epochs=self.repeat)
        block, self._tokens = self._tokens[: self.seq_len], self._tokens[self.seq_len :]
        return block

    def _share_of_round(self) -> list[np.ndarray]:
        """This rank's blocks of one round (a batch for every rank), some of them possibly empty."""
        blocks = [self._next_block() for _ in range(self.batch_size * self.data_world_size)]
        if len(blocks[0]) == 0:
            raise StopIteration
        return blocks[self.data_rank :: self.data_world_size]
