"""A folder of tokens that is read as memory: for corpora that are tokenized once, by `scripts/tokenize_corpus.py`.

    tokens.bin    every document's tokens, one after the other, uint16 or uint32, little-endian
    offsets.npy   where each document begins, and the end of the last: int64 (documents + 1,)
    meta.json     what the other two hold, and which tokenizer made them; written last

A document is read as a view of the mapped file: nothing is copied or tokenized, and the pages that several processes
read are in memory once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from transformers_backend.data.sources import Collection, Document, Encoder

META, TOKENS, OFFSETS = "meta.json", "tokens.bin", "offsets.npy"
VERSION = 1
_AGAIN = "Write it again with scripts/tokenize_corpus.py"


@dataclass(frozen=True)
class TokenFileMeta:
    """meta.json."""

    version: int
    dtype: str
    """"uint16" or "uint32", by the size of the vocabulary."""
    documents: int
    tokens: int
    tokenizer: str
    """The name or folder that it was loaded from, for messages."""
    vocabulary_size: int
    tokenizer_digest: str
    """Of all tokens with their numbers, see `tokenizer_digest`."""
    end_token: int | None
    """What stands at each document's end; None where the tokenizer has no such token."""
    complete: bool
    """True: it was written to its end."""


def is_token_file(path: str | Path) -> bool:
    """Whether `path` is such a folder, be it whole or not."""
    return any((Path(path).expanduser() / file).is_file() for file in (TOKENS, OFFSETS))


def open_token_file(
    path: str | Path, name: str, tokenizer: PreTrainedTokenizerBase | None = None, split: str = "train"
) -> tuple[Collection, Encoder]:
    """The documents of the folder at `path`; records are arrays of tokens, views of the file.

    name: for messages. tokenizer: the model's; another one than the file's is refused. split: any name, of which no
    slice can be taken. Raises ValueError for a folder that is unfinished, truncated or empty.
    """
    if "[" in split:
        raise ValueError(
            f'dataset_split = "{split}": {name} holds tokens, of which no slice can be taken. Tokenize each split into '
            "a folder of its own (scripts/tokenize_corpus.py --dataset_split)."
        )
    folder = Path(path).expanduser()
    meta = read_meta(folder, name)
    reader = TokenReader(folder, meta)
    reader.check()
    if tokenizer is not None and tokenizer_digest(tokenizer) != meta.tokenizer_digest:
        raise ValueError(
            f'{name}: was tokenized with "{meta.tokenizer}" ({meta.vocabulary_size} tokens), and the model\'s '
            f"tokenizer ({len(tokenizer)} tokens) is another one: its numbers mean other tokens. {_AGAIN} and "
            f'the model\'s tokenizer, or set model.hf_assets_path to "{meta.tokenizer}" if that is the right one.'
        )
    content = [meta.dtype, meta.documents, meta.tokens, meta.tokenizer_digest]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    fingerprint = {"dataset": folder.resolve().name, "files": digest}
    return Collection(name, reader, meta.documents, fingerprint, reader.where), as_document


def as_document(tokens: np.ndarray) -> Document:
    """The encoder of records that are tokens already."""
    return Document(tokens)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of every token with its number, and of the end token: what the numbers in a file mean."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps([pairs, tokenizer.eos_token_id]).encode()).hexdigest()


def read_meta(folder: Path, name: str) -> TokenFileMeta:
    file = folder / META
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        meta = TokenFileMeta(**fields)
    except FileNotFoundError as error:
        raise ValueError(f"{name}: {file} is missing, so its writing did not finish. {_AGAIN}.") from error
    except (ValueError, TypeError) as error:  # no JSON; other fields
        raise ValueError(f"{name}: {file} is damaged or of another version ({error}). {_AGAIN}.") from error
    if meta.version != VERSION or meta.dtype not in ("uint16", "uint32"):
        raise ValueError(
            f"{name}: {file} says version {meta.version} and dtype {meta.dtype}: must be version {VERSION} and uint16 "
            f"or uint32. {_AGAIN}."
        )
    if meta.complete is not True:
        raise ValueError(f"{name}: {file} says that its writing did not finish. {_AGAIN}.")
    if not meta.documents or not meta.tokens:
        raise ValueError(f"{name}: holds no documents. Point it to data that is not empty.")
    return meta


class TokenReader:
    """Document number -> its tokens, a view of the mapped file. Each process maps it when it first reads."""

    def __init__(self, folder: Path, meta: TokenFileMeta) -> None:
        self._folder = folder
        self._meta = meta
        self._bytes = meta.tokens * np.dtype(meta.dtype).itemsize
        self._tokens: np.ndarray | None = None
        self._offsets: np.ndarray | None = None
        self._descriptor = -1

    def __call__(self, number: int) -> np.ndarray:
        if self._tokens is None:
            self._map()
        # Reading a part of a mapped file that is no more there kills the process, without a message.
        if os.fstat(self._descriptor).st_size != self._bytes:
            self._check_size(os.fstat(self._descriptor).st_size)
        start, end = self._offsets[number], self._offsets[number + 1]
        if not 0 <= start <= end <= self._meta.tokens:
            raise ValueError(f"{self.where(number)}: {OFFSETS} is damaged ({start} to {end}). {_AGAIN}.")
        return self._tokens[start:end]

    def where(self, number: int) -> str:
        return f"file {self._folder / TOKENS}, document {number}"

    def check(self) -> None:
        """Compare the files with meta.json; ValueError if they are not what it says."""
        for file in (TOKENS, OFFSETS):
            if not (self._folder / file).is_file():
                raise ValueError(f"{self._folder / file} is missing, which {META} tells of. {_AGAIN}.")
        self._check_size((self._folder / TOKENS).stat().st_size)
        try:
            offsets = np.load(self._folder / OFFSETS, mmap_mode="r")
        except (ValueError, EOFError) as error:  # cut short, or no such file at all
            raise ValueError(f"{self._folder / OFFSETS} is truncated or damaged ({error}). {_AGAIN}.") from error
        expected = self._meta.documents + 1
        if offsets.shape != (expected,) or offsets[0] != 0 or offsets[-1] != self._meta.tokens:
            raise ValueError(
                f"{self._folder / OFFSETS} has shape {offsets.shape}, from {offsets[0]} to {offsets[-1]}: must be "
                f"({expected},), from 0 to {self._meta.tokens}. {_AGAIN}."
            )

    def _map(self) -> None:
        tokens = np.memmap(self._folder / TOKENS, dtype=f"<u{np.dtype(self._meta.dtype).itemsize}", mode="r")
        self._descriptor = os.open(self._folder / TOKENS, os.O_RDONLY)
        self._offsets = np.load(self._folder / OFFSETS, mmap_mode="r").view(np.ndarray)
        self._tokens = tokens.view(np.ndarray)  # a plain array: slices of a memmap are ten times slower

    def _check_size(self, size: int) -> None:
        if size != self._bytes:
            kind = "truncated" if size < self._bytes else "longer than it should be"
            raise ValueError(
                f"{self._folder / TOKENS} is {kind}: it has {size} bytes, and {META} says {self._bytes} "
                f"({self._meta.tokens} tokens of {self._meta.dtype}). {_AGAIN}, or copy it again."
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None, "_offsets": None, "_descriptor": -1}

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def write_token_file(
    folder: Path, documents: Iterable[tuple[np.ndarray, np.ndarray]], tokenizer: PreTrainedTokenizerBase, source: str
) -> TokenFileMeta:
    """Write the folder. documents: pairs of tokens and of the lengths of the documents in them, (tokens,) and (n,).

    source: what the tokenizer was loaded from. `folder` must be new; give it a temporary name and rename it after.
    """
    folder.mkdir(parents=True)
    vocabulary_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    dtype = "uint16" if vocabulary_size <= 2**16 else "uint32"
    lengths = []
    with (folder / TOKENS).open("wb") as file:
        for tokens, lengths_of_some in documents:
            assert tokens.size == 0 or (tokens.min() >= 0 and tokens.max() < vocabulary_size)
            assert tokens.size == lengths_of_some.sum()
            file.write(tokens.astype(f"<u{np.dtype(dtype).itemsize}").tobytes())
            lengths.append(lengths_of_some)
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum(dtype=np.int64)
    np.save(folder / OFFSETS, offsets.astype("<i8"))
    meta = TokenFileMeta(
        version=VERSION,
        dtype=dtype,
        documents=len(offsets) - 1,
        tokens=int(offsets[-1]),
        tokenizer=source,
        vocabulary_size=len(tokenizer),
        tokenizer_digest=tokenizer_digest(tokenizer),
        end_token=tokenizer.eos_token_id,
        complete=True,
    )
    (folder / META).write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
    return meta
