"""How rules are told: sentences that name key, value, rule and remedy, all of them in one ValueError."""

from __future__ import annotations

from collections.abc import Iterable


def choice_problems(section: str, config: object, name: str, choices: tuple[str, ...]) -> list[str]:
    """The sentence for a field whose value is not among `choices`, or nothing."""
    value = getattr(config, name)
    if value in choices:
        return []
    allowed = ", ".join(f'"{choice}"' for choice in choices)
    return [f'{section}.{name} = "{value}": must be one of {allowed}.']


def check(problems: Iterable[str]) -> None:
    """Raise one ValueError that lists all `problems`, or return if there are none."""
    problems = list(problems)
    if problems:
        raise ValueError("\n".join(["Invalid configuration:", *(f"  - {problem}" for problem in problems)]))
