"""The parity report where ranks share sequences: windows, packed documents, beside the other parallelisms."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.workers import quick_context
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.twin import WINDOW, build_twin
from transformers_backend.verify import Report, main, verify
from transformers_backend.verify.command import parse
from transformers_backend.verify.compare import global_batch
from transformers_backend.verify.context import loss_of_documents_alone, packed_batch, sequence_length
from transformers_backend.verify.report import with_section
from transformers_backend.verify.setting import setting_of

# The promise of the project, written out here so that a loosened tolerance in the sources shows.
LOSS, GRADIENT = 1e-5, 1e-4


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the report's processes from a server."""
    quick_context()
    forks = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr("transformers_backend.verify.compare.mp.spawn", forks)


def check_passed(report: Report, way: str = "ring") -> None:
    assert report.verdict == "pass", report
    assert report.loss_difference <= LOSS, report
    assert report.gradient_error <= GRADIENT, report
    assert report.norm_error <= GRADIENT, report
    assert report.evaluation_difference <= LOSS, report
    assert report.pretrained_loss_difference <= LOSS, report
    assert report.export == "bit-equal", report
    assert (report.way, report.documents) == (way, "pass"), report


def test_two_ranks_share_a_sequence(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    document = tmp_path / "MODELS.md"
    assert main(["gemma2", "gpt2", "--cp", "2", "--write-docs", str(document)]) == 0
    header, gemma2, gpt2, summary = capsys.readouterr().out.splitlines()
    at = header.index("way")
    assert header[at:].split() == ["way", "documents", "verdict"]
    assert gemma2[at:].split() == gpt2[at:].split() == ["ring", "pass", "pass"]
    assert summary == "2 pass, 0 refused, 0 fail"
    assert "\n## cp 2\n" in document.read_text()
    assert "| export | way | documents | verdict |" in document.read_text()


def test_four_ranks_two_of_which_share_a_sequence(quick: None):
    for report in verify(["gemma3_text", "opt"], fsdp=2, cp=2):
        check_passed(report)


def test_another_method(quick: None):
    (report,) = verify(["gemma2"], fsdp=1, cp=2, cp_method="ulysses")
    check_passed(report, "ulysses")


def test_the_reference_tells_documents_that_are_apart_from_mixed_ones():
    packed = packed_batch(2, 24)
    hf_config, model_class = HFTransformerModelArgs(model_type="llama").resolve()
    twin = build_twin(hf_config, model_class)
    alone = loss_of_documents_alone(twin, *packed[:2])
    together = loss_of(twin, *packed)
    mixed = loss_of(twin, packed[0], packed[1], torch.arange(24).expand(2, -1))
    assert abs(alone - together) <= LOSS, "as Transformers packs them"
    assert abs(alone - mixed) > 100 * LOSS, "and as documents that see each other"


def loss_of(twin: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return twin(input_ids=input_ids, labels=labels, position_ids=positions, use_cache=False).loss


def test_sequences_and_documents():
    for degree in (2, 3, 4, 5, 6, 8):
        seq = sequence_length(setting_of(cp=degree).parallelism)
        assert seq % (2 * degree) == 0
        assert 3 * WINDOW <= seq <= 6 * WINDOW, "longer than a window, and no longer than a table of positions"
        input_ids, labels, positions = packed_batch(6, seq)
        assert input_ids.shape == labels.shape == positions.shape == (6, seq)
        begins = [row.eq(0).nonzero().flatten().tolist() for row in positions]
        assert begins == [[0, 7, 8], [0, 11]] * 3
        assert (seq - 11) > WINDOW
        assert labels[positions == 0].eq(-100).all()
        counts = (labels != -100).sum(1).tolist()
        assert len(set(counts)) == 4, "rows have different numbers of targets"
    assert sequence_length(setting_of(fsdp=2).parallelism) == global_batch(1)[0].shape[1] == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cp", "0"], "--cp 0: must be at least 1"),
        (["--cp", "2", "--cp-method", "rings"], "--cp-method rings: must be one of ring, allgather, ulysses"),
        (["--cp-method", "ulysses"], "--cp-method ulysses: is that of context parallelism; give --cp, too"),
        (["--cp-ulysses", "2"], "--cp-ulysses 2: is that of context parallelism; give --cp, too"),
        (["--cp", "4", "--cp-ulysses", "3"], "--cp-ulysses 3: must divide --cp 4"),
        (["--cp", "4", "--cp-ulysses", "0"], "--cp-ulysses 0: must divide --cp 4"),
        (
            ["--cp", "4", "--cp-ulysses", "2", "--cp-method", "allgather"],
            "--cp-ulysses 2: is around the ring; leave out --cp-method allgather",
        ),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse(["llama", *arguments])
    assert message in capsys.readouterr().err


def test_the_degrees():
    given = (["--cp", "2"], ["--cp", "4", "--fsdp", "2"], ["--pp", "2", "--tp", "2", "--cp", "2"])
    found = [(o.fsdp, o.tp, o.pp, o.cp) for o in (parse(["llama", *arguments]) for arguments in given)]
    assert found == [(1, 1, 1, 2), (2, 1, 1, 4), (1, 2, 2, 2)]


def test_the_document_has_a_section_for_every_mesh():
    document = ""
    for number, mesh in enumerate(
        [
            {"cp": 2},
            {"cp": 4, "cp_method": "ulysses"},
            {"tp": 2, "pp": 2, "cp": 2},
            {"cp": 2},
            {"cp": 4, "cp_ulysses": 2},
        ]
    ):
        report = Report("doge", way="self_attn", documents="refused", notes=["documents: because"])
        setting = setting_of(**mesh)
        document = with_section(document, [report], setting=setting, command=f"number {number}")
    _, *sections = document.split("\n## ")
    assert [section.splitlines()[0] for section in sections] == [
        "cp 2", "cp 4, ulysses", "tp 2 x pp 2 x cp 2", "cp 4, ulysses 2",
    ]  # fmt: skip
    assert "`number 3`" in sections[0], "the last with this mesh"
    assert "| doge | - | - | - | - | - | self_attn | refused | pass; documents: because |" in sections[0]
    assert "| - | - | self_attn | refused |" in sections[2]
