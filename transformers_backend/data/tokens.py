"""From text to tokens: load the tokenizer, and encode documents as it does, with one end token each."""

from __future__ import annotations

import os
import re

import numpy as np
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

TOKENIZER_KEYS = "model.hf_assets_path, or without it hf_transformers.model"
"""Where a job names its tokenizer, for messages."""


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a hub id or a local folder; "byt5" is the byte-level one, which needs no files.

    Raises ValueError where there is none. Transformers makes an empty tokenizer, which knows no word, for a folder
    with a model config only; that is refused too.
    """
    if name_or_path == "byt5":
        return ByT5Tokenizer()
    remedy = 'Name a hub id or a folder with tokenizer files, or use the built-in byte-level "byt5".'
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.expanduser(name_or_path), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, TypeError) as error:  # missing; not a tokenizer; a slow one without its vocabulary
        raise ValueError(
            f'"{name_or_path}" ({TOKENIZER_KEYS}): no tokenizer could be loaded from it. {remedy} '
            f"({type(error).__name__}: {error})"
        ) from error
    special = {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}
    if len(tokenizer.get_vocab().keys() - special) < 2:
        raise ValueError(
            f'"{name_or_path}" ({TOKENIZER_KEYS}): its tokenizer has no vocabulary, only special tokens; the '
            f"vocabulary file is missing. {remedy}"
        )
    return tokenizer


class DocumentEncoder:
    """From a document's text to its tokens (int32): those of the tokenizer, and one end token.

    Where the tokenizer has an end-of-sequence token, exactly one stands at the end, whether or not the tokenizer
    (or the text) puts one there; a beginning token stands there once if the tokenizer puts one. Special tokens that
    a text spells out ("</s>") become those tokens, as the tokenizer has it.

    ByT5's tokenizer works character by character in Python. A token is a byte's value plus its offset of 3, which
    is computed directly (some hundred times as fast); only texts that spell out an added token go through it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.is_byt5 = type(tokenizer) is ByT5Tokenizer
        self._added_tokens = re.compile("|".join(map(re.escape, tokenizer.added_tokens_encoder)))

    def __call__(self, text: str) -> np.ndarray:
        return self._encode(text) if not self.is_byt5 or self._added_tokens.search(text) else self._encode_bytes(text)

    def _encode(self, text: str) -> np.ndarray:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        # ByT5 warns about a text that ends in "</s>" when it adds special tokens, of which it has none but that.
        encoded = self._tokenizer(text, add_special_tokens=not self.is_byt5, return_attention_mask=False, verbose=False)
        tokens = encoded.input_ids
        if bos is not None and tokens[:2] == [bos, bos]:
            tokens = tokens[1:]
        while eos is not None and tokens and tokens[-1] == eos:
            tokens.pop()
        return np.asarray(tokens if eos is None else [*tokens, eos], dtype=np.int32)

    def _encode_bytes(self, text: str) -> np.ndarray:
        values = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        tokens = np.empty(len(values) + 1, dtype=np.int32)
        np.add(values, self._tokenizer.offset, out=tokens[:-1], dtype=np.int32)
        tokens[-1] = self._tokenizer.eos_token_id
        return tokens
