"""A user's own data: a Python function that returns it, named as "module:function" or "path/to/file.py:function".

    def make_dataset(split):                        # training.dataset = "my_data.py:make_dataset"
        return ["a document", "another one"]        # anything with a length and numbers, an iterable or a generator

Its records may be strings, dicts (with the text, messages or input_ids in their columns) or arrays of tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from transformers_backend.data.registry import registered
from transformers_backend.data.sources import Collection, Document, Encoder

_SPEC = re.compile(r"(?P<module>[^:]+):(?P<function>[A-Za-z_]\w*)")
_KINDS = "a string, a dict or an array of token numbers"


def is_hook(dataset: str) -> bool:
    """Whether `training.dataset` names a function, or what `register_dataset` was told, rather than a data set."""
    return registered(dataset) is not None or _SPEC.fullmatch(dataset) is not None


def open_hook(spec: str, name: str, split: str = "train") -> Collection | Iterable[Any]:
    """Call the function with `split`; what has a length is a Collection, and other iterables are given back, as ones
    that start over with each `iter()`: for iterators (a generator, say) each of them calls the function again.

    spec: "module:function" or "file.py:function". name: for messages. A Collection's records are read by number in
    worker processes, each of which calls the function for itself if the data cannot be copied to it. Raises ValueError
    that names the spec.
    """
    data = _make(spec, name, split)
    if isinstance(data, Collection):
        return data
    if _is_sequence(data):
        if len(data) == 0:
            raise ValueError(f'{name}: it returned no documents for split "{split}". Return data that is not empty.')
        fingerprint = {"dataset": spec, "split": split, "documents": len(data)}
        if isinstance(data, _WithFingerprint) and isinstance(data.fingerprint, str | int | dict):
            fingerprint["fingerprint"] = data.fingerprint
        reader = _Reader(spec, name, split, data)
        return Collection(name, reader, len(data), fingerprint, reader.where)
    if isinstance(data, Iterator):
        return _NewIterators(spec, name, split, data)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        return data
    raise ValueError(
        f"{name}: it returned a {type(data).__name__}: must be a list, a datasets.Dataset, or another object with "
        "__len__ and __getitem__, or with __iter__."
    )


def hook_encoder(
    *, text: Encoder, tokenized: Encoder, chat: Encoder | None, text_column: str, messages_column: str | None
) -> Encoder:
    """The encoder that looks at each record: tokens, messages, or text. `text` gets strings."""
    return HookEncoder(text, tokenized, chat, text_column, messages_column)


@dataclass(frozen=True)
class HookEncoder:
    """What `hook_encoder` returns."""

    text: Encoder
    tokenized: Encoder
    chat: Encoder | None
    text_column: str
    messages_column: str | None

    def __call__(self, record: Any) -> Document:
        if isinstance(record, str):
            return self.text(record)
        if not isinstance(record, Mapping):
            return self.tokenized(record)
        if self.messages_column is not None and self.chat is not None:
            return self.chat(record)
        if "input_ids" in record:
            return self.tokenized(record)
        if isinstance(value := record.get(self.text_column), str):
            return self.text(value)
        raise ValueError(
            f"the record has {', '.join(map(str, record)) or 'no columns'}: must have text in text_column = "
            f'"{self.text_column}", or input_ids, or messages and messages_column set. Correct the function'
        )


class _Reader:
    """Record number -> record, of what the function returned. A copy for another process calls it again."""

    def __init__(self, spec: str, name: str, split: str, data: Any) -> None:
        self._spec, self._name, self._split, self._data = spec, name, split, data
        self._count = len(data)

    def __call__(self, number: int) -> Any:
        if self._data is None:
            self._data = _make(self._spec, self._name, self._split)
            if not _is_sequence(self._data) or len(self._data) != self._count:
                raise ValueError(
                    f"{self._name}: called again in another process, it returned other data than {self._count} "
                    "documents. It must return the same every time."
                )
        record = self._data[number]
        if isinstance(record, str | Mapping | np.ndarray | list | tuple):
            return record
        raise ValueError(f"{self._name}: {self.where(number)} is of type {type(record).__name__}: must be {_KINDS}.")

    def where(self, number: int) -> str:
        return f'record {number} of split "{self._split}"'

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None}


class _NewIterators:
    """An iterable from a function that returns iterators: each pass is over a new one, which starts at the start."""

    def __init__(self, spec: str, name: str, split: str, first: Iterator[Any]) -> None:
        self._spec, self._name, self._split, self._first = spec, name, split, first

    def __iter__(self) -> Iterator[Any]:
        data = _make(self._spec, self._name, self._split)
        if data is self._first or not isinstance(data, Iterator):
            raise ValueError(
                f"{self._name}: called again, it returned the same iterator or something else: must be a new iterator "
                "each time, because each epoch and each resume starts over. Make the iterator inside the function."
            )
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_first": None}


@runtime_checkable
class _Numbered(Protocol):
    def __getitem__(self, number: int) -> Any: ...


@runtime_checkable
class _WithFingerprint(Protocol):
    fingerprint: Any


def _is_sequence(data: Any) -> bool:
    return isinstance(data, Sized) and isinstance(data, _Numbered) and not isinstance(data, str | bytes | Mapping)


def _make(spec: str, name: str, split: str) -> Any:
    return _function(spec, name)(split)


def _function(spec: str, name: str) -> Callable[[str], Any]:
    if (factory := registered(spec)) is not None:
        return factory
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f'{name}: must be "module:function" or "path/to/file.py:function".')
    module = _module(match["module"], name)
    function = getattr(module, match["function"], None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{name}: {match['module']} has no function {match['function']}; it has {', '.join(there) or 'none'}. "
            "Correct the name."
        )
    return function


def _module(where: str, name: str) -> ModuleType:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{name}: no module {error.name} could be imported from {Path.cwd()}. Install it, put its folder into "
                'PYTHONPATH, or name the file: "path/to/file.py:function".'
            ) from error
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{name}: no such file {path}. Correct the path.")
    found = importlib.util.spec_from_file_location(f"_hook_{path.stem}", path)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses and pickle look a class's module up there
    found.loader.exec_module(module)
    return module
