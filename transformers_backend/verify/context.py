"""What the report needs where ranks share sequences: sequences of several windows, and packed documents.

A packed row holds documents whose positions restart. What it must compute is what plain Transformers computes of each
document alone, in a row of its own: the sum of all token losses, and every gradient.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from parallelize.config import ParallelismConfig
from transformers_backend.loss import IGNORE_INDEX, shift_labels, sum_cross_entropy
from transformers_backend.twin import VOCABULARY_SIZE, WINDOW

_WINDOWS = 6  # in a shared sequence, so that with more than two ranks some parts are out of each other's sight
_USUAL_LENGTH = 3 * WINDOW
# How long the documents of the even rows and of the odd ones are, but for the last, which fills the row. One is of a
# single token; the last is longer than a window, and lies on several ranks.
_DOCUMENTS = ((7, 1), (11,))


def sequence_length(parallelism: ParallelismConfig) -> int:
    """Tokens of a sequence: several windows of the twin, and divisible into two chunks a rank that shares it."""
    degree = parallelism.context_parallel_degree
    if degree == 1:
        return _USUAL_LENGTH
    return max(_WINDOWS * WINDOW // (2 * degree), 1) * 2 * degree


def packed_batch(rows: int, seq: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and positions (rows, seq) of rows with several documents; positions restart with each.

    No document predicts the first token of the next, and every third row has no targets in its last ten tokens.
    """
    generator = torch.Generator().manual_seed(11)
    input_ids = torch.randint(3, VOCABULARY_SIZE - 3, (rows, seq), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in _lengths(row, seq)]) for row in range(rows)])
    labels = input_ids.masked_fill(positions == 0, IGNORE_INDEX)
    labels[::3, -10:] = IGNORE_INDEX
    return input_ids, labels, positions


def loss_of_documents_alone(plain: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss over all target tokens of `packed_batch`, with every document in a row of its own."""
    seq, total = input_ids.shape[1], 0.0
    for row, (tokens, targets) in enumerate(zip(input_ids, labels, strict=True)):
        lengths = _lengths(row, seq)
        for document, wanted in zip(tokens.split(lengths), targets.split(lengths), strict=True):
            logits = plain(input_ids=document[None], use_cache=False).logits
            total = total + sum_cross_entropy(logits[0], shift_labels(wanted[None]).flatten())
    return total / (shift_labels(labels) != IGNORE_INDEX).sum()


def _lengths(row: int, seq: int) -> list[int]:
    """Of the documents of a row."""
    first = _DOCUMENTS[row % len(_DOCUMENTS)]
    return [*first, seq - sum(first)]
