"""Files of one JSON object a line that go on where a run resumes: a leaf below `logger.py`.

What an earlier run left in the folder is looked at once, when the file is opened for a run that has `steps_done`:

- it resumes (steps_done > 0): lines of later steps were written on the way to the kill or belong to a branch that is
  left, so they are dropped, and with them a last line that a kill cut short;
- it starts anew (steps_done = 0): the file is of another run and keeps its content, under the next free name with a
  number (metrics.jsonl.1).
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)


class StepLines:
    """A file of JSON objects, each with the key "step". It is created by the first line that is written.

    Each line is on its way to the disk when `write` returns, so that a killed run loses none. JSON has no NaN or
    infinity: non-finite numbers are written as null.
    """

    def __init__(self, path: Path, *, steps_done: int) -> None:
        self._path = path
        self._file: TextIO | None = None
        if steps_done == 0:
            set_aside(path)
        elif path.exists():
            drop_later_lines(path, steps_done)

    def write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", buffering=1, encoding="utf-8")  # line-buffered
        finite = {key: value if _is_json_number(value) else None for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def drop_later_lines(path: Path, steps_done: int) -> None:
    """Keep the lines of steps up to `steps_done`; the file is replaced whole, so that a kill here loses nothing."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _is_within(line, steps_done)]
    if len(kept) == len(lines):
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    logger.info("%s: %d lines after step %d are dropped", path, len(lines) - len(kept), steps_done)


def set_aside(path: Path) -> None:
    """Rename an earlier run's file to the next free PATH.1, PATH.2 ..."""
    if not path.exists():
        return
    name = next(f"{path.name}.{n}" for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
    path.rename(path.with_name(name))
    logger.info("%s is of an earlier run and kept as %s", path, name)


def _is_within(line: str, steps_done: int) -> bool:
    try:
        step = json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
    return line.endswith("\n") and isinstance(step, int) and step <= steps_done


def _is_json_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
