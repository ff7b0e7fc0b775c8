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

from tests.distributed.workers import quick_context

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONTENDERS = ["ours", "hf_trainer", "bare"]


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
                 "--markdown", str(table_file)]  # fmt: skip
    ceiling = benchmark.measure_ceiling(benchmark.make_settings(benchmark.parse_arguments(arguments)))
    monkeypatch.setattr(benchmark, "measure_ceiling", lambda settings: ceiling)  # seconds each time
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


def test_speed_ratios_are_paired_within_a_round(benchmark: ModuleType) -> None:
    """A machine that gets slower from round to round does not change them."""
    results = {
        "ours": {"block_seconds": [1.0, 2.0, 4.0], "peak_memory": 30},
        "bare": {"block_seconds": [2.0, 4.0, 8.0], "peak_memory": 40},
        "hf_trainer": {"failed": "out of memory"},
    }
    settings = benchmark.make_settings(benchmark.parse_arguments(["--preset", "tiny"]))
    ratios = benchmark.evaluate(results, settings, ceiling=1e12)
    assert ratios == {"ours / bare": {"tokens_per_second": 2.0, "peak_memory": 0.75}}
    assert results["ours"]["tokens_per_second"] == settings.tokens_per_step / 2.0


def test_a_missing_package_is_told_and_does_not_fail(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "why_not_installed", lambda name: "accelerate is not installed")
    settings = benchmark.make_settings(benchmark.parse_arguments(["--preset", "tiny"]))
    results = benchmark.run(settings, ["hf_trainer"], steps=1, blocks=1)
    assert results == {"hf_trainer": {"skipped": "accelerate is not installed"}}


def test_fields_of_a_preset_can_be_changed(benchmark: ModuleType) -> None:
    settings = benchmark.make_settings(
        benchmark.parse_arguments(["--preset", "cpu-50m", "--hidden-size", "768", "--batch-size", "1"])
    )
    assert settings.config["hidden_size"] == 768
    assert settings.config["vocab_size"] == 32000
    assert (settings.batch_size, settings.seq_len) == (1, 512)


def test_the_command_is_kept_without_output_files(benchmark: ModuleType) -> None:
    arguments = ["--json", "out.json", "--preset", "tiny", "--markdown", "out.md", "--no-compile"]
    assert benchmark.command_line(arguments) == "scripts/benchmark.py --preset tiny --no-compile"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "ours,theirs"], "--contenders has 'theirs': must be among ours, hf_trainer, bare, bare_copy"),
        (["--blocks", "0"], "--steps, --blocks and --threads must be at least 1"),
    ],
)
def test_a_bad_argument_is_named(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(arguments)
    assert message in capsys.readouterr().err
