"""Beside accelerate: its launcher starts the trainer, and the loop of docs/accelerate.md runs under it."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.distributed.workers import start_quickly
from tests.jobs import tiny_job

REPOSITORY = Path(__file__).parents[2]
HUB_ID = "Qwen/Qwen3-0.6B"

# A program that runs the Trainer, and a wrapped model, inside the process group that an Accelerator started.
INSIDE = """
import sys
from accelerate import Accelerator
from accelerate.utils import ParallelismConfig as Theirs
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers_backend import HFTransformerModel, ParallelismConfig, Trainer, load_job_config

accelerator = Accelerator(cpu=True, parallelism_config=Theirs())
config = load_job_config(sys.argv[1:])
config.parallelism = ParallelismConfig.from_accelerate(accelerator.parallelism_config)
trainer = Trainer(config)
trainer.train()
trainer.close()
assert dist.is_initialized(), "the Accelerator's process group stays open"
accelerator.print(f"after the run: {trainer.model.dims}, {accelerator.num_processes} processes")
try:
    HFTransformerModel.wrap(accelerator.prepare(AutoModelForCausalLM.from_pretrained("./my_model")))
except ValueError as error:
    accelerator.print(error)
accelerator.end_training()
"""


def _run_launcher(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """What the process of `accelerate launch` does."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    os.chdir(folder)
    os.environ.update(environment)
    launch_command(launch_command_parser().parse_args(arguments))


def launch(*arguments: str, folder: Path) -> str:
    """Run `accelerate launch` with 2 processes on the CPU in `folder`; return all that it printed."""
    program = ["--num_processes=2", "--num_machines=1"]
    program += ["--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(folder / "home"),  # where `accelerate config` may have left something
    }
    printed = folder / "printed.log"
    printed.unlink(missing_ok=True)
    launcher = start_quickly(_run_launcher, [*program, *arguments], folder, environment, printed=printed)
    launcher.join(timeout=300)
    launcher.kill()
    assert launcher.exitcode == 0, printed.read_text()
    return printed.read_text()


def blocks() -> list[str]:
    """The Python code of docs/accelerate.md: the loop, the parallelism config, the sizes."""
    page = (REPOSITORY / "docs" / "accelerate.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, the config of a tiny job, and a tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("accelerate")
    (folder / "text").mkdir()
    for number in range(4):
        (folder / "text" / f"{number}.txt").write_text(f"Text number {number} for the launcher. " * 40)
    tiny_job(folder, "run", training__steps=3).save(folder / "job.toml")
    config = Qwen3Config(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder / "my_model")
    ByT5Tokenizer().save_pretrained(folder / "my_model")
    return folder


def test_the_launcher_starts_the_module_and_the_script(folder: Path) -> None:
    """Under its FSDP settings too, which have no effect: both train alike."""
    runs = {
        "module": ["--use_fsdp", "--fsdp_version=2", "-m", "transformers_backend.train", "job.toml"],
        "script": ["--multi_gpu", "--no_python", str(REPOSITORY / "scripts/train.sh"), "job.toml"],
    }
    for name, arguments in runs.items():
        printed = launch(*arguments, "--job.dump_folder", str(folder / name), folder=folder)
        assert "2 x cpu, mesh dp_shard 2" in printed
        assert printed.count("[rank0]") > 3
        assert [line["step"] for line in metrics(folder / name)] == [1, 2, 3]
    one, other = ([line["loss"] for line in metrics(folder / name)] for name in runs)
    assert one == other
    assert one[2] < one[0]


def test_what_cpu_means_to_the_launcher_is_said(folder: Path) -> None:
    arguments = ["-m", "transformers_backend.train", "job.toml", "--job.dump_folder", str(folder / "alone")]
    printed = launch("--cpu", *arguments, "--training.steps", "2", folder=folder)
    assert "1 x cpu" in printed
    assert "this process trains alone. `accelerate launch` starts several with --multi_gpu" in printed


def test_the_loop_of_the_docs(folder: Path) -> None:
    loop = blocks()[0]
    assert HUB_ID in loop
    (folder / "my_loop.py").write_text(loop.replace(HUB_ID, "./my_model"))
    printed = launch("--multi_gpu", "my_loop.py", folder=folder)
    lines = re.findall(r"^epoch (\d), step (\d+): loss (\S+)$", printed, re.MULTILINE)
    assert [line[:2] for line in lines] == [("1", "4"), ("2", "8")], "the first process prints, for both"

    logged = EventAccumulator(str(folder / "outputs/my_loop/runs")).Reload()
    losses = [event.value for event in logged.Scalars("loss")]
    assert [event.step for event in logged.Scalars("gradient_norm")] == list(range(1, 9))
    assert losses[-1] == pytest.approx(float(lines[-1][2]), abs=1e-4)
    assert all(abs(loss - math.log(384)) < 0.5 for loss in losses)
    before = Qwen3ForCausalLM.from_pretrained(folder / "my_model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "outputs/my_loop/export").state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_the_other_code_of_the_docs(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    _, config, sizes = blocks()
    exec(compile(config, "accelerate.md", "exec"), {})
    assert "data_parallel_replicate_degree=2, data_parallel_shard_degree=4" in capsys.readouterr().out
    assert HUB_ID in sizes
    variables: dict = {}
    exec(compile(sizes.replace(HUB_ID, "./my_model"), "accelerate.md", "exec"), variables)
    parameters = Qwen3ForCausalLM.from_pretrained("my_model").num_parameters()
    assert variables["total"] == pytest.approx(4 * parameters, rel=1e-2), "rotary frequencies are counted too"
    assert re.search(r"on each of 8 ranks: [\d.]+ KB\nthe largest layer, gathered: [\d.]+ KB", capsys.readouterr().out)


def test_the_trainer_inside_an_accelerators_process_group(folder: Path) -> None:
    (folder / "inside.py").write_text(INSIDE)
    printed = launch("--multi_gpu", "inside.py", "job.toml", "--job.dump_folder", str(folder / "inside"), folder=folder)
    assert "after the run: dp_replicate 2, 2 processes" in printed, "an Accelerator means replicas by all sizes of 1"
    assert [line["step"] for line in metrics(folder / "inside")] == [1, 2, 3]
    assert "DistributedDataParallel: not a Transformers model (a PreTrainedModel). Pass on what from_pret" in printed
