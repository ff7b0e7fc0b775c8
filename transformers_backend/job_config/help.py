"""The text of `--help`: each key's type, default and meaning, read from the dataclasses themselves."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap

from transformers_backend.job_config.config import JobConfig
from transformers_backend.job_config.data_sections import TextSource
from transformers_backend.job_config.values import describe_type, field_types, table_type, to_toml

USAGE = """\
usage: scripts/train.sh [CONFIG.toml] [--section.key value ...]

Train a Transformers causal language model. Without CONFIG.toml the embedded default run is trained. Options win over
the file. --section.key=value is understood too; booleans: --section.key, --section.key false, --section.no_key; lists:
a,b or '["a", "b"]', of lists 'a,b;c'; keys inside a table: --hf_transformers.config_overrides.num_hidden_layers 4."""


def help_text() -> str:
    defaults = JobConfig()
    lines = [USAGE]
    for section, kind in field_types(JobConfig).items():
        meanings = field_meanings(kind)
        lines.append(f"\n[{section}]")
        for key, key_type in field_types(kind).items():
            default = getattr(getattr(defaults, section), key)
            shown = "none" if default is None else to_toml(default)
            lines.append(f"  --{section}.{key}  ({describe_type(key_type)}; default {shown})")
            lines.append(_meaning(meanings[key], 6))
            if (item := table_type(key_type)) is not None:
                lines += _table_keys(f"{section}.{key}", item)
    return "\n".join(lines)


def _meaning(text: str, indent: int) -> str:
    return textwrap.indent(textwrap.fill(text, width=118 - indent, break_on_hyphens=False), " " * indent)


def _table_keys(name: str, kind: type) -> list[str]:
    """The keys of a list of tables; those of a data set are explained where they first stand."""
    lines, meanings = [f"      Each [[{name}]] of the TOML file has:"], field_meanings(kind)
    inherited = set(field_types(TextSource)) if issubclass(kind, TextSource) else set()
    for key, key_type in field_types(kind).items():
        if key not in inherited:
            shown = to_toml(getattr(kind(), key))
            lines += [f"        {key}  ({describe_type(key_type)}; default {shown})", _meaning(meanings[key], 10)]
    if inherited:
        lines.append(_meaning(f"and {', '.join(field_types(TextSource))}, as above.", 8))
    return lines


def field_meanings(dataclass_type: type) -> dict[str, str]:
    """Return {field name: the string literal under the field}, inherited fields included; one without is an error."""
    meanings: dict[str, str] = {}
    for base in reversed(dataclass_type.__mro__[:-1]):
        (class_definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        statements = class_definition.body
        for statement, following in itertools.pairwise(statements):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                meanings[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    missing = [name for name in field_types(dataclass_type) if name not in meanings]
    assert not missing, f"{dataclass_type.__name__} has fields without a meaning under them: {missing}"
    return meanings
