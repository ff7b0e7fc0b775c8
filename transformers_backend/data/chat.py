"""Conversations, through the tokenizer's chat template, with loss on the assistant's turns only.

A template says which of its text the assistant wrote by `{% generation %}` ... `{% endgeneration %}` around it. Most
templates of the hub lack these marks, and Transformers then returns a mask of zeros: a training without any target.
So such a template is refused before the run starts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from transformers_backend.data.sources import Document, Encoder
from transformers_backend.loss import IGNORE_INDEX

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
_REMEDY = "Give a template of your own, a file, in chat_template"


def chat_encoder(tokenizer: PreTrainedTokenizerBase, column: str, template_file: str | None = None) -> Encoder:
    """The encoder of records whose `column` is a list of messages {"role", "content"}, or which are such lists.

    Labels are the tokens inside the template's `{% generation %}` marks and -100 elsewhere. A record's `tools`, where
    there are some, go to the template. template_file: a jinja template in place of the tokenizer's own. Raises
    ValueError for a template that is missing or cannot mark the assistant's turns.
    """
    template = _template(tokenizer, template_file)
    name = "the tokenizer's chat template" if template_file is None else f'chat_template = "{template_file}"'
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__}: it does not tell which text a token stands for, so the loss cannot be kept "
            "to the assistant's turns. Use a fast tokenizer (one with a tokenizer.json)."
        )
    if not _MARK.search(template):
        raise ValueError(
            f"{name} does not mark the assistant's turns, so there would be nothing to learn. Put {{% generation %}} "
            "before what the assistant writes, its end token included, and {% endgeneration %} after it. "
            f"{_REMEDY}."
        )
    encode = ChatEncoder(tokenizer, column, template)
    try:
        encode(_PROBE)
    except ValueError as error:
        raise ValueError(f"{name} fails on a question with an answer: {error}. Correct it. {_REMEDY}.") from error
    return encode


def _template(tokenizer: PreTrainedTokenizerBase, template_file: str | None) -> str:
    if template_file is not None:
        try:
            return Path(template_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f'chat_template = "{template_file}": must be a text file with a jinja template, and could not '
                f"be read ({error}). Correct the path."
            ) from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{type(tokenizer).__name__}: the tokenizer has no chat template, so messages cannot become text. "
            f"{_REMEDY}, or name a chat model's tokenizer in model.hf_assets_path."
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several named ones, none of them "default"
        raise ValueError(f"the tokenizer's chat template cannot be chosen: {error} {_REMEDY}.") from error


@dataclass(frozen=True)
class ChatEncoder:
    """What `chat_encoder` returns."""

    tokenizer: PreTrainedTokenizerBase
    column: str
    template: str

    @property
    def template_digest(self) -> str:
        """Tells whether another run makes the same text of a conversation."""
        return hashlib.sha256(self.template.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def __call__(self, record: Any) -> Document:
        tools = None
        if isinstance(record, Mapping):
            if self.column not in record:
                raise ValueError(f'there is no "{self.column}", only {", ".join(record)}. Set messages_column to one')
            record, tools = record[self.column], record.get("tools")
        messages = _messages(record, self.column)
        text, spans = self._render(messages, tools)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        tokens = np.asarray(encoded.input_ids, dtype=np.int64)
        by_assistant = _tokens_inside(np.asarray(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2), spans)
        if not by_assistant.any():
            raise ValueError(
                f"{self.column} has no assistant's turn with text in it, so there is nothing to learn from it. Remove "
                "the record"
            )
        return Document(tokens, np.where(by_assistant, tokens, IGNORE_INDEX))

    def _render(self, messages: list[dict], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, and where in it the assistant writes."""
        # One level below tokenizer.apply_chat_template: where the last character of a turn belongs to no token (white
        # space, with some tokenizers), that takes everything up to the conversation's end for the assistant's.
        try:
            (text,), (spans,) = render_jinja_template(
                conversations=[messages],
                tools=list(tools) if tools else None,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:  # what the template itself raises; what it cannot handle
            raise ValueError(f"the chat template refuses its {self.column} ({error}). Correct the record") from error
        return text, spans


def _messages(value: Any, column: str) -> list[dict]:
    """Messages without their empty fields, which a table gives to all if one has them."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not value or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value):
        shown = repr(value)[:100]
        raise ValueError(
            f'{column} is {shown}: must be a list of messages, each {{"role": ..., "content": ...}}. Correct or remove '
            "the record"
        )
    return [{key: field for key, field in message.items() if field is not None} for message in value]


def _tokens_inside(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens, from character offsets (tokens, 2), have text of one of the spans [start, end): bool (tokens,).

    A token of white space may have an empty offset at its end, where a tokenizer trims them.
    """
    first, last = offsets[:, 0], offsets[:, 1]
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (first < end) & (last > start)
        inside |= (first == last) & (first > start) & (first <= end)
    return inside
