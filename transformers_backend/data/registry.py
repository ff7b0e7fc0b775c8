"""Names that a program gives to data of its own, beside the built-in one: what `register_dataset` was told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers_backend.data.sources import BUILT_IN_SOURCE, HUB_ALIASES

_FACTORIES: dict[str, Callable[[str], Any]] = {}


def register_dataset(name: str, factory: Callable[[str], Any]) -> None:
    """Make `training.dataset = name` read what `factory(split)` returns: all that a "module:function" may return.

    For a program that makes its own `Trainer`; every rank registers. Registering a name again replaces its factory.
    Raises ValueError for a name that would be read as something else.
    """
    if name == BUILT_IN_SOURCE or name in HUB_ALIASES:
        raise ValueError(f'register_dataset("{name}", ...): the name has a meaning already. Choose another one.')
    if not name or any(character in name for character in ":/\\~"):
        raise ValueError(
            f'register_dataset("{name}", ...): a name must not be empty or hold ":", "/", "\\" or "~", as functions, '
            "hub ids and paths do. Choose a plain one."
        )
    _FACTORIES[name] = factory


def registered(name: str) -> Callable[[str], Any] | None:
    return _FACTORIES.get(name)
