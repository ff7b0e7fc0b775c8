"""Records that were tokenized elsewhere: checked against the model's vocabulary, labels and padding heeded."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from transformers_backend.data.tokenized import tokenized_encoder

ENCODE = pickle.loads(pickle.dumps(tokenized_encoder(100)))  # as workers get it


def test_tokens_alone_are_all_targets():
    for record in ({"input_ids": [5, 99, 0]}, {"input_ids": np.array([5, 99, 0], np.uint16)}, np.array([5, 99, 0])):
        document = ENCODE(record)
        assert document.tokens.tolist() == [5, 99, 0]
        assert document.labels is None


def test_labels_stand_beside_the_tokens():
    document = ENCODE({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "token_type_ids": [0, 0, 0]})
    assert document.labels.tolist() == [-100, 6, 7]


def test_padding_is_left_out():
    document = ENCODE({"input_ids": [0, 5, 6, 0], "labels": [1, 5, 6, 1], "attention_mask": [0, 1, 1, 0]})
    assert document.tokens.tolist() == [5, 6]
    assert document.labels.tolist() == [5, 6]
    assert ENCODE({"input_ids": [0, 5], "attention_mask": [1, 1]}).tokens.tolist() == [0, 5]


def test_a_record_may_be_empty():
    assert ENCODE({"input_ids": [], "labels": []}).tokens.shape == (0,)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [5, 100]}, r"input_ids holds 100: must be in \[0, 100\), the model's vocabulary"),
        ({"input_ids": [-1, 5]}, r"input_ids holds -1: must be in \[0, 100\)"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels has 1 entries and input_ids 2: each token must have one"),
        ({"input_ids": [5, 6], "labels": [-5, 6]}, "labels holds -5"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "attention_mask has 1 entries and input_ids 2"),
        ({"input_ids": [0.5]}, r"input_ids is float64 of shape \(1,\): must be one list of whole numbers"),
        ({"input_ids": [[1], [2]]}, r"input_ids is int64 of shape \(2, 1\): must be one list"),
        ({"input_ids": [[1], [2, 3]]}, "input_ids is no list of numbers"),
        ({"input_ids": "text"}, "input_ids is <U4 of shape"),
        ({"ids": [1], "text": "a"}, "there is no input_ids, only ids, text"),
    ],
)
def test_what_cannot_be_tokens_is_told(record: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ENCODE(record)
