"""Folders that appear whole: written under a temporary name, then renamed. A leaf of checkpoints and exports."""

from __future__ import annotations

import shutil
from pathlib import Path


def replace_folder(folder: Path, temporary: Path) -> None:
    """Give the whole new folder its name; an old one of that name is deleted only after that."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
