"""TensorBoard and W&B get the same figures as metrics.jsonl, also after a resume; what is missing is named."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from tests.jobs import restored_process, tiny_job
from transformers_backend import Trainer
from transformers_backend.metrics import MetricsLogger, check_trackers_installed, open_trackers


def _record(
    folder: Path, *, steps_done: int = 0, steps: tuple[int, ...] = (10,), loss: float = 1.5, **trackers
) -> None:
    options = {"tensorboard_folder": None, "wandb": False, "description": "a test", "config": {"debug": {"seed": 1}}}
    folder.mkdir(exist_ok=True)
    with MetricsLogger(
        folder, is_main=True, device=torch.device("cpu"), flops_per_token=2e9, peak_flops_per_device=None, world_size=1,
        steps_done=steps_done, total_steps=20,
        trackers=open_trackers(folder, steps_done=steps_done, **(options | trackers)),
    ) as logger:  # fmt: skip
        for step in steps:
            logger.log(step, loss=loss, grad_norm=0.5, lr=1e-3, tokens=800)
        logger.log_validation(steps[-1], 2.5, 600)


# -- TensorBoard


def _events(folder: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder)).Reload()


def test_tensorboard_gets_the_same_numbers(tmp_path):
    _record(tmp_path / "run", tensorboard_folder=tmp_path / "tb")
    events = _events(tmp_path / "tb")
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("validation/validation_loss")] == [(10, 2.5)]
    assert "train/mfu" not in events.Tags()["scalars"]


def test_tensorboard_after_a_resume_shows_each_step_once(tmp_path):
    _record(tmp_path / "run", tensorboard_folder=tmp_path / "tb", steps=(1, 2, 3))
    _record(tmp_path / "run", tensorboard_folder=tmp_path / "tb", steps=(2, 3), loss=7.0, steps_done=1)
    losses = [(event.step, event.value) for event in _events(tmp_path / "tb").Scalars("train/loss")]
    assert losses == [(1, 1.5), (2, 7.0), (3, 7.0)]


def test_tensorboard_shows_the_latest_of_several_runs_in_one_folder(tmp_path):
    for loss in (1.0, 2.0):
        _record(tmp_path / "run", tensorboard_folder=tmp_path / "tb", loss=loss)
    assert [event.value for event in _events(tmp_path / "tb").Scalars("train/loss")] == [2.0]


# -- W&B


class FakeRun:
    def __init__(self, options: dict) -> None:
        self.options, self.lines, self.finished = options, [], False
        self.id = options["id"] or f"made-up-{Path(options['dir']).name}"

    def log(self, figures: dict[str, float], step: int) -> None:
        assert not self.finished
        self.lines.append((step, figures))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> types.ModuleType:
    """A module that stands for W&B: it keeps the runs that were begun."""
    module = types.ModuleType("wandb")
    module.runs, module.errors = [], types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def init(**options) -> FakeRun:
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_name_notes_config_and_figures(tmp_path, wandb):
    _record(tmp_path / "my_run", wandb=True)
    (run,) = wandb.runs
    assert (run.options["name"], run.options["notes"], run.options["id"]) == ("my_run", "a test", None)
    assert run.options["config"] == {"debug": {"seed": 1}}
    assert run.options["dir"] == str(tmp_path / "my_run")
    (step, figures), (validation_step, validation) = run.lines
    assert (step, figures["train/loss"], figures["train/lr"]) == (10, 1.5, 1e-3)
    assert "train/mfu" not in figures, "None is no figure"
    assert (validation_step, validation["validation/validation_loss"]) == (10, 2.5)
    assert run.finished


def test_a_resumed_run_goes_on_in_its_wandb_run_and_a_new_one_does_not(tmp_path, wandb):
    _record(tmp_path / "run", wandb=True)
    _record(tmp_path / "run", wandb=True, steps=(12,), steps_done=11)
    _record(tmp_path / "run", wandb=True)
    assert [run.options["id"] for run in wandb.runs] == [None, "made-up-run", None]
    assert wandb.runs[1].options["resume"] == "allow"


def test_a_wandb_that_does_not_start_is_told_with_the_remedies(tmp_path, wandb):
    def init(**options):
        raise wandb.errors.Error("api_key not configured")

    wandb.init = init
    with pytest.raises(ValueError, match=r"enable_wandb = true: W&B does not start \(api_key.*`wandb login`.*offline"):
        _record(tmp_path / "run", wandb=True)


def test_a_job_feeds_the_trackers_that_it_asks_for(tmp_path, wandb):
    (tmp_path / "text.txt").write_text("some text of a few tokens. " * 40)
    config = tiny_job(
        tmp_path, "run", training__dataset_path=str(tmp_path / "text.txt"), training__steps=2,
        metrics__enable_wandb=True, metrics__enable_tensorboard=True, job__description="watched",
    )  # fmt: skip
    with restored_process():
        trainer = Trainer(config)
        trainer.train()
        trainer.close()
    (run,) = wandb.runs
    assert [step for step, _ in run.lines] == [1, 2]
    assert (run.options["name"], run.options["notes"]) == ("run", "watched")
    assert run.options["config"]["training"]["steps"] == 2
    assert run.finished
    events = _events(tmp_path / "run" / "tb").Scalars("train/data_wait_share")
    assert [event.step for event in events] == [1, 2]


@pytest.mark.parametrize(
    ("key", "module", "package"),
    [("tensorboard", "torch.utils.tensorboard", "tensorboard"), ("wandb", "wandb", "wandb")],
)
def test_what_is_not_installed_is_named_before_anything_starts(monkeypatch, key: str, module: str, package: str):
    monkeypatch.setitem(sys.modules, module, None)
    wanted = {"tensorboard": False, "wandb": False}
    check_trackers_installed(**wanted)
    with pytest.raises(ImportError, match=rf"metrics.enable_{key} = true needs.*pip install {package}"):
        check_trackers_installed(**(wanted | {key: True}))
