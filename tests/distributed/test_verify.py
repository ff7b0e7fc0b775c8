"""The parity report over every dense type: loss, gradients, load and export on 2 gloo processes."""

from __future__ import annotations

import pytest

from transformers_backend.verify import DENSE_MODEL_TYPES, PRETRAINED_LOSS_TOLERANCE, verify

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
            assert report.pretrained_loss_difference <= LOADED_LOSS, report
            assert report.export == "bit-equal", report
            assert report.worst_parameter
            assert not report.notes, "no model needs the full logits"
    assert PRETRAINED_LOSS_TOLERANCE <= LOADED_LOSS


def test_what_cannot_be_trained_is_refused_with_the_reason():
    reports = {report.model: report for report in verify(["bert", "t5", "lama"], fsdp=1)}
    assert {report.verdict for report in reports.values()} == {"refused"}
    assert "not a causal language model" in reports["bert"].reason
    assert "encoder-decoder" in reports["t5"].reason
    assert "llama" in reports["lama"].reason, "the nearest type is named"


@pytest.mark.parametrize("arguments", [[], ["llama", "--fsdp", "0"]])
def test_the_command_says_what_is_missing(arguments: list[str], capsys: pytest.CaptureFixture):
    from transformers_backend.verify import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert ("--fsdp 0: must be at least 1" if arguments else "name at least one model type") in capsys.readouterr().err
