"""Tokenizers, documents, packing, splitting over data ranks, and what is said about unusable data."""

from __future__ import annotations

import csv
import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, Qwen3Config

from tests.texts import (
    EOS,
    IGNORED,
    OFFSET,
    assert_resumes,
    build_batches,
    documents_of,
    load_byt5,
    rewrite,
    same,
    tokens_of,
    write_json_lines,
    write_text_files,
)
from transformers_backend import data
from transformers_backend.data import files
from transformers_backend.data.packing import Packer
from transformers_backend.data.sources import Document
from transformers_backend.data.tokens import DocumentEncoder


@pytest.fixture(scope="module")
def byt5() -> ByT5Tokenizer:
    return load_byt5()


@pytest.fixture
def build():
    return build_batches


# --- tokenizers ---------------------------------------------------------------------------------------------------


def word_tokenizer(*, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


@pytest.mark.parametrize(
    "text",
    ["plain", "  lead and trail \n", "é ∑ 語 🙂 \x00\x7f\r\n\t", "<", "</S> < /s>", "a</s>b", " a <pad> b", "<unk>",
     "<extra_id_0> <extra_id_124> <extra_id_125>"],
)  # fmt: skip
def test_bytes_are_encoded_as_byt5_does(byt5, text):
    assert DocumentEncoder(byt5)(text).tolist() == byt5(text).input_ids


def test_every_character_is_encoded_as_byt5_does(byt5):
    text = "".join(map(chr, [*range(0x800), *range(0x2000, 0x2100), 0xFFFF, 0x10000, 0x10FFFF]))
    assert DocumentEncoder(byt5)(text).tolist() == byt5(text).input_ids


def test_byt5_text_that_spells_the_end_token_has_one_end(byt5):
    assert DocumentEncoder(byt5)("x</s>").tolist() == [ord("x") + OFFSET, EOS]


def test_byt5_with_a_token_of_the_users(byt5):
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["foo"])
    assert DocumentEncoder(tokenizer)("xfoo").tolist() == [ord("x") + OFFSET, 384, EOS]


@pytest.mark.parametrize(
    ("template", "special", "text", "expected"),
    [
        (None, {"eos_token": "</s>"}, "a b", [3, 4, 2]),  # the tokenizer adds nothing
        ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, "a b", [1, 3, 4, 2]),  # it adds both
        ("<s> $A", {"bos_token": "<s>", "eos_token": "</s>"}, "a b", [1, 3, 4, 2]),  # it adds the beginning
        ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, "<s> a </s>", [1, 3, 2]),  # the text has them too
        ("</s> $A", {"bos_token": "</s>", "eos_token": "</s>"}, "a", [2, 3, 2]),  # one token for both, as OPT's
        (None, {}, "a b c", [3, 4, 5]),  # there is no end token
    ],
)
def test_beginning_and_end_tokens_stand_once(template, special, text, expected):
    assert DocumentEncoder(word_tokenizer(template=template, **special))(text).tolist() == expected


def test_load_tokenizer_reads_a_folder(tmp_path, byt5):
    word_tokenizer(eos_token="</s>").save_pretrained(tmp_path / "words")
    byt5.save_pretrained(tmp_path / "bytes")
    assert data.load_tokenizer(str(tmp_path / "words"))("a c").input_ids == [3, 5]
    assert data.load_tokenizer(str(tmp_path / "bytes"))("a").input_ids == byt5("a").input_ids


def test_load_tokenizer_without_files(tmp_path):
    with pytest.raises(
        ValueError, match=r'".*" \(model.hf_assets_path, or without it hf_tr.*: no tokenizer could be loaded.*"byt5"'
    ):
        data.load_tokenizer(str(tmp_path))


def test_load_tokenizer_refuses_the_empty_one_of_a_model_config(tmp_path):
    Qwen3Config().save_pretrained(tmp_path)  # for which Transformers makes a tokenizer of one token
    with pytest.raises(ValueError, match=r'".*" \(model.hf_assets_path, .*: its tokenizer has no vocabulary'):
        data.load_tokenizer(str(tmp_path))


# --- packing ------------------------------------------------------------------------------------------------------


def test_documents_are_packed_in_order_with_one_end_token_each(tmp_path, build):
    path = write_text_files(tmp_path / "texts", ["abcdefghij", "", "kl", "é"])
    batches = list(build(path, repeat=False))
    expected = [byte + OFFSET for byte in b"abcdefghij"] + [EOS] + [ord("k") + OFFSET, ord("l") + OFFSET, EOS]
    expected += [byte + OFFSET for byte in "é".encode()] + [EOS]
    assert tokens_of(batches) == expected
    assert all(batch["input_ids"].shape == batch["labels"].shape == (2, 8) for batch in batches)
    assert all(tensor.dtype == torch.int64 for batch in batches for tensor in batch.values())


def test_labels_are_the_inputs_and_ignored_where_filled(tmp_path, build):
    batches = list(build(write_text_files(tmp_path / "texts", ["x" * 20]), repeat=False))
    inputs = torch.cat([batch["input_ids"] for batch in batches]).flatten()
    labels = torch.cat([batch["labels"] for batch in batches]).flatten()
    assert len(batches) == 2
    assert (labels != IGNORED).sum() == 21
    assert torch.equal(inputs[:21], labels[:21])
    assert labels[21:].eq(IGNORED).all()
    assert inputs[21:].eq(0).all()  # 0 is ByT5's padding token
    labels.zero_()
    assert inputs[0] == ord("x") + OFFSET  # a copy, not a view


def test_documents_have_positions_of_their_own(tmp_path, build):
    path = write_text_files(tmp_path / "texts", ["abcd", "", "ef", "g" * 9])
    (batch,) = build(path, repeat=False, seq_len=6, batch_size=4, packing="documents")
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 0],
        [0, 1, 0, 1, 2, 3],  # a document that the block's end cuts goes on as one of its own
        [0, 1, 2, 3, 4, 5],  # (five letters, an end token; what fills the block would begin anew)
        [0, 1, 2, 3, 4, 5],
    ]
    assert batch["labels"].eq(IGNORED).tolist() == [
        [True, False, False, False, False, True],
        [True, False, True, False, False, False],
        [True] + [False] * 5,
        [True] * 6,
    ]
    targets = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][targets], batch["input_ids"][targets])
    plain = next(build(path, repeat=False, seq_len=6, batch_size=4))
    assert torch.equal(plain["input_ids"], batch["input_ids"])
    assert plain.keys() == {"input_ids", "labels"}


def test_labels_of_documents_are_kept():
    """Documents with labels (a chat) beside documents without, cut by a block's end, saved and loaded."""
    packer = Packer()
    packer.add(Document(np.arange(10, 15, dtype=np.uint16), np.array([IGNORED, IGNORED, 12, 13, IGNORED])))
    packer.add(Document(np.arange(20, 27, dtype=np.uint16)))
    packer.add(Document(np.arange(30, 36, dtype=np.int32), np.array([IGNORED, 31, 32, IGNORED, 34, 35])))
    first = packer.take(2, 7, slice(None), fill_token=0, positions=False)
    assert first["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21], [22, 23, 24, 25, 26, 30, 31]]
    assert first["labels"].tolist() == [[-100, -100, 12, 13, -100, 20, 21], [22, 23, 24, 25, 26, -100, 31]]
    other = Packer()
    other.load(json.loads(json.dumps(packer.state())))
    assert other.tokens == packer.tokens == 4
    for kept in (packer, other):
        rest = kept.take(1, 7, slice(None), fill_token=9, positions=True)
        assert rest["input_ids"].tolist() == [[32, 33, 34, 35, 9, 9, 9]]
        assert rest["labels"].tolist() == [[-100, -100, 34, 35, -100, -100, -100]]
        assert rest["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_filling_uses_the_end_token_where_there_is_no_padding_token(tmp_path, build):
    tokenizer = word_tokenizer(eos_token="</s>")
    (batch,) = build(write_text_files(tmp_path / "texts", ["a b"]), tokenizer=tokenizer, repeat=False)
    assert batch["input_ids"].tolist() == [[3, 4] + [2] * 6, [2] * 8]
    assert batch["labels"].tolist() == [[3, 4, 2] + [IGNORED] * 5, [IGNORED] * 8]


def test_epochs_go_on_without_a_gap_and_are_reshuffled(tmp_path, build):
    names = [f"doc{number:02d}" for number in range(16)]  # 16 * 6 = 96 tokens = 6 batches an epoch
    batches = build(write_text_files(tmp_path / "texts", names))
    first, second = (documents_of(tokens_of(islice(batches, 6))) for _ in range(2))
    assert sorted(first) == sorted(second) == names
    assert first != second
    assert names not in (first, second)


def test_seed_decides_the_order(tmp_path, build):
    path = write_text_files(tmp_path / "texts", [f"doc{number:02d}" for number in range(16)])
    first, again, other = (tokens_of(islice(build(path, seed=seed), 6)) for seed in (1, 1, 2))
    assert first == again != other
    assert documents_of(tokens_of(build(path, seed=1, repeat=False))) == sorted(documents_of(first))


def test_reset_starts_over(tmp_path, build):
    batches = build(write_text_files(tmp_path / "texts", ["abcdefgh", "ijklmnop", "qrst"]), repeat=False)
    first = list(batches)
    assert len(first) == 2
    assert list(batches) == []
    batches.reset()
    assert all(map(same, first, batches))


# --- data ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_documents_of_their_own(tmp_path, build, world_size):
    names = [f"doc{number:02d}" for number in range(12)]  # 12 * 6 tokens
    path = write_text_files(tmp_path / "texts", names)
    parts = []
    for rank in range(world_size):
        batches = build(path, seq_len=6, batch_size=12 // world_size, data_rank=rank, data_world_size=world_size)
        parts.append(documents_of(tokens_of([next(batches)])))
    assert sorted(name for part in parts for name in part) == names
    assert all(len(part) == len(names) // world_size for part in parts)


@pytest.mark.parametrize("length", [1, 15, 16, 31, 32, 33, 95, 96, 97])
def test_without_repeat_ranks_end_together_and_lose_nothing(tmp_path, build, length):
    path = write_text_files(tmp_path / "texts", ["".join(chr(48 + number % 60) for number in range(length))])
    world_size, seq_len = 3, 8
    ranks = [list(build(path, repeat=False, data_rank=rank, data_world_size=world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {tuple(batch["labels"].shape) for batches in ranks for batch in batches} == {(2, seq_len)}
    rows = [torch.cat([batch["labels"] for batch in batches]) for batches in ranks]  # (blocks, seq_len) of each rank
    blocks = torch.stack(rows, dim=1).flatten()  # rank r has blocks r, r + 3, ...
    assert blocks[blocks != IGNORED].tolist() == [OFFSET + 48 + n % 60 for n in range(length)] + [EOS]
    assert len(ranks[0]) == -(-(length + 1) // (2 * seq_len * world_size))


# --- sources ------------------------------------------------------------------------------------------------------


def test_standard_library_and_text_need_no_datasets_package(tmp_path, build, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    batch = next(build(seq_len=32_768))
    text = "".join(chr(token - OFFSET) for token in batch["input_ids"][0].tolist() if OFFSET <= token < OFFSET + 128)
    assert "def " in text
    assert tokens_of(build(write_text_files(tmp_path / "texts", ["a"]), repeat=False)) == [ord("a") + OFFSET, EOS]
    with pytest.raises(ImportError, match=r'dataset_path = ".*jsonl": .*pip install datasets'):
        build(write_json_lines(tmp_path / "x.jsonl", [{"text": "a"}]))
    with pytest.raises(ImportError, match=r'dataset = "some/corpus": .*pip install datasets'):
        build(dataset="some/corpus")


def test_standard_library_skips_site_packages_and_undecodable_files(tmp_path, build, monkeypatch):
    for name, content in {
        "b.py": b"bbb",
        "a/z.py": b"zz",
        "a.txt": b"no",
        "c.py": b"\xff",
        "site-packages/x.py": b"x",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(files.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    batches = build(repeat=False)
    assert documents_of(tokens_of(batches)) == ["zz", "bbb"]
    assert (
        batches.state_dict()["fingerprint"]["sources"][""]["documents"] == 3
    )  # c.py is known as a file, and read as nothing


def test_standard_library_holds_out_files_for_validation(tmp_path, build, monkeypatch):
    texts = [chr(ord("a") + number) * 9 for number in range(25)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02d}.py").write_text(text)
    monkeypatch.setattr(files.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    validation = documents_of(tokens_of(build(repeat=False, dataset_split="validation")))
    train = documents_of(tokens_of(build(repeat=False)))
    assert validation == [texts[19]]
    assert sorted([*validation, *train]) == sorted(texts)
    with pytest.raises(ValueError, match='dataset_split = "test": dataset = "python_stdlib" has the splits'):
        build(dataset_split="test")


def test_single_text_file_is_one_document(tmp_path, build):
    (tmp_path / "book.txt").write_bytes(b"line\r\nline\n")
    tokens = tokens_of(build(tmp_path / "book.txt", repeat=False))
    assert bytes(token - OFFSET for token in tokens[:-1]) == b"line\r\nline\n"
    assert tokens[-1] == EOS


def test_a_long_text_file_is_cut_at_line_ends_and_shared_by_ranks(tmp_path, build, monkeypatch):
    monkeypatch.setattr(files, "TEXT_PIECE", 16)
    text = "".join(f"line {number} é\n" for number in range(40)) + "no end" + "x" * 50
    (tmp_path / "book.txt").write_bytes(text.encode())
    tokens = tokens_of(build(tmp_path / "book.txt", repeat=False))
    assert tokens.count(EOS) > 10
    assert bytes(token - OFFSET for token in tokens if token != EOS).decode() == text
    for rank in range(2):
        assert next(build(tmp_path / "book.txt", data_rank=rank, data_world_size=2))["input_ids"].shape == (2, 8)


def write_records(path: Path, texts: list[str]) -> Path:
    from datasets import Dataset

    records = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        write_json_lines(path, records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".parquet":
        Dataset.from_list(records).to_parquet(path)
    else:  # the folder that Dataset.save_to_disk makes, with an .arrow file and two .json files
        Dataset.from_list(records).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "saved"])
def test_record_files(tmp_path, build, cache, name):
    path = write_records(tmp_path / name, ["first", "second, with comma", "third"])
    assert documents_of(tokens_of(build(path, repeat=False))) == ["first", "second, with comma", "third"]
    assert_resumes(lambda: build(path), steps=6)


def test_folder_of_record_files(tmp_path, build, cache):
    for name in ("b", "a"):
        write_json_lines(tmp_path / "data" / f"{name}.jsonl", [{"body": f"{name}{number}"} for number in range(3)])
    (tmp_path / "data" / "README.md").write_text("not data")
    (tmp_path / "data" / "empty.jsonl").touch()
    write_json_lines(tmp_path / "data" / ".trash" / "old.jsonl", [{"body": "old"}])
    batches = build(tmp_path / "data", repeat=False, text_column="body")
    assert documents_of(tokens_of(batches)) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_slice_of_record_files(tmp_path, build, cache):
    path = write_json_lines(tmp_path / "x.jsonl", [{"text": f"t{number}"} for number in range(10)])
    kept = tokens_of(build(path, repeat=False, dataset_split="validation[:20%]"))
    assert documents_of(kept) == ["t0", "t1"]


# --- errors -------------------------------------------------------------------------------------------------------


def test_tokenizer_larger_than_the_vocabulary(build):
    with pytest.raises(
        ValueError, match=r"the tokenizer has 384 tokens.* 383.*hf_transformers.model, or set vocab_size = 384"
    ):
        build(vocabulary_size=383)


def test_missing_text_column(tmp_path, build, cache):
    path = write_json_lines(tmp_path / "x.jsonl", [{"body": "a", "title": "b"}])
    with pytest.raises(ValueError, match=r'text_column = "text": must be a column of .*which has body, title'):
        build(path)
    with pytest.raises(ValueError, match=r'text_column = "text": must be a column of .*which has body, title'):
        build(dataset=str(path))


@pytest.mark.parametrize(("value", "kind"), [(5, "int"), (None, "NoneType"), (["a"], "list")])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_record_that_cannot_be_tokenized(tmp_path, build, cache, value, kind, num_workers):
    filler = {int: 4, list: ["b"]}.get(type(value), "x" * 9)
    write_json_lines(tmp_path / "data" / "a.jsonl", [{"text": filler}])
    write_json_lines(tmp_path / "data" / "b.jsonl", [{"text": filler}, {"text": value}])
    bad = r"b.jsonl, row 1" if value is None else r"a.jsonl, row 0"
    message = rf'data": file .*{bad} cannot be tokenized: text_column "text" = .* of type {kind}: must be a string'
    with pytest.raises(ValueError, match=message) as caught:
        list(build(tmp_path / "data", repeat=False, num_workers=num_workers))
    assert "Traceback" not in str(caught.value)
    with pytest.raises(ValueError, match=r"row \d of dataset_split"):
        list(build(tmp_path / "data", repeat=False, dataset_split="train[:3]", num_workers=num_workers))


def test_text_that_the_tokenizer_refuses(tmp_path, build, monkeypatch):
    def refuse(self, text):
        if "bad" in text:
            raise TypeError("TextEncodeInput must be Union[...]")
        return encode(self, text)

    encode = DocumentEncoder.__call__
    monkeypatch.setattr(DocumentEncoder, "__call__", refuse)
    path = write_text_files(tmp_path / "texts", ["good", "bad"])
    with pytest.raises(ValueError, match=r"texts\": file .*001.txt cannot be tokenized: TypeError: TextEncodeInput"):
        list(build(path, repeat=False))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_vanishes_or_changes_during_the_run(tmp_path, build, num_workers):
    path = write_text_files(tmp_path / "texts", ["x" * 9, "y" * 9])
    batches = build(path, seq_len=9, batch_size=1, num_workers=num_workers)
    rewrite(path / "001.txt", "y")
    with pytest.raises(ValueError, match=r"001.txt had 9 bytes when the run began and has 1 now: data must not change"):
        list(islice(batches, 100_000))
    batches = build(path, seq_len=2, batch_size=1, num_workers=num_workers)
    (path / "000.txt").unlink()
    with pytest.raises(ValueError, match=r"000.txt was there when the run began, with 9 bytes, and cannot be read now"):
        list(islice(batches, 100_000))
    batches.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_of_records_that_vanishes_or_changes_during_the_run(tmp_path, build, cache, num_workers):
    """Its records can still be read, from a copy, but no resume could."""
    for number in range(3):
        write_json_lines(tmp_path / "data" / f"{number}.jsonl", [{"text": "some text"}] * 9)
    batches = build(tmp_path / "data", num_workers=num_workers)
    file = tmp_path / "data" / "1.jsonl"
    content = file.read_text()
    rewrite(file, content[:-40])
    with pytest.raises(ValueError, match=r"1.jsonl had 198 bytes when the run began and has 158 now: data must not"):
        list(islice(batches, 100_000))
    batches.close()
    rewrite(file, content)
    batches = build(tmp_path / "data", num_workers=num_workers)
    file.unlink()
    with pytest.raises(ValueError, match=r"1.jsonl was there when the run began, with 198 bytes, and cannot be read"):
        list(islice(batches, 100_000))
    batches.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "all its files are empty"),
        ("[]", "must hold at least one record in valid json form"),
        ('{"text": "a"', "must hold at least one record in valid json form"),
    ],
)
def test_file_without_records(tmp_path, build, cache, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf'dataset_path = ".*x.json".*{message}'):
        build(tmp_path / "x.json")


def test_documents_without_text(tmp_path, build, cache):
    path = write_json_lines(tmp_path / "x.jsonl", [{"text": ""}] * 3)
    with pytest.raises(ValueError, match=r"gets 0 tokens of text in an epoch, and needs at least 8"):
        build(path)
    with pytest.raises(ValueError, match=r"gets 0 tokens of text in an epoch, and needs at least 1"):
        build(path, repeat=False)


def test_less_than_a_block_for_each_rank(tmp_path, build):
    path = write_text_files(tmp_path / "texts", ["ab", "cd"])
    message = r'texts": data rank 1 of 2 gets 3 tokens .* at least 8 \(seq_len = 8\).*fewer data ranks'
    with pytest.raises(ValueError, match=message):
        build(path, data_rank=1, data_world_size=2)
    with pytest.raises(ValueError, match=r"data rank 2 of 3 gets 0 tokens"):
        build(path, data_rank=2, data_world_size=3)
    assert len(tokens_of(build(path, repeat=False, data_rank=0, data_world_size=2))) == 6  # filled instead


def test_unusable_paths(tmp_path, build):
    (tmp_path / "x.docx").write_text("a")
    with pytest.raises(ValueError, match=r"unknown file type '.docx': must be one of .txt, .jsonl"):
        build(tmp_path / "x.docx")
    with pytest.raises(ValueError, match=r"holds no file of a known type"):
        build(tmp_path)
    with pytest.raises(ValueError, match=r"absent\": no such file or folder"):
        build(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.csv").write_text("a")
    with pytest.raises(ValueError, match=r"several kinds \(b.csv, a.txt\)"):
        build(tmp_path)
    with pytest.raises(ValueError, match=r'dataset_split = "train\[:10%\]": .* plain text'):
        build(tmp_path / "a.txt", dataset_split="train[:10%]")
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several splits in folders. Give one of them"):
        build(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path, build):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfab")
    assert tokens_of(build(tmp_path / "x.txt", repeat=False)) == [ord("a") + OFFSET, ord("b") + OFFSET, EOS]


def test_a_dataset_that_is_a_path_and_a_path_from_home(tmp_path, build, monkeypatch):
    expected = tokens_of(build(write_text_files(tmp_path / "texts", ["abc"]), repeat=False))
    assert tokens_of(build(dataset=str(tmp_path / "texts"), repeat=False)) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tokens_of(build(dataset_path="~/texts", repeat=False)) == expected
    assert tokens_of(build(dataset="~/texts", repeat=False)) == expected


def test_text_file_that_is_not_utf8(tmp_path, build):
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"x.txt is not UTF-8 text"):
        build(tmp_path / "x.txt")
