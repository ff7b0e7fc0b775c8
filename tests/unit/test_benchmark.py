"""scripts/benchmark.py from end to end on a tiny model, and how its numbers become ratios and tables."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.distributed.workers import quick_context

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONTENDERS = ["ours", "hf_trainer", "bare"]
MEASURED = {"block_seconds": [1.0, 2.0, 4.0], "peak_memory": 30, "first_steps_seconds": [9.0, 5.0, 6.0],
            "block_cpu_seconds": [1.0, 1.0, 1.5], "first_steps_cpu_seconds": [3.0]}  # fmt: skip


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))  # benchmark.py imports its neighbour, and puts the checkout in front
        specification = importlib.util.spec_from_file_location("benchmark", SCRIPTS / "benchmark.py")
        module = importlib.util.module_from_spec(specification)
        patch.setitem(sys.modules, "benchmark", module)  # where the contenders' processes look for it
        specification.loader.exec_module(module)
        yield module


def test_every_contender_trains_the_same_model(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file, table_file = tmp_path / "report.json", tmp_path / "report.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which main() sets
    context = quick_context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda way: context)
    arguments = ["--preset", "tiny", "--precision", "fp32", "--no-compile", "--steps", "1", "--blocks", "2",
                 "--threads", "1", "--contenders", ",".join(CONTENDERS), "--json", str(report_file),
                 "--markdown", str(table_file), "--plot", str(tmp_path / "report.png")]  # fmt: skip
    ceiling = benchmark.measure_ceiling("fp32", 1)
    monkeypatch.setattr(benchmark, "measure_ceiling", lambda *ignored: ceiling)  # seconds each time
    status = benchmark.main(arguments)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    report = json.loads(report_file.read_text())
    assert list(report["results"]) == CONTENDERS
    for name, result in report["results"].items():
        assert len(result["block_seconds"]) == 2
        assert result["tokens_per_second"] > 0
        assert result["peak_memory"] > result["imports_memory"] > 0
        assert result["first_step_seconds"] > 0
        assert 0 <= result["compile_seconds"] < result["first_step_seconds"]
        assert 0 < result["ceiling_share"] < 1, name
        assert result["first_loss"] == pytest.approx(report["results"]["bare"]["first_loss"], rel=0.02), name
    reference = [report["results"][name]["last_loss"] for name in CONTENDERS[1:]]
    assert reference == pytest.approx([reference[0]] * 2, rel=1e-4), "the same weights, batches and updates"
    assert list(report["ratios"]) == [f"ours / {name}" for name in CONTENDERS[1:]]
    for ratio in report["ratios"].values():
        assert 0.02 < ratio["tokens_per_second"] < 50
        assert 0.2 < ratio["peak_memory"] < 5
    assert table_file.read_text() in printed.out
    assert "| ours / hf_trainer |" in table_file.read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_speed_ratios_are_paired_within_a_round(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower from round to round does not change them."""
    results = {
        "ours": {**MEASURED},
        "bare": {"block_seconds": [2.0, 4.0, 8.0], "peak_memory": 40, "first_steps_seconds": [4.0],
                 "block_cpu_seconds": [1.5, 1.5, 1.5], "first_steps_cpu_seconds": [2.0]},
        "hf_trainer": {"failed": "out of memory"},
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = benchmark.make_settings(benchmark.parse_arguments(["--preset", "tiny"]))
    ratios = benchmark.evaluate(results, settings, ceiling=1e12)
    by_clock = {"tokens_per_second": 2.0, "peak_memory": 0.75, "first_step": 1.5}
    assert ratios == {"ours / bare": {**by_clock, "cpu_tokens_per_second": 1.5, "cpu_first_step": 1.5}}
    assert results["ours"]["tokens_per_second"] == settings.tokens_per_step / 2.0
    assert (results["ours"]["first_step_seconds"], results["ours"]["compile_seconds"]) == (6.0, 4.0)
    assert (results["bare"]["first_step_seconds"], results["bare"]["compile_seconds"]) == (4.0, 0.0)


@pytest.mark.parametrize(
    ("preset", "matrices", "attention"),
    [
        # 6 N + 12 L H Q S: the head, and queries, keys, values, output and three projections of each layer
        ("cpu-50m", 32000 * 512 + 6 * (4 * 512 * 512 + 3 * 512 * 1376), 12 * 6 * 512 * 512),
        ("llama3.2-1b", 128256 * 2048 + 16 * (2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 8192), 12 * 16 * 2048 * 8192),
        ("llama3.2-3b", 128256 * 3072 + 28 * (3072 * (2 * 3072 + 2 * 1024) + 3 * 3072 * 8192), 12 * 28 * 3072 * 8192),
    ],
)
def test_flops_count_scores_without_a_discount_for_the_mask(
    benchmark: ModuleType, preset: str, matrices: int, attention: int
) -> None:
    settings = benchmark.make_settings(benchmark.parse_arguments(["--preset", preset]))
    norms = (2 * settings.config["num_hidden_layers"] + 1) * settings.config["hidden_size"]
    assert benchmark.flops_per_token(settings) == 6 * (matrices + norms) + attention


def test_a_missing_package_is_told_and_does_not_fail(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarking import rounds

    monkeypatch.setattr(rounds, "why_not_here", lambda name: "accelerate is not installed")
    settings = benchmark.make_settings(benchmark.parse_arguments(["--preset", "tiny"]))
    results = benchmark.run(settings, ["hf_trainer"], steps=1, blocks=1)
    assert results == {"hf_trainer": {"skipped": "accelerate is not installed"}}


def test_what_a_contender_lacks_is_said(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarking import peers

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else name)
    monkeypatch.setattr(peers, "launches_on", lambda device: False)
    reasons = {name: peers.why_not_here(name) for name in peers.CONTENDERS}
    assert {name: reason for name, reason in reasons.items() if reason} == {
        "hf_trainer_liger": "liger_kernel is not installed",
        "ours_kernels": "Triton kernels run on GPUs only",
        "ours_eager_kernels": "Triton kernels run on GPUs only",
    }


def test_every_start_counts_and_the_last_one_stays(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarking import rounds

    events = []

    class Stub:
        def __init__(self, name: str, settings: object, *, cold: bool) -> None:
            self.name, self.record, self._first = name, {"block_seconds": []}, 10.0 + len(events)
            self.record["block_cpu_seconds"], self.cpu_seconds = [], 0.0
            events.append(("starts", name, cold))

        def train(self, steps: int) -> float:
            events.append(("trains", self.name, steps))
            return self._first if steps == 1 else float(steps)

        def close(self) -> None:
            events.append(("ends", self.name))

    monkeypatch.setattr(rounds, "Contestant", Stub)
    settings = benchmark.make_settings(benchmark.parse_arguments(["--preset", "tiny"]))
    results = benchmark.run(settings, ["ours", "bare"], steps=3, blocks=1, starts=2, cold=True)
    assert [event for event in events if event[0] == "starts"] == [
        ("starts", name, True) for name in ("ours", "bare", "bare", "ours")
    ]
    assert {name: len(record["first_steps_seconds"]) for name, record in results.items()} == {"ours": 2, "bare": 2}
    assert {name: record["block_seconds"] for name, record in results.items()} == {"ours": [1.0], "bare": [1.0]}
    events.clear()
    results = benchmark.run(settings, ["ours", "bare"], steps=3, blocks=1, limit=0.0)
    assert results == {name: {"skipped": rounds.OUT_OF_TIME} for name in ("ours", "bare")}
    assert events == []


def test_torchtitan_gets_the_same_shape(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for its classes: what they round the widths to is as in its v0.2."""
    from benchmarking import peers

    package = ModuleType("torchtitan.models.llama3")
    package.TransformerModelArgs = lambda **fields: fields
    arguments = ModuleType("torchtitan.models.llama3.model.args")
    arguments.RoPEScalingArgs = lambda *numbers, **named: (*numbers, named)
    for module in (package, arguments):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for preset in ("tiny", "cpu-50m", "llama3.2-1b", "llama3.2-3b"):
        settings = benchmark.make_settings(benchmark.parse_arguments(["--preset", preset]))
        found = peers._torchtitan_arguments(settings)
        width = int(found["ffn_dim_multiplier"] * int(2 * 4 * found["dim"] / 3))
        multiple = found["multiple_of"]
        assert multiple * ((width + multiple - 1) // multiple) == settings.config["intermediate_size"]
    assert (found["n_layers"], found["n_heads"], found["n_kv_heads"]) == (28, 24, 8)
    assert (found["rope_theta"], found["rope_scaling_args"]) == (500000.0, (32.0, 1.0, 4.0, 8192, {}))


def test_fields_of_a_preset_can_be_changed(benchmark: ModuleType) -> None:
    settings = benchmark.make_settings(
        benchmark.parse_arguments(["--preset", "cpu-50m", "--hidden-size", "768", "--batch-size", "1"])
    )
    assert settings.config["hidden_size"] == 768
    assert settings.config["vocab_size"] == 32000
    assert (settings.batch_size, settings.seq_len) == (1, 512)


def test_the_command_is_kept_without_output_files(benchmark: ModuleType) -> None:
    arguments = ["--json", "out.json", "--preset", "tiny", "--markdown", "out.md", "--plot", "out.png", "--no-compile"]
    assert benchmark.command_line(arguments) == "scripts/benchmark.py --preset tiny --no-compile"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "ours,theirs"], "--contenders has 'theirs': must be among ours, ours_kernels, ours_budget,"),
        (["--blocks", "0"], "--steps, --blocks, --starts and --threads must be at least 1"),
        (["--plot", "out.pdf"], "--plot out.pdf: must end in .png"),
    ],
)
def test_a_bad_argument_is_named(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(arguments)
    assert message in capsys.readouterr().err
