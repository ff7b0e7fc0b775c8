"""scripts/tokenize_corpus.py: the tokens of training on the text itself, a folder that is whole or not there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from transformers_backend.data import SourceKeys, build_batches, load_tokenizer
from transformers_backend.data.token_file import open_token_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "tokenize_corpus.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        specification = importlib.util.spec_from_file_location("tokenize_corpus", SCRIPT)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def write_records(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def documents_of(folder: Path) -> list[list[int]]:
    collection, encode = open_token_file(folder, "corpus")
    return [encode(collection.read(number)).tokens.tolist() for number in range(collection.count)]


def run(script: ModuleType, output: Path, *arguments: str) -> int:
    return script.main([*arguments, "--tokenizer", "byt5", "--output", str(output)])


def batches_of(path: str | Path) -> list[dict[str, torch.Tensor]]:
    batches = build_batches(
        {"": SourceKeys(dataset_path=str(path))}, tokenizer=load_tokenizer("byt5"), vocabulary_size=384, seq_len=16,
        batch_size=3, data_rank=1, data_world_size=2, seed=4, packing="documents", num_workers=0,
    )  # fmt: skip
    return [next(batches) for _ in range(12)]


def test_training_on_the_tokens_is_training_on_the_text(script: ModuleType, tmp_path: Path, capsys):
    texts = write_records(tmp_path / "x.jsonl", [{"text": f"document {n}, {'long ' * (n % 7)}"} for n in range(150)])
    assert run(script, tmp_path / "tokens", texts, "--num_workers", "2") == 0
    assert "150 documents, " in (said := capsys.readouterr().out)
    assert " tokens as uint16, " in said
    assert "tokens/s in " in said
    of_text, of_tokens = batches_of(texts), batches_of(tmp_path / "tokens")
    for one, other in zip(of_text, of_tokens, strict=True):
        assert one.keys() == other.keys() == {"input_ids", "labels", "position_ids"}
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(tmp_path.glob("*.tmp"))


def test_sources_and_documents_keep_their_order(script: ModuleType, tmp_path: Path):
    first = write_records(tmp_path / "b.jsonl", [{"body": "one"}, {"body": ""}, {"body": "two"}])
    second = write_records(tmp_path / "a.jsonl", [{"body": "three"}])
    assert run(script, tmp_path / "tokens", first, second, "--text_column", "body", "--num_workers", "1") == 0
    encode = load_tokenizer("byt5")
    assert documents_of(tmp_path / "tokens") == [encode(text).input_ids for text in ("one", "two", "three")]


def test_tokens_that_are_there_already_are_packed(script: ModuleType, tmp_path: Path, capsys):
    source = write_records(tmp_path / "x.jsonl", [{"input_ids": [5, 6, 1]}, {"input_ids": [7, 1]}])
    assert run(script, tmp_path / "tokens", source, "--num_workers", "1") == 0
    assert documents_of(tmp_path / "tokens") == [[5, 6, 1], [7, 1]]
    source = write_records(tmp_path / "y.jsonl", [{"input_ids": [5, 384]}])
    assert run(script, tmp_path / "more", source, "--num_workers", "1") == 1
    assert "row 0 cannot be tokenized: input_ids holds 384: must be in [0, 384)" in capsys.readouterr().err


def test_a_record_that_cannot_be_tokenized_is_told_with_file_and_row(script: ModuleType, tmp_path: Path, capsys):
    source = write_records(tmp_path / "x.jsonl", [{"text": "fine"}] * 70 + [{"text": None}])
    assert run(script, tmp_path / "tokens", source, "--num_workers", "2") == 1
    error = capsys.readouterr().err
    assert f"file {source}, row 70 cannot be tokenized: " in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "x.jsonl"], "nothing half-written"


def test_an_output_that_exists_is_left_alone(script: ModuleType, tmp_path: Path, capsys):
    source = write_records(tmp_path / "x.jsonl", [{"text": "fine"}])
    (tmp_path / "tokens").mkdir()
    assert run(script, tmp_path / "tokens", source) == 1
    assert f'--output "{tmp_path}/tokens": exists already. Name another folder' in capsys.readouterr().err
    assert not list((tmp_path / "tokens").iterdir())


def test_what_has_no_text_is_told(script: ModuleType, tmp_path: Path, capsys):
    source = write_records(tmp_path / "x.jsonl", [{"text": ""}])
    assert run(script, tmp_path / "tokens", source, "--num_workers", "1") == 1
    assert f'dataset_path = "{source}": all documents are empty' in capsys.readouterr().err
    assert run(script, tmp_path / "tokens", source, "--text_column", "body") == 1
    assert 'text_column = "body": must be a column of' in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name files or folders, or a hub id with --dataset"),
        (["x.txt", "--dataset", "c4"], "one of the two"),
        (["x.txt", "--num_workers", "0"], "--num_workers 0: must be at least 1"),
    ],
)
def test_what_is_asked_for_must_make_sense(
    script: ModuleType, tmp_path: Path, arguments: list[str], message: str, capsys
):
    with pytest.raises(SystemExit):
        run(script, tmp_path / "tokens", *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_stream_is_read_once_and_in_its_order(script: ModuleType, tmp_path: Path, num_workers: int):
    """As a hub data set is; on a machine with any number of cores the folder is the same."""
    (tmp_path / "hook.py").write_text(
        "import pathlib\n"
        "def make(split):\n"
        "    for number in range(200):\n"
        "        with pathlib.Path(__file__).with_suffix('.read').open('a') as file:\n"
        "            file.write('x')\n"
        "        yield str(number)\n"
    )
    options = ("--dataset", f"{tmp_path}/hook.py:make", "--num_workers", str(num_workers))
    assert run(script, tmp_path / "tokens", *options) == 0
    encode = load_tokenizer("byt5")
    assert documents_of(tmp_path / "tokens") == [encode(str(number)).input_ids for number in range(200)]
    assert len((tmp_path / "hook.read").read_text()) == 200


def test_a_record_of_a_stream_that_cannot_be_tokenized_is_told(script: ModuleType, tmp_path: Path, capsys):
    (tmp_path / "hook.py").write_text("def make(split):\n    yield 'fine'\n    yield {'body': 'a'}\n")
    options = ("--dataset", f"{tmp_path}/hook.py:make", "--num_workers", "1")
    assert run(script, tmp_path / "tokens", *options) == 1
    assert "record {'body': 'a'} cannot be tokenized: the record has body" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


def test_labels_that_a_folder_of_tokens_cannot_hold_are_refused(script: ModuleType, tmp_path: Path, capsys):
    masked = write_records(tmp_path / "x.jsonl", [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}])
    assert run(script, tmp_path / "tokens", masked, "--num_workers", "1") == 1
    error = capsys.readouterr().err
    assert f'dataset_path = "{masked}": has labels that are not its tokens' in error
    assert "Train on the records themselves" in error
    assert not (tmp_path / "tokens").exists()
    repeated = write_records(tmp_path / "y.jsonl", [{"input_ids": [5, 6], "labels": [5, 6]}])
    assert run(script, tmp_path / "tokens", repeated, "--num_workers", "1") == 0
    assert documents_of(tmp_path / "tokens") == [[5, 6]]


def test_it_runs_from_a_checkout(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    command = [sys.executable, SCRIPT, tmp_path / "a.txt", "--tokenizer", "byt5", "--output", tmp_path / "tokens"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "1 documents, 501 tokens as uint16" in ran.stdout
