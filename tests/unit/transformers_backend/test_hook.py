"""A user's own function as data: found by its name, read by number, and told by its name when something is wrong."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from transformers_backend.data.hook import hook_encoder, is_hook, open_hook
from transformers_backend.data.sources import Collection, Document
from transformers_backend.data.tokenized import tokenized_encoder

CODE = """
import pathlib
import numpy as np

class Numbers:
    fingerprint = "version 3"
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, number):
        return {"text": f"number {number}"}

class Endless:
    def __iter__(self):
        return iter(["again", "and", "again"])

def numbers(split):
    return Numbers({"train": 5, "validation": 2}[split])

def texts(split):
    return ["one", "two"]

def tokens(split):
    return [np.array([4, 5]), {"input_ids": [6]}]

def endless(split):
    return Endless()

class Unsized(Endless):
    __len__ = None
    def __getitem__(self, number):
        raise NotImplementedError

def unsized(split):
    return Unsized()

def generated(split):
    yield from ["made", "anew"]

def empty(split):
    return []

def nothing(split):
    return None

def a_string(split):
    return "text"

def odd(split):
    return ["fine", 3.5]

def grows(split):
    calls = pathlib.Path(__file__).with_suffix(".calls")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    return list(calls.read_text())

not_a_function = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "my_data.py").write_text(CODE)
    return str(tmp_path / "my_data.py")


def open_it(file: str, function: str, split: str = "train"):
    return open_hook(f"{file}:{function}", f'dataset = "my_data.py:{function}"', split)


def test_which_names_are_hooks():
    assert is_hook("my_module:make")
    assert is_hook("package.module:make")
    assert is_hook("folder/my_data.py:make")
    assert not any(map(is_hook, ("python_stdlib", "allenai/c4", "s3://bucket/text", "folder/my_data.py", "x:", ":f")))


def test_a_sequence_is_read_by_number(file: str):
    collection = open_it(file, "numbers")
    assert isinstance(collection, Collection)
    assert [collection.read(number) for number in (4, 0)] == [{"text": "number 4"}, {"text": "number 0"}]
    assert collection.count == 5
    assert collection.where(4) == 'record 4 of split "train"'
    assert open_it(file, "numbers", "validation").count == 2
    assert collection.fingerprint == {
        "dataset": f"{file}:numbers", "split": "train", "documents": 5, "fingerprint": "version 3",
    }  # fmt: skip


def test_a_module_is_imported(file: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(file).parent))
    assert open_hook("my_data:texts", "dataset").count == 2
    del sys.modules["my_data"]


def test_a_copy_for_another_process_calls_the_function_again(file: str):
    collection = open_it(file, "numbers")
    pickled = pickle.dumps(collection)
    assert len(pickled) < 1000, "no content"
    assert pickle.loads(pickled).read(3) == {"text": "number 3"}


def test_a_function_that_changes_its_mind_is_told(file: str):
    collection = open_it(file, "grows")
    with pytest.raises(ValueError, match=r"my_data.py:grows.*it returned other data than 1 documents"):
        pickle.loads(pickle.dumps(collection)).read(0)


def test_a_dataset_of_the_datasets_package(tmp_path: Path):
    pytest.importorskip("datasets")
    (tmp_path / "hf.py").write_text(
        "from datasets import Dataset\ndef make(split):\n    return Dataset.from_dict({'text': ['a', 'b', 'c']})\n"
    )
    collection = open_hook(f"{tmp_path}/hf.py:make", "dataset")
    assert [collection.read(number)["text"] for number in range(collection.count)] == ["a", "b", "c"]


def test_iterables_and_collections_are_given_back(file: str, tmp_path: Path):
    endless = open_it(file, "endless")
    assert list(endless) == list(endless) == ["again", "and", "again"]
    assert list(open_it(file, "unsized")) == ["again", "and", "again"]
    generated = open_it(file, "generated")
    assert list(generated) == list(generated) == list(pickle.loads(pickle.dumps(generated))) == ["made", "anew"]
    (tmp_path / "own.py").write_text(
        "from transformers_backend.data.sources import Collection\n"
        "def make(split):\n    return Collection('mine', str, 9, {'a': 1}, str)\n"
    )
    assert open_hook(f"{tmp_path}/own.py:make", "dataset") == Collection("mine", str, 9, {"a": 1}, str)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("empty", 'it returned no documents for split "train"'),
        ("nothing", "it returned a NoneType: must be a list, a datasets.Dataset, or another object with __len__"),
        ("a_string", "it returned a str: must be a list"),
        ("absent", "has no function absent; it has Numbers, Endless, numbers, texts, .*Correct the name"),
        ("not_a_function", "has no function not_a_function; it has"),
    ],
)
def test_functions_that_give_no_data(file: str, function: str, message: str):
    with pytest.raises(ValueError, match=rf'dataset = "my_data.py:{function}": .*{message}'):
        open_it(file, function)


def test_a_record_of_the_wrong_type_is_told_with_its_number(file: str):
    collection = open_it(file, "odd")
    assert collection.read(0) == "fine"
    with pytest.raises(ValueError, match=r'my_data.py:odd": record 1 of split "train" is of type float: must be'):
        collection.read(1)


def test_a_module_or_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no module no_such_module could be imported.*name the file"):
        open_hook("no_such_module:make", 'dataset = "no_such_module:make"')
    with pytest.raises(ValueError, match=r"no such file .*none.py"):
        open_hook(f"{tmp_path}/none.py:make", "dataset")
    with pytest.raises(ValueError, match=r'dataset: must be "module:function" or "path/to/file\.py:function"'):
        open_hook("no function", "dataset")


def _encode_text(text: str) -> Document:
    return Document(np.frombuffer(text.encode(), np.uint8))


def test_each_record_is_encoded_by_what_it_is(file: str):
    common = {"text": _encode_text, "tokenized": tokenized_encoder(50), "text_column": "text"}
    encode = pickle.loads(pickle.dumps(hook_encoder(**common, chat=None, messages_column=None)))
    assert encode("ab").tokens.tolist() == encode({"text": "ab", "id": 1}).tokens.tolist() == [97, 98]
    collection = open_it(file, "tokens")
    assert [encode(collection.read(number)).tokens.tolist() for number in (0, 1)] == [[4, 5], [6]]
    with pytest.raises(ValueError, match=r'the record has body: must have text in text_column = "text", or input_ids'):
        encode({"body": "a"})
    with pytest.raises(ValueError, match="input_ids holds 50"):
        encode([50])
    talk = hook_encoder(**common, chat=lambda record: _encode_text(record["talk"]), messages_column="talk")
    assert talk({"talk": "a"}).tokens.tolist() == [97]
