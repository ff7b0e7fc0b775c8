"""What holds for every test: no model hub, one thread, and no GPU tests without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Keep Hugging Face libraries off the network; they read these when imported, and so do processes of the tests."""
    environment = pytest.MonkeyPatch()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        environment.setenv(name, "1")
    environment.setenv("TOKENIZERS_PARALLELISM", "false")  # it warns when a process that used a tokenizer forks
    config.add_cleanup(environment.undo)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies under tests/gpu, and skip all that is marked where no CUDA device is."""
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models lose more time to a pool of threads than they gain, and sums come out in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
