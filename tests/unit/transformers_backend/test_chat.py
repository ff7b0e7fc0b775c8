"""Conversations: loss on what the assistant writes and nothing else, and templates that cannot tell are refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from transformers_backend.data.chat import chat_encoder

MARKED = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "Zwei  Meter\n"},
    {"role": "user", "content": "Really 日本?"},
    {"role": "assistant", "content": "yes 日本"},
]


def make_tokenizer(template: str | None, *, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as large models have them, with a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(["Zwei Meter yes really brief"] * 5, trainer)
    if trim_offsets:
        from tokenizers import processors

        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(MARKED)


def test_loss_is_on_what_the_assistant_writes(tokenizer: PreTrainedTokenizerFast):
    document = chat_encoder(tokenizer, "messages")({"messages": TALK, "id": 3})
    text = (
        "<s><|system|>Be brief.<|end|>\n<|user|>Größe?<|end|>\n<|assistant|>Zwei  Meter\n<|end|>\n"
        "<|user|>Really 日本?<|end|>\n<|assistant|>yes 日本<|end|>\n"
    )
    assert tokenizer.decode(document.tokens) == text
    learned = document.labels != -100
    assert np.array_equal(document.labels[learned], document.tokens[learned])
    begins = np.flatnonzero(np.diff(learned, prepend=False).astype(bool))
    turns = [tokenizer.decode(turn) for turn in np.split(document.tokens, begins)[1::2]]
    assert turns == ["Zwei  Meter\n<|end|>", "yes 日本<|end|>"]


def test_the_mask_is_transformers_own_where_that_is_right(tokenizer: PreTrainedTokenizerFast):
    encoded = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
    document = chat_encoder(tokenizer, "messages")({"messages": TALK})
    assert document.tokens.tolist() == encoded["input_ids"]
    assert (document.labels != -100).astype(int).tolist() == encoded["assistant_masks"]


def test_white_space_at_a_turns_end_does_not_open_the_rest_to_the_loss():
    """With trimmed offsets the last character belongs to no token, which Transformers takes for the text's end."""
    template = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    talk = [{"role": "assistant", "content": "yes "}, {"role": "user", "content": "secret"}]
    tokenizer = make_tokenizer(template, trim_offsets=True)
    encoded = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
    document = chat_encoder(tokenizer, "messages")({"messages": talk})
    assert "secret" in tokenizer.decode(np.array(encoded["input_ids"])[np.array(encoded["assistant_masks"]) == 1])
    assert tokenizer.decode(document.tokens[document.labels != -100]) == "yes "


def test_a_bare_list_of_messages_and_a_pickled_encoder(tokenizer: PreTrainedTokenizerFast):
    encode = pickle.loads(pickle.dumps(chat_encoder(tokenizer, "talk")))
    expected = encode({"talk": TALK})
    assert np.array_equal(encode(TALK).labels, expected.labels)
    with_empty_fields = [{**message, "tool_calls": None} for message in TALK]
    assert np.array_equal(encode({"talk": with_empty_fields, "tools": None}).tokens, expected.tokens)


def test_tools_reach_the_template():
    tokenizer = make_tokenizer("{% for tool in tools or [] %}{{ tool.name }} {% endfor %}" + MARKED)
    document = chat_encoder(tokenizer, "messages")({"messages": TALK, "tools": [{"name": "search"}]})
    assert tokenizer.decode(document.tokens).startswith("search <s>")


def test_a_template_of_ones_own(tmp_path: Path):
    (tmp_path / "template.jinja").write_text(MARKED.replace("<|end|>", "!"))
    tokenizer = make_tokenizer(UNMARKED)
    document = chat_encoder(tokenizer, "messages", str(tmp_path / "template.jinja"))({"messages": TALK})
    assert tokenizer.decode(document.tokens[document.labels != -100]) == "Zwei  Meter\n!yes 日本!"
    assert tokenizer.chat_template == UNMARKED, "the tokenizer is exported as it was"


# --- what is refused before the run


def test_a_template_without_marks_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="the tokenizer's chat template does not mark the assistant's turns") as caught:
        chat_encoder(make_tokenizer(UNMARKED), "messages")
    assert "Put {% generation %} before what the assistant writes" in str(caught.value)
    assert "{% endgeneration %} after it" in str(caught.value)
    assert "chat_template" in str(caught.value)


def test_marks_around_the_wrong_turns_are_refused():
    template = MARKED.replace("== 'assistant'", "== 'critic'")
    with pytest.raises(ValueError, match="chat template fails on a question with an answer: messages has no assistant"):
        chat_encoder(make_tokenizer(template), "messages")


def test_no_template_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"has no chat template.*in chat_template, or name a chat model's"):
        chat_encoder(make_tokenizer(None), "messages")


def test_a_broken_template_is_told():
    with pytest.raises(ValueError, match="fails on a question with an answer: the chat template refuses its messages"):
        chat_encoder(make_tokenizer("{% if %}" + MARKED), "messages")


def test_a_template_file_that_is_not_there(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    with pytest.raises(ValueError, match=r'chat_template = ".*none.jinja": must be a text file'):
        chat_encoder(tokenizer, "messages", str(tmp_path / "none.jinja"))


def test_a_tokenizer_that_knows_no_places_is_refused():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = MARKED
    with pytest.raises(ValueError, match="ByT5Tokenizer: it does not tell which text a token stands for"):
        chat_encoder(tokenizer, "messages")


# --- what is told of a record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": TALK[:2]}, "messages has no assistant's turn with text in it"),
        ({"messages": []}, r"messages is \[\]: must be a list of messages"),
        ({"messages": "hello"}, "messages is 'hello': must be a list of messages"),
        (
            {"messages": [{"content": "no role"}]},
            r"must be a list of messages, each \{\"role\": ..., \"content\": ...\}",
        ),
        ({"talk": TALK, "id": 1}, r'there is no "messages", only talk, id\. Set messages_column'),
    ],
)
def test_records_that_are_no_conversation(tokenizer: PreTrainedTokenizerFast, record: dict, message: str):
    with pytest.raises(ValueError, match=message):
        chat_encoder(tokenizer, "messages")(record)


def test_what_a_template_refuses_is_told():
    template = "{% if messages|length > 2 %}{{ raise_exception('at most one turn') }}{% endif %}" + MARKED
    with pytest.raises(ValueError, match=r"the chat template refuses its messages \(at most one turn\)"):
        chat_encoder(make_tokenizer(template), "messages")({"messages": TALK})
