"""Stop requests in one process, and the processes that must and must not end on a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.workers import Messages
from tests.jobs import restored_process, tiny_job
from transformers_backend import HFTransformerModel, Trainer, train
from transformers_backend import trainer as trainer_module
from transformers_backend.checkpoint.checkpointer import Checkpointer
from transformers_backend.checkpoint.writing import Writer
from transformers_backend.signals import STOP_SIGNALS, StopRequest

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_ends_nothing(
    number: signal.Signals, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers_backend.signals.SECONDS_BETWEEN_INTERRUPTS", 60.0)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.agreed() is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the same one on two ways
        assert stop.agreed() == number
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == f"{number.name}: the run stops after this step\n"


def test_a_group_of_its_own_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody else has started a process group of NCCL alone, which has none for the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
        with StopRequest() as stop:
            group = stop._group
            assert dist.get_process_group_ranks(group) == [0]
            assert stop.agreed() is None
        with pytest.raises(KeyError):  # torch knows it no more
            dist.get_process_group_ranks(group)
        assert dist.is_initialized(), "theirs stays"
    finally:
        dist.destroy_process_group()


def _run(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


_IMPORT = "import os, signal, sys, time\nfrom transformers_backend import signals\n"


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    process = _run(
        _IMPORT + "signals.SECONDS_BETWEEN_INTERRUPTS = 0.2\n"
        "with signals.StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"  # Slurm's second word: the run is still saving
        "    time.sleep(0.3)\n"
        "    print('still there', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(300)\n"
    )
    output, _ = process.communicate(timeout=240)
    assert output == "still there\n"
    assert process.returncode == -signal.SIGINT


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
def test_a_shielded_child_ends_for_its_parent_alone() -> None:
    process = _run(
        _IMPORT + "child = os.fork()\n"
        "if child == 0:\n"
        "    signals.shield_child_process()\n"
        "    os.write(1, b'ready\\n')\n"
        "    time.sleep(300)\n"
        "os.write(1, f'{child}\\n'.encode())\n"
        "sys.stdin.readline()\n"
        "time.sleep(0.3)\n"  # for a child that would end
        "print(os.waitpid(child, os.WNOHANG)[0], flush=True)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "print(os.waitpid(child, 0)[1], flush=True)\n"
    )
    lines = {process.stdout.readline().strip() for _ in range(2)}
    child = int(next(line for line in lines if line != "ready"))
    for number in STOP_SIGNALS:  # from this process, as Slurm would
        os.kill(child, number)
    still_running, status = process.communicate("the signals are sent\n", timeout=240)[0].splitlines()
    assert still_running == "0", "a child that has ended would be reported by its number"
    assert status == "0", "SIGTERM of the parent ended it"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_rank_dies_with_its_launcher() -> None:
    process = _run(
        _IMPORT + "child = os.fork()\n"
        "if child == 0:\n"
        "    signals.die_with_parent()\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "    time.sleep(300)\n"
        "os.waitpid(child, 0)\n"
    )
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while _is_running(child):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def _is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _train(config, monkeypatch: pytest.MonkeyPatch, *, signal_in_step: int = 0) -> tuple[int, list[str]]:
    """Run a job in this process; returns the steps done and what it said."""
    trainer, step_of_trainer = Trainer(config), Trainer.train_step

    def train_step(self: Trainer):
        if self.step + 1 == signal_in_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of_trainer(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with Messages("transformers_backend") as messages:
        trainer.train()
    monkeypatch.undo()
    trainer.close()
    return trainer.step, messages.texts


def test_a_stopped_run_goes_on_and_a_finished_one_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.txt").write_text("some text that is long enough\n" * 20)
    options = {"checkpoint__enable": True, "training__steps": 4, "checkpoint__last_save_in_hf": True}
    config, saved = tiny_job(tmp_path, "run", **options), tmp_path / "run" / "checkpoint"
    step, said = _train(config, monkeypatch, signal_in_step=2)
    assert step == 2
    assert said[-1] == "SIGTERM: stopped after step 2 of 4; saved, the same command goes on from there"
    assert [path.name for path in saved.iterdir()] == ["step-2"], "no export of a run that has not finished"
    step, _ = _train(config, monkeypatch)
    assert step == 4
    assert (saved / "step-4-hf").is_dir()
    _, said = _train(config, monkeypatch)
    assert any("nothing to do: step 4 of 4 is reached. Raise training.steps to go on" in text for text in said)
    config.checkpoint.enable = False
    step, said = _train(config, monkeypatch, signal_in_step=3)
    assert step == 3
    assert said[-1] == "SIGTERM: stopped after step 3 of 4; nothing is saved, because checkpoint.enable is false"
    step, said = _train(config, monkeypatch, signal_in_step=4)
    assert step == 4
    assert not any("SIGTERM" in text for text in said), "the last step was the last anyway"


def _signal_in(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: signal.Signals, pause=0.0) -> None:
    """Have the first call of a function begin with a signal to this process, and then a pause in seconds."""
    original, calls = getattr(owner, name), []

    def signalled(*arguments, **options):
        calls.append(name)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
            time.sleep(pause)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, signalled)


@pytest.mark.parametrize(
    ("owner", "name", "stops"),
    [
        (Trainer, "evaluate", True),
        (Checkpointer, "save", True),
        (Writer, "_write", True),  # in the thread that saves beside training
        (HFTransformerModel, "save_pretrained", False),  # the export of a run that is at its end
    ],
    ids=["validation", "save", "save beside training", "export"],
)
def test_a_signal_beside_the_steps_cuts_nothing_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, stops: bool
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.txt").write_text("some text that is long enough\n" * 20)
    options = {"checkpoint__enable": True, "checkpoint__interval": 2, "checkpoint__last_save_in_hf": True,
               "checkpoint__keep_latest_k": 0, "training__steps": 200 if stops else 2, "validation__enable": True,
               "validation__freq": 2, "validation__dataset_path": f"{tmp_path}/text"}  # fmt: skip
    beside_training = owner is Writer
    config = tiny_job(tmp_path, "run", **options)
    config.checkpoint.async_mode = "async" if beside_training else "disabled"
    _signal_in(monkeypatch, owner, name, signal.SIGUSR1, pause=0.5 if beside_training else 0.0)
    step, said = _train(config, monkeypatch)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir())
    if not stops:
        assert saved == ["step-2", "step-2-hf"]
        assert (tmp_path / "run" / "checkpoint" / "step-2-hf" / "model.safetensors").is_file()
        assert not any("SIGUSR1" in text for text in said), "there is nothing to go on with"
        return
    assert said[-1] == f"SIGUSR1: stopped after step {step} of 200; saved, the same command goes on from there"
    by_interval = {f"step-{number}" for number in range(2, step, 2)}  # beside training, a step or two may go by
    assert saved == sorted(by_interval | {f"step-{step}"}), "the save under way, and that of the stop"
    assert beside_training or step == 2
    config.training.steps = step + 1
    step, _ = _train(config, monkeypatch)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, step + 1))
    assert step == config.training.steps


def test_ctrl_c_in_set_up_is_one_line_and_the_command_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.txt").write_text("some text that is long enough\n" * 20)
    tiny_job(tmp_path, "run", training__steps=1).save(tmp_path / "job.toml")
    _signal_in(monkeypatch, trainer_module, "build_model", signal.SIGINT)
    with restored_process():
        assert train.main([str(tmp_path / "job.toml")]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == (
            "SIGINT: stopped before the first step; there is nothing to save"
        )
        assert not dist.is_initialized()
        assert train.main([str(tmp_path / "job.toml")]) == 0
