"""scripts/benchmark_kernels.py from end to end on tiny sizes, and that it leaves no kernel out."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from parallelize.config import KERNELS

SCRIPTS = Path(__file__).parents[2] / "scripts"


def measure_once(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))  # the script imports its neighbours, and puts the checkout in front
        specification = importlib.util.spec_from_file_location("benchmark_kernels", SCRIPTS / "benchmark_kernels.py")
        module = importlib.util.module_from_spec(specification)
        patch.setitem(sys.modules, "benchmark_kernels", module)
        specification.loader.exec_module(module)
        for one in (module, module.context):
            patch.setattr(one, "seconds_of", measure_once)
        # Triton's interpreter takes seconds for a ring; the kernel's own tests have one.
        patch.setattr(module.context, "launches_on", lambda device: False)
        patch.setattr(module, "measure_bandwidth", lambda: 1e9)
        patch.setattr(module, "measure_ceiling", lambda *ignored: 1e12)
        yield module


def test_everything_is_measured_and_computes_the_same(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--context", "--contestants", "kernel,eager", "--json", str(tmp_path / "out.json"),
                 "--markdown", str(tmp_path / "out.md")]  # fmt: skip
    assert benchmark.main(arguments) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out.json").read_text())
    assert {row["kernel"] for row in report["kernels"]} == set(KERNELS)
    for row in report["kernels"]:
        assert row["seconds"] > 0
        assert row["difference"] < 1e-5
    for found in report["context"]:
        names = [row["name"] for row in found["blocks"]]
        assert names[0] == "one call"
        assert "reference" in names
        for row in [*found["blocks"][1:], *found["rings"]]:
            assert row["difference"] < 1e-5
            assert row["share"] == pytest.approx(
                (found["blocks"][0]["forward"] + found["blocks"][0]["backward"]) / (row["forward"] + row["backward"])
            )
        assert found["rings"], "rings of 8"
    table = (tmp_path / "out.md").read_text()
    assert "| ring of 8, summed | tokens |" in table
    assert "| rms_norm | 8 x 16 | kernel |" in table


def test_what_computes_something_else_or_fails_is_told(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarking import kernel_cases

    def raise_error(x, weight, eps):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(kernel_cases, "rms_norm", lambda x, weight, eps: 1.1 * x * weight)
    assert benchmark.main(["--device", "cpu", "--kernels", "rms_norm", "--contestants", "kernel"]) == 1
    assert "differs from plain torch by" in capsys.readouterr().out
    monkeypatch.setattr(kernel_cases, "rms_norm", raise_error)
    assert benchmark.main(["--device", "cpu", "--kernels", "rms_norm", "--contestants", "kernel,eager"]) == 1
    assert "| kernel | RuntimeError: out of shared memory |" in capsys.readouterr().out


def test_bytes_and_products_are_those_of_the_computation(benchmark: ModuleType) -> None:
    from benchmarking.kernel_cases import find_cases

    def first(kernel: str):
        return find_cases(kernel, torch.device("cpu"))[0]()

    number = 4  # bytes of fp32
    assert first("rms_norm").bytes_moved == 5 * number * 8 * 16
    assert first("gated_activation").bytes_moved == 8 * number * 8 * 16
    assert first("rotary").bytes_moved == 4 * number * 8 * (4 + 2) * 8 + 2 * number * 2 * 8 * 8
    assert first("linear_cross_entropy").flops == 3 * 2 * 8 * 16 * 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


def test_a_bad_name_is_told(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--kernels", "rms_norm,rope"])
    assert "--kernels has 'rope': must be among rms_norm, " in capsys.readouterr().err
