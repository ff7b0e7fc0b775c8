"""The memory-mapped token file: what is written is read, in any process, and a file that is not whole is told."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from tests.texts import build_batches
from transformers_backend.data.token_file import is_token_file, open_token_file, tokenizer_digest, write_token_file

DOCUMENTS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1]]
NAME = 'dataset_path = "corpus"'


@pytest.fixture(scope="module")
def byt5() -> ByT5Tokenizer:
    return ByT5Tokenizer()


@pytest.fixture
def corpus(tmp_path: Path, byt5: ByT5Tokenizer) -> Path:
    """Three documents, written in two pieces."""
    pieces = [
        (np.concatenate(some), np.array([len(document) for document in some]))
        for some in (DOCUMENTS[:2], DOCUMENTS[2:])
    ]
    write_token_file(tmp_path / "corpus", pieces, byt5, "byt5")
    return tmp_path / "corpus"


def change_meta(corpus: Path, **changes) -> None:
    fields = json.loads((corpus / "meta.json").read_text())
    (corpus / "meta.json").write_text(json.dumps(fields | changes))


def test_what_is_written_is_read(corpus: Path, byt5: ByT5Tokenizer):
    collection, encode = open_token_file(corpus, NAME, byt5)
    assert collection.count == 3
    documents = [encode(collection.read(number)) for number in (2, 0, 1)]
    assert [document.tokens.tolist() for document in documents] == [DOCUMENTS[2], DOCUMENTS[0], DOCUMENTS[1]]
    assert all(document.labels is None and document.tokens.dtype == np.uint16 for document in documents)
    assert collection.where(2) == f"file {corpus}/tokens.bin, document 2"
    meta = json.loads((corpus / "meta.json").read_text())
    assert meta == {
        "version": 1, "dtype": "uint16", "documents": 3, "tokens": 12, "tokenizer": "byt5", "vocabulary_size": 384,
        "tokenizer_digest": tokenizer_digest(byt5), "end_token": 1, "complete": True,
    }  # fmt: skip
    assert (corpus / "tokens.bin").stat().st_size == 2 * 12


def test_documents_are_views_of_the_file(corpus: Path):
    collection, encode = open_token_file(corpus, NAME)
    collection.read(0)
    first, second = encode(collection.read(1)).tokens, encode(collection.read(1)).tokens
    assert type(first) is np.ndarray
    assert np.shares_memory(first, second)
    assert not first.flags.owndata
    assert not first.flags.writeable


def test_a_copy_for_another_process_maps_the_file_itself(corpus: Path):
    collection, encode = open_token_file(corpus, NAME)
    collection.read(0)
    pickled = pickle.dumps((collection, encode))
    assert len(pickled) < 2000, "no content"
    copy, encode = pickle.loads(pickled)
    assert encode(copy.read(2)).tokens.tolist() == DOCUMENTS[2]


def test_large_vocabularies_take_four_bytes(tmp_path: Path, byt5: ByT5Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ByT5Tokenizer, "__len__", lambda _: 70000)
    write_token_file(tmp_path / "corpus", [(np.array([69999, 1]), np.array([2]))], byt5, "byt5")
    collection, _ = open_token_file(tmp_path / "corpus", NAME)
    assert collection.read(0).tolist() == [69999, 1]
    assert (tmp_path / "corpus" / "tokens.bin").stat().st_size == 8


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(corpus: Path, tmp_path: Path, byt5: ByT5Tokenizer):
    fingerprint = open_token_file(corpus, NAME)[0].fingerprint
    (tmp_path / "moved").mkdir()
    corpus.rename(tmp_path / "moved" / "corpus")
    assert open_token_file(tmp_path / "moved" / "corpus", NAME)[0].fingerprint == fingerprint
    write_token_file(tmp_path / "other" / "corpus", [(np.array([5, 1]), np.array([2]))], byt5, "byt5")
    assert open_token_file(tmp_path / "other" / "corpus", NAME)[0].fingerprint != fingerprint


def test_the_folder_is_known_by_its_files(corpus: Path, tmp_path: Path):
    assert is_token_file(corpus)
    assert not is_token_file(tmp_path)
    (corpus / "meta.json").rename(tmp_path / "meta.json")
    assert not is_token_file(tmp_path), "others have a meta.json too"
    assert is_token_file(corpus), "an unfinished one is to be told, not to be taken for something else"


@pytest.mark.parametrize(("change", "kind"), [(-3, "truncated"), (2, "longer than it should be")])
def test_a_file_of_another_size(corpus: Path, change: int, kind: str):
    os.truncate(corpus / "tokens.bin", 24 + change)
    with pytest.raises(ValueError, match=rf"tokens.bin is {kind}: it has {24 + change} bytes, and meta.json says 24"):
        open_token_file(corpus, NAME)


def test_a_file_that_is_truncated_during_the_run(corpus: Path):
    """Reading what is no more there would kill the process."""
    collection, _ = open_token_file(corpus, NAME)
    collection.read(0)
    os.truncate(corpus / "tokens.bin", 10)
    with pytest.raises(ValueError, match=r"tokens.bin is truncated: it has 10 bytes, .* scripts/tokenize_corpus.py"):
        collection.read(2)


def test_a_file_that_vanishes_during_the_run_can_still_be_read(corpus: Path):
    collection, _ = open_token_file(corpus, NAME)
    collection.read(0)
    for file in corpus.iterdir():
        file.unlink()
    assert collection.read(2).tolist() == DOCUMENTS[2]


def test_unfinished_folders(corpus: Path):
    change_meta(corpus, complete=False)
    with pytest.raises(ValueError, match=r'dataset_path = "corpus": .*meta.json says that its writing did not finish'):
        open_token_file(corpus, NAME)
    (corpus / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"meta.json is missing, so its writing did not finish. Write it again"):
        open_token_file(corpus, NAME)


def test_damaged_folders(corpus: Path):
    offsets = (corpus / "offsets.npy").read_bytes()
    (corpus / "offsets.npy").write_bytes(offsets[:-8])
    with pytest.raises(ValueError, match=r"offsets.npy is truncated or damaged"):
        open_token_file(corpus, NAME)
    np.save(corpus / "offsets.npy", np.array([0, 4, 12]))
    with pytest.raises(ValueError, match=r"offsets.npy has shape \(3,\), from 0 to 12: must be \(4,\), from 0 to 12"):
        open_token_file(corpus, NAME)
    np.save(corpus / "offsets.npy", np.array([0, 40, 6, 12]))
    with pytest.raises(ValueError, match=r"document 0: offsets.npy is damaged \(0 to 40\)"):
        open_token_file(corpus, NAME)[0].read(0)
    (corpus / "offsets.npy").unlink()
    with pytest.raises(ValueError, match=r"offsets.npy is missing, which meta.json tells of"):
        open_token_file(corpus, NAME)
    change_meta(corpus, version=2)
    with pytest.raises(ValueError, match=r"says version 2 and dtype uint16: must be version 1"):
        open_token_file(corpus, NAME)
    (corpus / "meta.json").write_text('{"version": 1')
    with pytest.raises(ValueError, match=r"meta.json is damaged or of another version"):
        open_token_file(corpus, NAME)


def test_a_slice_is_refused(corpus: Path):
    with pytest.raises(ValueError, match=r'dataset_split = "train\[:9%\]": .* no slice can be taken. Tokenize each'):
        open_token_file(corpus, NAME, split="train[:9%]")


def test_reading_is_far_from_holding_a_run_up(tmp_path: Path, byt5: ByT5Tokenizer):
    """Some 200 million tokens a second alone on a core; 5 million are asked of four workers."""
    lengths = np.full(4000, 500)
    write_token_file(tmp_path / "corpus", [(np.full(lengths.sum(), 7), lengths)], byt5, "byt5")
    collection, encode = open_token_file(tmp_path / "corpus", NAME)
    collection.read(0)
    start = time.process_time()  # other work may share the core
    tokens = sum(len(encode(collection.read(number)).tokens) for number in range(3999, -1, -1))
    assert tokens / (time.process_time() - start) > 5e6


@pytest.mark.alone
def test_four_workers_make_batches_of_it_at_five_million_tokens_a_second(tmp_path: Path, byt5: ByT5Tokenizer):
    """They do three times that; the best of several short looks is asked, as other work may share the cores."""
    lengths = np.full(8000, 500)
    write_token_file(tmp_path / "corpus", [(np.full(lengths.sum(), 7), lengths)], byt5, "byt5")
    batches = build_batches(tmp_path / "corpus", seq_len=2048, batch_size=8, num_workers=4, prefetch_factor=2)
    for _ in range(64):  # a million tokens, twice what the workers are ahead at most
        next(batches)
    best, deadline = 0.0, time.monotonic() + 60
    while best <= 5e6 and time.monotonic() < deadline:
        start, tokens = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < 0.5:
            tokens += next(batches)["input_ids"].numel()
        best = max(best, tokens / elapsed)
    batches.close()
    assert best > 5e6


def test_an_empty_folder(tmp_path: Path, byt5: ByT5Tokenizer):
    write_token_file(tmp_path / "corpus", [], byt5, "byt5")
    with pytest.raises(ValueError, match=r'dataset_path = "corpus": holds no documents'):
        open_token_file(tmp_path / "corpus", NAME)


def test_another_tokenizer_than_the_models(corpus: Path):
    other = ByT5Tokenizer(extra_ids=3)
    with pytest.raises(ValueError, match=r'was tokenized with "byt5" \(384 tokens\).* is another one') as caught:
        open_token_file(corpus, NAME, other)
    assert 'set model.hf_assets_path to "byt5"' in str(caught.value)
    assert f"tokenizer ({len(other)} tokens)" in str(caught.value)
