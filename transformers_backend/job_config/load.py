"""From a TOML file and a command line to a checked JobConfig: defaults < TOML < command line.

Both sources become one nested table {section: {key: value}}, which is laid over the defaults. Problems of reading and
of validation are raised together.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallelize.config import check
from transformers_backend.job_config.config import JobConfig, find_problems
from transformers_backend.job_config.help import help_text
from transformers_backend.job_config.sections import Training
from transformers_backend.job_config.torchtitan import ALIASES, TABLE_ALIASES, is_ignored, refusal
from transformers_backend.job_config.values import (
    convert,
    describe_type,
    field_types,
    has_type,
    is_table_of_strings,
    parse_text,
    table_type,
    toml_reader,
    type_problems,
)

logger = logging.getLogger(__name__)

DEFAULT_CONFIG_FILE = Path(__file__).parents[2] / "train_configs" / "default.toml"


def load_job_config(argv: list[str] | None = None) -> JobConfig:
    """Return the resolved config of `[CONFIG.toml] [--section.key value ...]`, by default of this process's arguments.

    Without a TOML file it is `train_configs/default.toml`. `--help` prints all keys and exits. Raises one ValueError
    that lists every problem; torchtitan keys without meaning here are warned about.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    config_files, assignments, problems = _read_command_line(argv)
    if len(config_files) > 1:
        problems.append(f"{len(config_files)} TOML files, {', '.join(config_files)}: name one.")
    table = _read_file(config_files[0] if config_files else str(DEFAULT_CONFIG_FILE))
    for path, value in assignments:
        _assign(table, path, value)
    config = JobConfig()
    problems += _fill(config, table)
    check(problems + find_problems(config))
    return config


def read_model_sections(text: str, name: str) -> JobConfig:
    """The config that a run saved with its checkpoint, as far as it says which model it had.

    Nothing else is checked: the run's data may be gone, and other keys may have changed since. `name` is the file's,
    for messages. Raises one ValueError that lists every problem.
    """
    table = _parse(text, name)
    config = JobConfig()
    _fill(config, table)
    found = type_problems("hf_transformers", config.hf_transformers) or config.hf_transformers.problems()
    if not has_type(config.training.dtype, field_types(Training)["dtype"]):
        found.append(f"training.dtype = {config.training.dtype!r}: must be a floating-point type, as the run had it.")
    check([f"{name}: {problem}" for problem in found])
    return config


def _parse(text: str, name: str) -> dict[str, Any]:
    toml = toml_reader()
    try:
        return toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise ValueError(f"{name}: not valid TOML: {error}; correct it there.") from error


def _read_file(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    try:
        return _parse(path.read_text(encoding="utf-8-sig"), str(path))  # some editors begin it with a byte order mark
    except OSError as error:
        remedy = "name a TOML file such as those in train_configs/. An option takes one value, a list is a,b."
        if _looks_like_an_option(name):
            remedy = f"an option begins with two dashes: --{name.lstrip('-')}."
        problem = f"{name or 'an empty argument'}: cannot be read ({error.strerror}); {remedy}"
    except UnicodeDecodeError as error:
        problem = f"{path}: not valid TOML: {error}; correct it there."
    raise ValueError(problem)


def _looks_like_an_option(name: str) -> bool:
    section = name.lstrip("-").partition("=")[0].partition(".")[0]
    return section in field_types(JobConfig) and not name.endswith(".toml")


def _read_command_line(argv: list[str]) -> tuple[list[str], list[tuple[tuple[str, ...], Any]], list[str]]:
    """Return the TOML files named, the (path, value) assignments in order, and the problems."""
    config_files: list[str] = []
    assignments: list[tuple[tuple[str, ...], Any]] = []
    problems: list[str] = []
    tokens = deque(argv)
    while tokens:
        token = tokens.popleft()
        if not token.startswith("--"):
            config_files.append(token)
            continue
        name, equals, text = token[2:].partition("=")
        path = _path_of(name)
        kind = str if name == "job.config_file" else _type_at(path)
        positive = _positive_form(path)
        if positive and not equals:
            if _value_follows(tokens, bool):
                on = ".".join(positive)
                problems.append(f"--{name} {tokens.popleft()}: takes no value; write --{name}, or --{on}.")
            path, value = positive, False
        elif equals or _value_follows(tokens, kind):
            text = text if equals else tokens.popleft()
            value = parse_text(text, kind)
        elif kind in (bool, None):
            value = True
        else:
            problems.append(f"--{name}: needs a value, {describe_type(kind)}.")
            continue
        if name == "job.config_file":
            config_files.append(value)
        elif len(path) < 2:
            problems.append(_unknown(name, "--"))
        else:
            assignments.append((path, value))
    return config_files, assignments, problems


def _path_of(name: str) -> tuple[str, ...]:
    """The parts of an option's name; what follows a table of strings is one name, as it may be a module's."""
    path = tuple(name.split("."))
    if len(path) > 3 and is_table_of_strings(_type_at(path[:2])):
        return (*path[:2], ".".join(path[2:]))
    return path


def _type_at(path: tuple[str, ...]) -> Any:
    """The type of the key at a path; None for one that is not ours, or that lies inside a table of anything."""
    sections = field_types(JobConfig)
    if len(path) not in (2, 3) or path[0] not in sections:
        return None
    kind = field_types(sections[path[0]]).get(path[1])
    return kind if len(path) == 2 else str if is_table_of_strings(kind) else None


def _positive_form(path: tuple[str, ...]) -> tuple[str, str] | None:
    """`section.no_key` as (section, key), where that is a boolean or an ignored key."""
    if len(path) != 2 or not path[1].startswith("no_"):
        return None
    section, key = path[0], path[1][len("no_") :]
    return (section, key) if _type_at((section, key)) is bool or is_ignored(section, key) else None


def _value_follows(tokens: deque[str], kind: Any) -> bool:
    """Whether the next token is an option's value; after a boolean it may be the TOML file instead."""
    if not tokens or tokens[0].startswith("--"):
        return False
    return kind is not bool or not _is_a_file(tokens[0])


def _is_a_file(token: str) -> bool:
    return token.endswith(".toml") or Path(token).expanduser().is_file()


def _assign(table: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(table.get(key), dict):
            table[key] = {}
        table = table[key]
    table[path[-1]] = value


def _fill(config: JobConfig, table: dict[str, Any]) -> list[str]:
    """Set what a table says on a config, and return the problems of its names; values are validated later."""
    problems = []
    for section, content in table.items():
        if section in field_types(JobConfig) and isinstance(content, dict):
            for key, value in content.items():
                problems += _set(config, section, key, value)
        elif section in field_types(JobConfig):
            problems.append(f"{section} = {content!r}: must be a table of keys, [{section}].")
        else:
            problems += _set_foreign(section, None, content)
    return problems


def _set(config: JobConfig, section: str, key: str, value: Any) -> list[str]:
    target = getattr(config, section)
    kinds = field_types(type(target))
    if key in kinds and table_type(kinds[key]) is not None and isinstance(value, list):
        items, problems = _read_tables(f"{section}.{key}", value, table_type(kinds[key]))
        setattr(target, key, items)
        return problems
    if key in kinds:
        setattr(target, key, convert(value, kinds[key]))
        return []
    if (section, key) in TABLE_ALIASES and isinstance(value, dict):
        return [problem for inner, item in value.items() for problem in _set_inner(config, section, key, inner, item)]
    alias = ALIASES.get((section, key))
    if alias is None:
        return _set_foreign(section, key, value)
    logger.warning("%s.%s is deprecated in torchtitan; read as %s.%s.", section, key, section, alias)
    if getattr(target, alias) is None:
        setattr(target, alias, value)
    return []


def _read_tables(name: str, tables: list[Any], kind: type) -> tuple[list[Any], list[str]]:
    """Make a dataclass of every table of a list; returns them and the problems of their names."""
    items, problems = [], []
    for index, table in enumerate(tables):
        if not isinstance(table, dict):
            items.append(table)  # the type check names it
            continue
        item = kind()
        for key, value in table.items():
            if key in field_types(kind):
                setattr(item, key, convert(value, field_types(kind)[key]))
            else:
                (nearest,) = difflib.get_close_matches(key, field_types(kind), n=1, cutoff=0.0)
                problems.append(f"{name}[{index}].{key}: unknown key; the nearest is {nearest}. Correct or remove it.")
        items.append(item)
    return items, problems


def _set_inner(config: JobConfig, section: str, table: str, key: str, value: Any) -> list[str]:
    """A key of a torchtitan table that is flat here, or one of it without meaning here."""
    if key in TABLE_ALIASES[section, table]:
        return _set(config, section, key, value)
    logger.warning("%s.%s.%s is a torchtitan key without meaning here; ignored.", section, table, key)
    return []


def _set_foreign(section: str, key: str | None, value: Any) -> list[str]:
    """Warn about a torchtitan key that has no meaning here, or return the problem of any other."""
    names = list(_leaf_names(section if key is None else f"{section}.{key}", value))
    if not is_ignored(section, key or ""):
        return [_unknown(name) for name in names]
    problem = refusal(section, key or "", value)
    if problem:
        return [problem]
    for name in names:
        logger.warning("%s is a torchtitan key without meaning here; ignored.", name)
    return []


def _leaf_names(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaf_names(f"{name}.{key}", item)
    else:
        yield name


def _unknown(name: str, prefix: str = "") -> str:
    """The sentence for an unknown key: the same key of another section is nearest, else the most similar name."""
    known = [f"{section}.{key}" for section, kind in field_types(JobConfig).items() for key in field_types(kind)]
    last = name.rpartition(".")[2]
    elsewhere = [key for key in known if key.endswith(f".{last}")]
    (nearest,) = difflib.get_close_matches(name, elsewhere or known, n=1, cutoff=0.0)
    return f"{prefix}{name}: unknown key; the nearest is {prefix}{nearest}. Correct or remove it."
