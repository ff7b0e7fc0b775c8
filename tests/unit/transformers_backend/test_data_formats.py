"""Which key opens which format, and a whole run on each: the trainer, one process, two steps."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.jobs import tiny_job
from transformers_backend import JobConfig, Trainer
from transformers_backend.data import SourceKeys, build_batches, load_tokenizer
from transformers_backend.data.build import open_source
from transformers_backend.data.chat import chat_encoder
from transformers_backend.data.token_file import write_token_file

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {% generation %}{{ message.content }} {% endgeneration %}"
    "{% endfor %}"
)


pytestmark = pytest.mark.usefixtures("cache", "process")


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobConfig]:
    def make(**changes) -> JobConfig:
        changes = {"training__dataset_path": None, "training__steps": 2} | changes
        return tiny_job(tmp_path, "run", **changes)

    return make


def run(config: JobConfig) -> Trainer:
    trainer = Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer


def write_records(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_words_tokenizer(folder: Path, template: str | None) -> str:
    """Each word is a token."""
    words = ["<unk>", "<end>", "user", "assistant", "how", "many", "three", "four"]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>", chat_template=template)
    fast.save_pretrained(folder)
    return str(folder)


def first_document(**keys) -> tuple[list[int], list[int] | None]:
    source, encode = open_source(SourceKeys(**keys), load_tokenizer("byt5"), 384)
    document = encode(source.read(0))
    return document.tokens.tolist(), None if document.labels is None else document.labels.tolist()


# --- which key opens what


def test_input_ids_are_taken_where_there_is_no_text(tmp_path: Path):
    both = write_records(tmp_path / "both.jsonl", [{"text": "a", "input_ids": [9, 8]}])
    tokens = write_records(tmp_path / "x.jsonl", [{"input_ids": [9, 8], "labels": [-100, 8], "more": 1}])
    assert first_document(dataset_path=tokens) == ([9, 8], [-100, 8])
    assert first_document(dataset_path=both) == ([100, 1], None)
    assert first_document(dataset_path=both, text_column="none") == ([9, 8], None)


def test_a_folder_of_tokens_is_known_by_either_key(tmp_path: Path):
    write_token_file(tmp_path / "corpus", [(np.array([9, 8]), np.array([2]))], load_tokenizer("byt5"), "byt5")
    assert first_document(dataset_path=f"{tmp_path}/corpus") == ([9, 8], None)
    assert first_document(dataset=f"{tmp_path}/corpus") == ([9, 8], None)
    (tmp_path / "corpus" / "meta.json").unlink()
    with pytest.raises(ValueError, match=r'dataset_path = ".*/corpus": .*its writing did not finish'):
        first_document(dataset_path=f"{tmp_path}/corpus")


def test_a_column_of_messages_that_is_not_there_is_told(tmp_path: Path):
    path = write_records(tmp_path / "x.jsonl", [{"talk": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match=r'messages_column = "messages": must be a column of .*, which has talk'):
        first_document(dataset_path=path, messages_column="messages")


# --- whole runs


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_a_run_on_a_token_file(tmp_path: Path, job: Callable[..., JobConfig], packing: str, caplog):
    tokens = np.random.default_rng(0).integers(3, 250, 3000)
    lengths = np.full(300, 10)
    write_token_file(tmp_path / "corpus", [(tokens, lengths)], load_tokenizer("byt5"), "byt5")
    with caplog.at_level(logging.INFO):
        trainer = run(job(training__dataset_path=f"{tmp_path}/corpus", training__packing=packing))
    assert trainer.step == 2
    says = {
        "concat": 'training.packing = "concat": tokens attend to the documents before their own',
        "documents": 'training.packing = "documents": attention stays within each document, by positions',
    }
    assert says[packing] in caplog.text


def test_a_run_that_cannot_keep_documents_apart_says_so(tmp_path: Path, job: Callable[..., JobConfig], caplog):
    (tmp_path / "x.txt").write_text("a line of text\n" * 100)
    sizes = {"vocab_size": 384, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    config = job(
        training__dataset_path=f"{tmp_path}/x.txt", training__packing="documents", hf_transformers__model_type="bloom",
        hf_transformers__config_overrides=sizes,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert run(config).step == 2
    assert (
        'training.packing = "documents": attention crosses documents, or may: BloomForCausalLM takes no position_ids'
        in caplog.text
    )


def test_a_run_on_conversations(tmp_path: Path, job: Callable[..., JobConfig]):
    talk = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "three four three"}]
    path = write_records(tmp_path / "x.jsonl", [{"talk": talk}] * 60)
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %} {% endfor %}"
    )
    config = job(
        training__dataset_path=path, training__messages_column="talk", training__chat_template=str(template),
        training__packing="documents", model__hf_assets_path=write_words_tokenizer(tmp_path / "words", None),
        training__num_workers=1,
    )  # fmt: skip
    trainer = Trainer(config)
    try:
        batch = next(trainer.data)
        row, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        assert row[:8] == [2, 4, 5, 3, 6, 7, 6, 1]
        assert labels[:8] == [-100, -100, -100, -100, 6, 7, 6, 1]
        assert batch["position_ids"][0, :10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
        trainer.train()
        assert trainer.step == 2
    finally:
        trainer.close()


@pytest.mark.parametrize("kind", ["file", "function"])
def test_a_resume_with_another_template_is_refused(tmp_path: Path, kind: str):
    talk = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "three"}]
    dataset = {"dataset_path": write_records(tmp_path / "x.jsonl", [{"messages": talk}] * 9)}
    if kind == "function":
        (tmp_path / "mine.py").write_text(f"def make(split):\n    return [{{'messages': {talk!r}}}] * 9\n")
        dataset = {"dataset": f"{tmp_path}/mine.py:make"}
    tokenizer = load_tokenizer(write_words_tokenizer(tmp_path / "words", TEMPLATE))
    arguments = {
        "tokenizer": tokenizer, "vocabulary_size": len(tokenizer), "seq_len": 4, "batch_size": 1, "data_rank": 0,
        "data_world_size": 1, "seed": 7, "num_workers": 0,
    }  # fmt: skip
    own = SourceKeys(**dataset, messages_column="messages")
    state = build_batches({"": own}, **arguments).state_dict()
    build_batches({"": own}, **arguments).load_state_dict([state])
    (tmp_path / "more.jinja").write_text(TEMPLATE + "four")
    other = replace(own, chat_template=str(tmp_path / "more.jinja"))
    with pytest.raises(ValueError, match=r"other data: chat_template = '\w{16}' there and '\w{16}' here"):
        build_batches({"": other}, **arguments).load_state_dict([state])


def test_a_run_on_conversations_without_marks_is_refused(tmp_path: Path, job: Callable[..., JobConfig]):
    path = write_records(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "how"}]}])
    tokenizer = write_words_tokenizer(tmp_path / "words", "{% for m in messages %}{{ m.content }}{% endfor %}")
    config = job(
        training__dataset_path=path, training__messages_column="messages", model__hf_assets_path=tokenizer
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not mark the assistant's turns, so there would be nothing to learn"):
        Trainer(config)


def test_a_conversation_without_an_answer_is_told_with_its_row(tmp_path: Path, job: Callable[..., JobConfig]):
    good = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "three"}]
    path = write_records(tmp_path / "x.jsonl", [{"messages": good}, {"messages": good[:1]}])
    template = TEMPLATE.replace("{% generation %}", "{% if message.role == 'assistant' %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endif %}"
    )
    config = job(
        training__dataset_path=path, training__messages_column="messages",
        model__hf_assets_path=write_words_tokenizer(tmp_path / "words", template),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"x.jsonl, row 1 cannot be tokenized: messages has no assistant's turn"):
        run(config)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("function", ["texts", "records", "tokens", "endless"])
def test_a_run_on_a_function_of_ones_own(tmp_path: Path, job: Callable[..., JobConfig], function: str, workers: int):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "class Endless:\n"
        "    def __iter__(self):\n"
        "        return iter(['some text of mine'] * 200)\n"
        "def texts(split):\n    return [f'{split} {number}' for number in range(100)]\n"
        "def records(split):\n    return [{'text': 'mine', 'id': number} for number in range(100)]\n"
        "def tokens(split):\n    return [np.arange(5, 25) for _ in range(100)]\n"
        "def endless(split):\n    return Endless()\n"
    )
    config = job(training__dataset=f"{tmp_path}/mine.py:{function}", training__num_workers=workers)
    assert run(config).step == 2


def test_the_documents_example_of_a_function_trains(tmp_path: Path, job: Callable[..., JobConfig]):
    page = (Path(__file__).parents[3] / "docs" / "data_formats.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def make_dataset" in block)
    (tmp_path / "my_data.py").write_text(code)
    spec = f"{tmp_path}/my_data.py:make_dataset"
    source, _ = open_source(SourceKeys(dataset=spec, dataset_split="validation"), load_tokenizer("byt5"), 384)
    assert (source.count, source.read(7)) == (1_000_000, "1000 + 7 = 1007")
    assert run(job(training__dataset=spec)).step == 2


def test_the_documents_example_of_a_template_marks_the_assistant(tmp_path: Path):
    page = (Path(__file__).parents[3] / "docs" / "data_formats.md").read_text()
    (template,) = re.findall(r"```jinja\n(.*?)```", page, re.DOTALL)
    (tmp_path / "own.jinja").write_text(template)
    tokenizer = load_tokenizer(write_words_tokenizer(tmp_path / "words", None))
    talk = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "three"}]
    document = chat_encoder(tokenizer, "messages", str(tmp_path / "own.jinja"))({"messages": talk})
    marked = tokenizer.convert_ids_to_tokens(document.labels[document.labels != -100])
    assert marked[0] == "three"
    assert not {"user", "how", "many", "assistant"} & set(marked)


def test_a_function_that_returns_nothing_is_told(tmp_path: Path, job: Callable[..., JobConfig]):
    (tmp_path / "mine.py").write_text("def make(split):\n    pass\n")
    spec = f"{tmp_path}/mine.py:make"
    with pytest.raises(ValueError, match=rf'dataset = "{spec}": it returned a NoneType: must be a list'):
        Trainer(job(training__dataset=spec))


def test_a_chat_template_needs_conversations(job: Callable[..., JobConfig]):
    with pytest.raises(ValueError, match=r'training.chat_template = "none.jinja": has a meaning only') as caught:
        Trainer(job(training__chat_template="none.jinja"))
    assert 'training.chat_template = "none.jinja": no such file' in str(caught.value)
