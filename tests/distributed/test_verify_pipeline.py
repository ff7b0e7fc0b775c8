"""The parity report for pipelines: stages of several models, several schedules, beside tensor parallelism."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from parallelize.config import PIPELINE_SCHEDULES
from tests.distributed.workers import WorkerPool, quick_context
from transformers_backend import HFTransformerModel
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.twin import build_twin
from transformers_backend.verify import Report, compare, main, verify
from transformers_backend.verify.command import parse
from transformers_backend.verify.compare import global_batch
from transformers_backend.verify.pipeline import minimum_layers, rows_of_a_call, seen_gradients
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


def check_passed(report: Report, stages: str, held_by_several: str) -> None:
    assert report.verdict == "pass", report
    assert report.loss_difference <= LOSS, report
    assert report.gradient_error <= GRADIENT, report
    assert report.norm_error <= GRADIENT, report
    assert report.evaluation_difference <= LOSS, report
    assert report.pretrained_loss_difference <= LOSS, report
    assert report.export == "bit-equal", report
    assert (report.stages, report.held_by_several) == (stages, held_by_several), report


def test_two_stages_and_what_cannot_be_cut(quick: None):
    gpt2, gemma3n, refused = verify(["gpt2", "gemma3n_text", "hrm_text"], fsdp=1, pp=2)
    check_passed(gpt2, "2 + 2", "wte")
    every_layer = "embed_tokens_per_layer, per_layer_model_projection, per_layer_projection_norm"
    check_passed(gemma3n, "2 + 4", f"embed_tokens, {every_layer}")
    assert refused.verdict == "refused"
    assert "does not run its layers once" in refused.reason
    assert refused.loss_difference is refused.gradient_error is None


def test_a_pipeline_longer_than_a_model_is_refused_without_processes(monkeypatch: pytest.MonkeyPatch):
    """Of gpt2, which is not refused so, all is left to the processes; and a name that is no model, too."""
    started = []
    monkeypatch.setattr(compare, "_run_processes", lambda models, *_: started.extend(models) or map(Report, models))
    seen = []
    reports = verify(["llama", "gpt2"], fsdp=1, pp=200, on_report=seen.append)
    assert ([report.verdict for report in reports], reports, started) == (["refused"] * 2, seen, [])
    assert "makes 200 stages" in reports[0].reason
    assert "the model has 32 layers" in reports[0].reason
    assert reports[0].model_class == "LlamaForCausalLM"
    reports = verify(["bert", "gpt2", "bloom"], fsdp=1, pp=2, schedule="Interleaved1F1B")
    assert [report.verdict for report in reports] == ["pass", "pass", "refused"], "BLOOM has two layers by default"
    assert started == ["bert", "gpt2"]


def test_a_schedule_with_two_stages_a_rank(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    document = tmp_path / "MODELS.md"
    arguments = ["llama", "gpt2", "--pp", "2", "--schedule", "zbvzerobubble", "--write-docs", str(document)]
    assert main(arguments) == 0
    header, llama, gpt2, summary = capsys.readouterr().out.splitlines()
    at = header.index("stages")
    assert header[at:].split() == ["stages", "held", "by", "several", "verdict"]
    assert llama[at:].split() == gpt2[at:].split() == [*"2+2+2+2", "-", "pass"], "a rank has the first and last stage"
    assert summary == "2 pass, 0 refused, 0 fail"
    assert "\n## pp 2, ZBVZeroBubble\n" in document.read_text()
    assert "| stages | held by several | verdict |" in document.read_text()


def test_two_stages_of_two_tensor_parallel_ranks(quick: None):
    qwen3, gpt2 = verify(["qwen3", "gpt2"], fsdp=1, tp=2, pp=2)
    check_passed(qwen3, "2 + 2", "-")
    check_passed(gpt2, "2 + 2", "wte")
    assert qwen3.sharded == 1.0
    assert qwen3.sequence_parallel
    assert gpt2.sequence_parallel


def see_own_copy() -> tuple[list[float], list[float]]:
    """Rank 1 spoils its copy of the tied embedding's gradient, and loses the one of its last norm."""
    hf_config, model_class = HFTransformerModelArgs(model_type="gpt2").resolve()
    assert model_class is GPT2LMHeadModel
    parallelism = setting_of(pp=2).parallelism
    model = HFTransformerModel.wrap(build_twin(hf_config, model_class, minimum_layers=2)).parallelize(parallelism)
    model.forward_backward(*global_batch(rows_of_a_call(parallelism)))
    before = seen_gradients(model)
    if model.pipelined.rank == 1:
        model.hf_model.transformer.wte.weight.grad.add_(1.0)
        model.hf_model.transformer.ln_f.weight.grad = None
    after = seen_gradients(model)
    assert before.keys() - after.keys() == {"transformer.ln_f.weight"}
    changed = [name for name, gradient in after.items() if not torch.equal(gradient, before[name])]
    return changed, (after["transformer.wte.weight"] - before["transformer.wte.weight"]).round().unique().tolist()


def test_a_copy_that_is_wrong_on_one_rank_is_seen_there():
    with WorkerPool(2) as pool:
        first, second = pool.run(see_own_copy)
    assert first == ([], [0.0])
    assert second == (["transformer.wte.weight"], [1.0])


def test_twins_and_batches_are_large_enough():
    for schedule in PIPELINE_SCHEDULES:
        for degree in (2, 4):
            parallelism = setting_of(pp=degree, schedule=schedule).parallelism
            stages = degree if schedule in ("GPipe", "1F1B") else 2 * degree
            assert minimum_layers(parallelism) == 2 * stages
            rows = rows_of_a_call(parallelism)
            assert rows % parallelism.pipeline_parallel_microbatch_size == 0
            micro_batches = rows // parallelism.pipeline_parallel_microbatch_size
            assert micro_batches >= 2 * degree, "DualPipeV's minimum"
            assert micro_batches % degree == 0, "for the interleaved ones"
    assert minimum_layers(setting_of(fsdp=2).parallelism) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pp", "0"], "--pp 0: must be at least 1"),
        (["--pp", "2", "--schedule", "1F2B"], "--schedule 1F2B: must be one of GPipe, 1F1B,"),
        (["--schedule", "GPipe"], "--schedule GPipe: is that of a pipeline; give --pp, too"),
        (["--pp", "2", "--schedule", "DualPipeV", "--compile"], "--schedule DualPipeV: with --compile"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse(["llama", *arguments])
    assert message in capsys.readouterr().err


def test_the_degrees():
    given = (["--pp", "2"], ["--pp", "4", "--fsdp", "2"], ["--pp", "2", "--tp", "2"])
    found = [(o.fsdp, o.tp, o.pp, o.schedule) for o in (parse(["llama", *arguments]) for arguments in given)]
    assert found == [(1, 1, 2, "1F1B"), (2, 1, 4, "1F1B"), (1, 2, 2, "1F1B")]


def test_the_document_has_a_section_for_every_mesh_and_schedule():
    meshes = [
        setting_of(pp=2), setting_of(fsdp=2, tp=2, pp=2), setting_of(pp=2, schedule="gpipe"),
        setting_of(pp=2, schedule="1f1b"),
    ]  # fmt: skip
    document = ""
    for number, setting in enumerate(meshes):
        report = Report("llama", stages="2 + 2", held_by_several="-")
        document = with_section(document, [report], setting=setting, command=f"number {number}")
    _, *sections = document.split("\n## ")
    assert [section.splitlines()[0] for section in sections] == ["pp 2", "fsdp 2 x tp 2 x pp 2", "pp 2, GPipe"]
    assert "`number 3`" in sections[0], "the last with this mesh and schedule"
    assert "| llama | - | - | - | - | - | - | - | 2 + 2 | - | pass |" in sections[1]
