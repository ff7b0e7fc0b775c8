"""Rules that several sections share; each returns the sentences of what violates it. A leaf below the sections."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def below_minimum(section: str, config: object, **minimums: float) -> list[str]:
    return [
        f"{section}.{name} = {getattr(config, name)}: must be at least {minimum}."
        for name, minimum in minimums.items()
        if not getattr(config, name) >= minimum
    ]


def empty_strings(section: str, config: object, *names: str) -> list[str]:
    return [
        f'{section}.{name} = "": must not be empty; leave it out for the default.'
        for name in names
        if not getattr(config, name)
    ]


def source_problems(key: str, value: str) -> list[str]:
    """A folder that exists, or what may be a hub id: `owner/name` or a bare name."""
    if Path(value).expanduser().is_dir() or (_HUB_ID.fullmatch(value) and not Path(value).exists()):
        return []
    return [f'{key} = "{value}": no such folder from {Path.cwd()}, and not a hub id such as "owner/name"; correct it.']


def model_source_problems(key: str, value: str) -> list[str]:
    folder = Path(value).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        return [f'{key} = "{value}": the folder has no config.json; name one that save_pretrained has written.']
    return source_problems(key, value)


def model_type_problems(value: str) -> list[str]:
    from transformers import CONFIG_MAPPING  # here, so that `--help` and unit tests of other sections stay quick

    if value in CONFIG_MAPPING:
        return []
    if not value:
        return ['hf_transformers.model_type = "": must not be empty; name a type such as "llama".']
    (nearest,) = difflib.get_close_matches(value, list(CONFIG_MAPPING.keys()), n=1, cutoff=0.0)
    return [
        f'hf_transformers.model_type = "{value}": Transformers knows no such type; the nearest is "{nearest}". A hub '
        "id or folder belongs into hf_transformers.model."
    ]
