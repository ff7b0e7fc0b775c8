"""What holds for every test: no model hub, one thread, no GPU tests without a GPU; and runs that share the tests.

scripts/test.sh runs two pytests beside each other. Every test under tests/unit is marked `beside`, unless it says that
it must be `alone`; with --share the runs take the files with such tests in turn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GPU_TESTS = Path(__file__).parent / "gpu"
UNIT_TESTS = Path(__file__).parent / "unit"

# Where there is Triton, kernels run on CPU tensors. Here, because Triton reads it where kernels are defined, and a
# folder's conftest.py, which may import them, is read before `pytest_configure` runs.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="FOLDER", help="skip files of tests that another run with this folder took")


def pytest_configure(config: pytest.Config) -> None:
    """Keep Hugging Face libraries off the network; they read these when imported, and so do processes of the tests."""
    environment = pytest.MonkeyPatch()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        environment.setenv(name, "1")
    environment.setenv("TOKENIZERS_PARALLELISM", "false")  # it warns when a process that used a tokenizer forks
    config.add_cleanup(environment.undo)


@pytest.hookimpl(tryfirst=True)  # before -m selects by these marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies under tests/gpu, and skip all that is marked where no CUDA device is; mark what has company."""
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)
        if UNIT_TESTS in item.path.parents and not item.get_closest_marker("alone"):
            item.add_marker("beside")


_TAKEN = pytest.StashKey[dict[Path, bool]]()


@pytest.hookimpl(tryfirst=True)  # before any fixture
def pytest_runtest_setup(item: pytest.Item) -> None:
    """With --share, take the test's file for this run, which the first one to come here does."""
    folder, taken = item.config.getoption("--share"), item.config.stash.setdefault(_TAKEN, {})
    if folder and item.path not in taken:
        name = "-".join(item.path.relative_to(UNIT_TESTS.parent).parts)
        try:
            os.close(os.open(Path(folder, name), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            taken[item.path] = False
        else:
            taken[item.path] = True
    if folder and not taken[item.path]:
        pytest.skip("the run beside this one has it")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models lose more time to a pool of threads than they gain, and sums come out in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def torchao() -> Iterator[None]:
    """torchao can be imported, also by processes that the file's tests start; without it they are skipped.

    No other test finds it: Transformers imports it, and its libraries, wherever it is.
    """
    folder = Path(sys.prefix) / "float8"  # where scripts/setup_environment.sh puts it
    with pytest.MonkeyPatch.context() as patch:
        if folder.is_dir():
            patch.setattr(sys, "path", [*sys.path, str(folder)])
        pytest.importorskip("torchao")
        yield
