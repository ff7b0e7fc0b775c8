"""The parity report over every dense type: loss, gradients, load and export on 2 gloo processes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.distributed.workers import quick_context
from transformers_backend.proof import gradients
from transformers_backend.verify import DENSE_MODEL_TYPES, PRETRAINED_LOSS_TOLERANCE, Report, main, verify
from transformers_backend.verify.command import parse
from transformers_backend.verify.compare import _compare_gradients
from transformers_backend.verify.report import with_section
from transformers_backend.verify.setting import setting_of

# The promise of the project, written out here so that a loosened tolerance in the sources shows.
LOSS, GRADIENT, LOADED_LOSS = 1e-5, 1e-4, 1e-6


def test_every_dense_type_passes_or_is_refused_with_a_reason():
    assert len(DENSE_MODEL_TYPES) == len(set(DENSE_MODEL_TYPES)) == 68
    reports = verify(list(DENSE_MODEL_TYPES), fsdp=2)

    assert [report.model for report in reports] == list(DENSE_MODEL_TYPES)
    failed = {report.model: report.reason for report in reports if report.verdict not in ("pass", "refused")}
    assert not failed
    refused = {report.model: report.reason for report in reports if report.verdict == "refused"}
    assert set(refused) <= {"xlstm"}
    assert all(refused.values())
    for report in reports:
        if report.verdict == "pass":
            assert report.loss_difference <= LOSS, report
            assert report.gradient_error <= GRADIENT, report
            assert report.norm_error <= GRADIENT, report
            assert report.evaluation_difference <= LOSS, report
            assert report.stages == report.held_by_several == "", "that is of pipelines"
            assert report.sharded is None is report.sequence_parallel, "that is of tensor parallelism"
            assert report.pretrained_loss_difference <= LOADED_LOSS, report
            assert report.export == "bit-equal", report
            assert report.worst_parameter
            assert not report.notes, "no model needs the full logits"
    assert PRETRAINED_LOSS_TOLERANCE <= LOADED_LOSS


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the report's processes from a server; the first test above starts them as users do."""
    quick_context()
    forks = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr("transformers_backend.verify.compare.mp.spawn", forks)


def test_what_cannot_be_trained_is_refused_with_the_reason(quick: None):
    reports = {report.model: report for report in verify(["bert", "t5", "lama"], fsdp=1)}
    assert {report.verdict for report in reports.values()} == {"refused"}
    assert "not a causal language model" in reports["bert"].reason
    assert "encoder-decoder" in reports["t5"].reason
    assert "llama" in reports["lama"].reason, "the nearest type is named"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one model type"),
        (["llama", "--fsdp", "0"], "--fsdp 0: must be at least 1"),
        (["llama", "--tp", "0"], "--tp 0: must be at least 1"),
        (["llama", "lama"], 'MODEL = "lama": no folder from'),
        (["lama"], 'knows no such model type; the nearest is "llama". A hub id is owner/name.'),
        (["./no/such"], 'MODEL = "./no/such": no such folder from'),
        (["tests"], 'MODEL = "tests": the folder has no config.json'),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_table_has_a_header_and_names_what_cannot_be_fetched(quick: None, capsys: pytest.CaptureFixture):
    assert main(["nobody/nothing", "llama", "--fsdp", "1"]) == 1
    header, nothing, llama, summary = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["model", "loss", "diff"]
    assert "fail (OSError: " in nothing
    assert header.index("verdict") == nothing.index("fail (") == llama.index("pass")
    assert summary == "1 pass, 0 refused, 1 fail"


def test_the_degrees():
    options = {" ".join(given): parse(["llama", *given]) for given in (
        [], ["--fsdp", "4"], ["--tp", "2"], ["--fsdp", "2", "--tp", "2"]
    )}  # fmt: skip
    assert {given: (found.fsdp, found.tp) for given, found in options.items()} == {
        "": (2, 1), "--fsdp 4": (4, 1), "--tp 2": (1, 2), "--fsdp 2 --tp 2": (2, 2),
    }  # fmt: skip


def test_tensor_parallelism_has_columns_of_its_own(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    document = tmp_path / "MODELS.md"
    assert main(["opt", "codegen", "--tp", "2", "--write-docs", str(document)]) == 0
    header, opt, codegen, summary = capsys.readouterr().out.splitlines()
    assert summary == "2 pass, 0 refused, 0 fail"
    at = header.index("sharded")
    assert header[at:].split() == ["sharded", "sequence", "verdict"]
    assert opt[at:].split() == ["98.7%", "yes", "pass"], "positions of a default OPT are whole"
    assert codegen[at:].split() == ["100.0%", "yes", "pass"], "whose heads lie in groups of four"
    assert f"by `scripts/verify.sh opt codegen --tp 2 --write-docs {document}`" in document.read_text()
    assert "| export | sharded | sequence | verdict |" in document.read_text()


def test_the_document_has_a_section_for_every_mesh():
    passed = Report("llama", sharded=0.5, sharded_of_twin=True, sequence_parallel=False, notes=["because"])
    refused = Report("bert", verdict="refused", reason="a | b")
    document = ""
    for fsdp, tp, reports in [(2, 1, [refused]), (1, 2, [passed]), (2, 2, [refused]), (1, 2, [passed, refused])]:
        setting = setting_of(fsdp=fsdp, tp=tp)
        document = with_section(document, reports, setting=setting, command=f"--tp {tp}")
    assert document.startswith("# Models\n")
    introduction, *sections = document.split("\n## ")
    assert [section.splitlines()[0] for section in sections] == ["fsdp 2", "tp 2", "fsdp 2 x tp 2"]
    assert "*sharded*" in introduction
    assert all("Generated on " in section for section in sections)
    assert "| llama | - | - | - | - | - | 50.0% of the twin | no | pass; because |" in sections[1]
    assert "**1 pass, 1 refused, 0 fail.**" in sections[1]
    assert "| bert | - | - | - | - | - | refused (a \\| b) |" in sections[0]
    setting = setting_of(tp=2)
    assert document == with_section(document, [passed, refused], setting=setting, command="--tp 2")


def test_a_gradient_may_be_off_by_a_few_roundings_of_plain_transformers(monkeypatch: pytest.MonkeyPatch):
    """Where those are more than the tolerance; `b` is nearly zero, the sum of what cancels."""
    plain = torch.nn.ParameterDict({"a": torch.ones(4), "b": torch.ones(4)})
    plain["a"].grad, plain["b"].grad = torch.ones(4), torch.full((4,), 1e-4)
    monkeypatch.setattr("transformers_backend.verify.compare._rounding_of_plain", lambda *_: {"a": 1e-7, "b": 2e-4})

    def verdict(**errors: float) -> tuple[str, list[str]]:
        found = {name: gradient * (1 + errors.get(name, 0)) for name, gradient in gradients(plain).items()}
        monkeypatch.setattr("transformers_backend.verify.compare.seen_gradients", lambda _: found)
        report = Report("llama")
        assert _compare_gradients(report, plain, None, None) == (report.verdict == "pass")
        return report.reason, report.notes

    assert verdict(a=9e-5) == ("", [])
    assert verdict(a=2e-4) == ("gradient of a is wrong", [])
    note = "b: plain Transformers in fp32 is 2.0e-04 from float64 itself"
    # It counts as a thousandth of the usual size, a seventh of which it has.
    assert verdict(b=1e-3) == ("", [note]), "off by 1.4e-4"
    assert verdict(b=5e-3) == ("", [note]), "7.1e-4"
    assert verdict(b=6e-3) == ("gradient of b is wrong", []), "8.5e-4"
