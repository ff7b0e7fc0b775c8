"""Records that were tokenized elsewhere: a column `input_ids`, and optionally `labels` and `attention_mask`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from transformers_backend.data.sources import Document, Encoder
from transformers_backend.loss import IGNORE_INDEX


def tokenized_encoder(vocabulary_size: int) -> Encoder:
    """The encoder of such records, or of bare arrays of tokens, for a model with `vocabulary_size` embeddings.

    `labels` follow Transformers: aligned with the tokens, -100 where there is no loss. Tokens with `attention_mask` 0
    are padding and are left out. Nothing is added: a document ends as it does in the record.
    """
    return TokenizedEncoder(vocabulary_size)


@dataclass(frozen=True)
class TokenizedEncoder:
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "attention_mask")
    """What it reads."""

    vocabulary_size: int

    def __call__(self, record: Any) -> Document:
        if not isinstance(record, Mapping):
            return Document(self._tokens("input_ids", record))
        if record.get("input_ids") is None:
            raise ValueError(
                f"there is no input_ids, only {', '.join(record)}: tokenized records must have them. Name the column so"
            )
        tokens = self._tokens("input_ids", record["input_ids"])
        labels, mask = (self._beside(name, record.get(name), tokens) for name in ("labels", "attention_mask"))
        if labels is not None:
            self._check_range("labels", labels[labels != IGNORE_INDEX])
        if mask is not None and not mask.all():
            tokens, labels = tokens[mask != 0], None if labels is None else labels[mask != 0]
        return Document(tokens, labels)

    def _tokens(self, name: str, values: Any) -> np.ndarray:
        tokens = _integers(name, values)
        self._check_range(name, tokens)
        return tokens

    def _beside(self, name: str, values: Any, tokens: np.ndarray) -> np.ndarray | None:
        if values is None:
            return None
        array = _integers(name, values)
        if array.shape != tokens.shape:
            raise ValueError(
                f"{name} has {len(array)} entries and input_ids {len(tokens)}: each token must have one. Correct or "
                "remove the record"
            )
        return array

    def _check_range(self, name: str, tokens: np.ndarray) -> None:
        if len(tokens) and not ((lowest := tokens.min()) >= 0 and (highest := tokens.max()) < self.vocabulary_size):
            found = lowest if lowest < 0 else highest
            raise ValueError(
                f"{name} holds {found}: must be in [0, {self.vocabulary_size}), the model's vocabulary. Tokenize with "
                "the model's own tokenizer"
            )


def _integers(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name} is no list of numbers ({error}). Correct or remove the record") from error
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}: must be one list of whole numbers. Correct or remove the "
            "record"
        )
    return array
