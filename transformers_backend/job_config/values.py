"""Values of configuration keys: type checks, text from the command line, and TOML text in and out.

A leaf below the sections. The types that keys have: bool, int, float, str, a Literal of strings, list[str],
list[list[str]], list[float], dict[str, Any], dict[str, str], each of them perhaps `| None`, and list[D] of a dataclass
D of such fields, which is written as tables, [[section.key]]. The names of a dict[str, str] are those of modules: their
dots do not nest.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_LISTS = {str: "a list of strings", float: "a list of numbers", list[str]: "a list of lists of strings"}
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


@functools.cache
def field_types(dataclass_type: type) -> dict[str, Any]:
    """Return {field name: type} of a dataclass, in the order of its fields."""
    hints = get_type_hints(dataclass_type)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(dataclass_type)}


def without_none(kind: Any) -> tuple[Any, bool]:
    """Split `X | None` into (X, True); any other type is returned with False."""
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (member for member in get_args(kind) if member is not type(None))
        return inner, True
    return kind, False


def item_type(kind: Any) -> Any:
    """The type of a list's items; None for what is no list."""
    inner, _ = without_none(kind)
    return get_args(inner)[0] if get_origin(inner) is list else None


def is_table_of_strings(kind: Any) -> bool:
    """Whether a type is dict[str, str]."""
    inner, _ = without_none(kind)
    return get_origin(inner) is dict and get_args(inner)[1] is str


def table_type(kind: Any) -> type | None:
    """The dataclass of a list of tables; None for every other type."""
    item = item_type(kind)
    return item if dataclasses.is_dataclass(item) else None


def describe_type(kind: Any) -> str:
    inner, optional = without_none(kind)
    if get_origin(inner) is Literal:
        text = "one of " + ", ".join(f'"{choice}"' for choice in get_args(inner))
    elif item_type(inner) is not None:
        text = _LISTS.get(item_type(inner), "a list of tables")
    elif get_origin(inner) is dict:
        text = "a table of strings" if is_table_of_strings(inner) else "a table"
    else:
        text = _NAMES[inner]
    return f"{text} or none" if optional else text


def has_type(value: Any, kind: Any) -> bool:
    inner, optional = without_none(kind)
    if value is None:
        return optional
    if get_origin(inner) is Literal:
        return isinstance(value, str) and value in get_args(inner)
    if get_origin(inner) is list:
        return isinstance(value, list) and all(has_type(item, item_type(inner)) for item in value)
    if get_origin(inner) is dict:
        item = str if is_table_of_strings(inner) else object
        return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, item) for k, v in value.items())
    if isinstance(value, bool):
        return inner is bool
    return isinstance(value, (int, float) if inner is float else inner)


def type_problems(section: str, config: object) -> list[str]:
    """Return a sentence for every field of a section whose value is not of the declared type or choice, or not finite
    (unless its metadata says may_be_infinite)."""
    found = []
    for entry in dataclasses.fields(config):
        value, kind = getattr(config, entry.name), field_types(type(config))[entry.name]
        if not has_type(value, kind):
            found.append(f"{section}.{entry.name} = {_shown(value)}: must be {describe_type(kind)}.")
        elif isinstance(value, float) and not math.isfinite(value) and not entry.metadata.get("may_be_infinite"):
            found.append(f"{section}.{entry.name} = {value}: must be a finite number; correct it.")
        elif table_type(kind) is not None:
            for index, item in enumerate(value):
                found += type_problems(f"{section}.{entry.name}[{index}]", item)
    return found


def convert(value: Any, kind: Any) -> Any:
    """Return a value read from TOML or text as its field keeps it: integers as floats where floats are wanted, a
    string as a list of it where a list is wanted, None for "none" inside tables, and tables of strings flat, because
    TOML nests a.b = "c" where "a.b" is not quoted."""
    inner, _ = without_none(kind)
    if is_table_of_strings(inner) and isinstance(value, dict):
        return dict(_flat(value))
    if inner is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if item_type(inner) is str and isinstance(value, str):
        return [value]
    if item_type(inner) is float and isinstance(value, list):
        return [convert(item, float) for item in value]
    return _with_none(value) if get_origin(inner) is dict else value


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_none(item) for key, item in value.items()}
    return None if value == "none" else value


def _shown(value: Any) -> str:
    try:
        return "none" if value is None else to_toml(value)
    except TypeError:
        return repr(value)


def parse_text(text: str, kind: Any) -> Any:
    """Read a command-line value for a key of type `kind` (None: a key we do not know).

    Text that does not fit comes back as it is, and the type check names it.
    """
    inner, optional = without_none(kind)
    if optional and text.lower() == "none":
        return None
    if inner is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if inner in (int, float):
        try:
            return inner(text)
        except ValueError:
            return text
    if item_type(inner) == list[str] and not text.startswith("["):
        return [parse_text(item, item_type(inner)) for item in text.split(";") if item.strip()]
    if get_origin(inner) is list and not text.startswith("["):
        return [parse_text(item.strip(), item_type(inner)) for item in text.split(",") if item.strip()]
    if inner is None or get_origin(inner) in (list, dict):
        return parse_toml_value(text)
    return text


def parse_toml_value(text: str) -> Any:
    """Read one TOML value; text that is none is a string (so that strings need no quotes on the command line)."""
    toml = toml_reader()
    try:
        table = toml.loads(f"value = {text}")
    except toml.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def toml_reader() -> types.ModuleType:
    """Return tomllib (Python >= 3.11), or tomli, which is the same for Python 3.10."""
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        import tomli
    except ImportError as error:
        raise ImportError("Python 3.10 reads TOML files with the package tomli: `pip install tomli`.") from error
    return tomli


def to_toml(value: Any) -> str:
    """Write a value as inline TOML. None inside a table becomes "none"; other kinds raise TypeError."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(to_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {to_toml(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as TOML.")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else to_toml(key)
