"""Fixtures that test files of scripts share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def slurm() -> ModuleType:
    """scripts/slurm.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        specification = importlib.util.spec_from_file_location("slurm", SCRIPTS / "slurm.py")
        module = importlib.util.module_from_spec(specification)
        patch.setitem(sys.modules, "slurm", module)  # dataclasses look their module up
        specification.loader.exec_module(module)
    return module
