"""From documents to batches: which source comes next, the split over data ranks, and the state that a resume needs.

`PackedBatches` is what `train_step` calls `next()` on; its `state_dict()` goes into every checkpoint. Documents come
from `feeds.py`; `packing.py` makes blocks of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transformers_backend.data.feeds import Feeds
from transformers_backend.data.packing import Packer


@dataclass(frozen=True)
class Stage:
    """From `from_step` on (the first step is 1), tokens come from the sources in the proportion of `weights`."""

    from_step: int
    weights: tuple[float, ...]
    """One for each source; 0 leaves it out."""


@dataclass(eq=False)
class PackedBatches:
    """Iterator over batches of int64 tensors of shape (batch_size, seq_len) on the CPU: "input_ids", "labels" and,
    with `positions`, "position_ids".

    Documents are tokenized as they are needed, concatenated and cut into blocks; a batch is the next `batch_size`
    blocks of this data rank. Labels follow Transformers: aligned with `input_ids` (the model shifts them), -100 is
    ignored. With `positions` every document counts its positions from 0, and its first token has no label.

    `repeat=True`: each data rank reads documents of its own, reshuffled every epoch, without end. With several sources,
    the next document comes from the one whose tokens so far in this stage, divided by its weight, are fewest.

    `repeat=False`: the data ends, and the ranks must end after the same number of batches, or those that go on wait
    for ever in a collective. Without a word between them they can only agree on what all of them see. So every rank
    tokenizes everything, in the order of the source, and of these blocks, numbered 0, 1, ..., keeps
    `data_rank, data_rank + data_world_size, ...`. Where the data ends inside a block or a round of batches, the rest
    is filled with ignored labels: shapes never change, no token is lost, and each is seen by exactly one rank.
    """

    feeds: Feeds
    names: Sequence[str]
    """Of the sources; ("",) for the only one of a job without [[training.sources]]."""
    stages: Sequence[Stage]
    seq_len: int
    batch_size: int
    batches_per_step: int
    """Batches of this rank in an optimizer step: stages begin with a step."""
    data_rank: int
    data_world_size: int
    repeat: bool
    positions: bool
    fill_token: int
    fingerprint: dict[str, Any]

    def __post_init__(self) -> None:
        self._packer = Packer()
        self._start(batches=0)

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._stage_of(self._batches) != self._stage:
            self._enter(self._stage_of(self._batches))
        blocks = self.batch_size if self.repeat else self.batch_size * self.data_world_size
        rows = slice(None) if self.repeat else slice(self.data_rank, None, self.data_world_size)
        self._read(blocks * self.seq_len)
        if not self._packer.tokens:
            raise StopIteration
        batch = self._packer.take(blocks, self.seq_len, rows, fill_token=self.fill_token, positions=self.positions)
        self._batches += 1
        return batch

    def reset(self) -> None:
        """Start over with the first batch of the first epoch (each validation does)."""
        self.feeds.restart()
        self._packer.clear()
        self._start(batches=0)

    @property
    def description(self) -> str:
        """The sources by name, for the reader of a log."""
        sources = [self.feeds.name(index) for index in range(len(self.names))]
        return ", ".join(
            f"{name} ({source})" if name else source for name, source in zip(self.names, sources, strict=True)
        )

    def close(self) -> None:
        """End the worker processes."""
        self.feeds.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts, as plain numbers, strings, lists and dicts; each data rank has its own."""
        return {
            "sources": dict(zip(self.names, self.feeds.state_dicts(), strict=True)),
            "tokens_taken": dict(zip(self.names, self._tokens_taken, strict=True)),  # in this stage, by this rank
            "stage": self._stage,
            "weights": self._weights_by_name(),
            "leftover": self._packer.state(),  # read and tokenized, but not yet part of a batch
            "batches": self._batches,
            "batches_per_step": self.batches_per_step,
            "data_rank": self.data_rank,
            "data_world_size": self.data_world_size,
            "fingerprint": dict(self.fingerprint),
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on exactly where `states` were taken: those of all data ranks that saved, in rank order.

        On as many ranks the next batch is the one that would have come. On another number the documents that nobody
        has taken, and the tokens that were read but not in a batch yet, are dealt out anew: none is lost, and none
        comes twice. Raises ValueError for a state of other data.
        """
        for rank, state in enumerate(states):
            assert (state["data_rank"], state["data_world_size"]) == (rank, len(states)), "all ranks, in order"
        require_same_data(states[0]["fingerprint"], self.fingerprint)
        for index, name in enumerate(self.names):
            if name in states[0]["sources"]:  # else it is new, and starts at its first document
                self.feeds.load_state_dicts(index, [state["sources"][name] for state in states])
        if len(states) == self.data_world_size or not self.repeat:
            state = states[self.data_rank if self.repeat else 0]
            leftover, taken = state["leftover"], state["tokens_taken"]
        else:
            pieces = [piece for state in states for piece in state["leftover"]]
            leftover = pieces[self.data_rank :: self.data_world_size]
            taken = {
                name: sum(state["tokens_taken"][name] for state in states) // self.data_world_size
                for name in states[0]["tokens_taken"]
            }
        self._packer.load(leftover)
        batches = states[0]["batches"]
        if states[0]["batches_per_step"] != self.batches_per_step:
            batches = batches // states[0]["batches_per_step"] * self.batches_per_step
        self._start(batches)
        # Tokens that were taken by other weights say nothing about who is behind now: a new source would be all that is
        # read until it has as many.
        if (states[0]["stage"], states[0]["weights"]) == (self._stage, self._weights_by_name()):
            self._tokens_taken = [taken.get(name, 0) for name in self.names]

    def require_first_block(self) -> None:
        """Read up to the first block, and raise ValueError if an epoch does not hold one (validation, or one of several
        sources: any token)."""
        needed = self.seq_len if self.repeat and len(self.names) == 1 else 1
        for index, name in enumerate(self.names):
            tokens = self.feeds.require_tokens(index, needed)
            if tokens < needed:
                which = f'source "{name}": ' if name else ""
                raise ValueError(
                    f"{which}{self.feeds.name(index)}: data rank {self.data_rank} of {self.data_world_size} gets "
                    f"{tokens} tokens of text in an epoch, and needs at least {needed} (seq_len = {self.seq_len}). "
                    "Use more text, a smaller seq_len or fewer data ranks."
                )

    def _start(self, batches: int) -> None:
        self._batches = batches
        self._enter(self._stage_of(batches))

    def _stage_of(self, batches: int) -> int:
        """The number of the stage that the next batch belongs to, after so many."""
        step = batches // self.batches_per_step + 1
        return max(index for index, stage in enumerate(self.stages) if stage.from_step <= step)

    def _enter(self, stage: int) -> None:
        self._stage = stage
        self._weights = self.stages[stage].weights
        self._tokens_taken = [0] * len(self.names)
        self.feeds.read_ahead(self._weights)

    def _weights_by_name(self) -> dict[str, float]:
        """Of the sources that this stage reads."""
        return {name: weight for name, weight in zip(self.names, self._weights, strict=True) if weight}

    def _read(self, tokens: int) -> None:
        """Put documents into the packer until it holds `tokens` tokens, or the data ends."""
        while self._packer.tokens < tokens:
            source = self._next_source()
            document = self.feeds.take(source)
            if document is None:
                return
            self._tokens_taken[source] += len(document.tokens)
            self._packer.add(document)

    def _next_source(self) -> int:
        if len(self.names) == 1:
            return 0
        active = (source for source, weight in enumerate(self._weights) if weight)
        return min(active, key=lambda source: self._tokens_taken[source] / self._weights[source])


def require_same_data(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise ValueError that names each entry of a saved fingerprint that is not the same here.

    Sources may be added; one that was read must stay, or its position would be lost.
    """
    names = saved["sources"].keys()
    saved, here = _flat(saved, names), _flat(here, names)
    differences = [
        f"{key} = {saved.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted(saved.keys() | here.keys())
        if saved.get(key) != here.get(key)
    ]
    if differences:
        raise ValueError(
            f"The checkpoint's data state is of other data: {'; '.join(differences)}. Its position has a meaning "
            "only in the same data: give dataset, dataset_path, text_column, chat_template, tokenizer and seed as they "
            "were (a source that is not wanted any more can be left out of a stage), or let the data start anew, and "
            'everything else go on, with checkpoint.exclude_from_loading = ["dataloader"].'
        )


def _flat(fingerprint: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    flat = {key: value for key, value in fingerprint.items() if key != "sources"}
    for name in names:
        values = fingerprint["sources"].get(name, {})
        flat |= {f"{name}.{key}" if name else key: value for key, value in values.items()}
    return flat
