"""The search for the fastest candidates on the device itself, in processes one after another.

Written for unittest, as test_gpu_training.py is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch

from parallelize.kernels.language import launches_on

ROOT = Path(__file__).parents[2]
# Prints how many candidates were timed, of how many kernels, and how far results are off deterministic ones. These
# kernels compile fast; one of them adds to what is there.
PROGRAM = """
import torch
from parallelize.kernels import search
from parallelize.kernels.linear_cross_entropy import linear_cross_entropy

timed, milliseconds = [], search.Gpu.milliseconds
search.Gpu.milliseconds = lambda gpu, run: timed.append(run) or milliseconds(gpu, run)
torch.manual_seed(0)
hidden, weight = (torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16) / 20 for rows in (2048, 32000))
targets = torch.arange(2048, device="cuda")

def compute():
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    loss = linear_cross_entropy(*leaves, targets)
    return [loss, *torch.autograd.grad(loss, leaves)]

searching, found, count = compute(), compute(), len(timed)
torch.use_deterministic_algorithms(True)
fixed = compute()
assert len(timed) == count, "a deterministic launch searched"
errors = [((one - right).norm() / right.norm()).item() for one, right in zip(searching + found, fixed + fixed)]
print(count, len(search.SEARCH._fastest), max(errors))
"""


class SearchOnTheDevice(unittest.TestCase):
    def setUp(self) -> None:
        if not torch.cuda.is_available() or not launches_on(torch.device("cuda")):
            raise unittest.SkipTest("needs a CUDA device and Triton")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_a_second_process_does_not_search(self) -> None:
        first, second = self._run(), self._run()
        assert first[1] == second[1] == 4, (first, second)
        assert first[0] > 4, f"{first[0]:.0f} candidates timed for 4 kernels"
        assert second[0] == 0, f"{second[0]:.0f} candidates timed again"
        assert max(first[2], second[2]) < 1e-2, f"results depend on the choice: {first[2]:.1e}, {second[2]:.1e}"
        assert (self.folder / "parallelize_search.json").is_file()

    def _run(self) -> list[float]:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(self.folder), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [float(number) for number in done.stdout.split()]


if __name__ == "__main__":
    unittest.main(verbosity=2)
