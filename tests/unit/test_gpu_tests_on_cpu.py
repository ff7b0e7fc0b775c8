"""The tests of tests/gpu, run on this machine's device, so that they are sound when a GPU comes to see them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

GPU_TESTS = Path(__file__).parents[1] / "gpu" / "test_gpu_training.py"


def _load_test_case() -> type:
    specification = importlib.util.spec_from_file_location("gpu_training_on_cpu", GPU_TESTS)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.TrainingOnTheDevice


class TestTrainingOnThisDevice(_load_test_case()):
    needs_cuda = False
