"""The README and the hand-written docs under test: commands, code, configs, and the names of keys and files.

Everything happens in a checkout made of links, beside the files that the README supposes a reader to have: a model
folder, text, and `my_run.toml`, `my_training.py` and `my_loop.py`, all written from the pages' own blocks.

- ```bash blocks run as they stand, with stand-ins for Python and the launchers that record how they are called; the
  recorded arguments then go through the real parsers. The default run is also really run, for two short steps, and
  prints lines like those that the README shows.
- ```toml blocks are loaded and checked.
- ```python blocks are executed in their order, with the model's hub id replaced by the folder of a tiny model.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import parse_args as parse_torchrun
from transformers import AutoModelForCausalLM, ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

from scripts.plan_pipeline import parse as parse_plan
from transformers_backend import JobConfig, load_job_config, train
from transformers_backend.job_config.values import field_types
from transformers_backend.verify.command import parse as parse_verify

REPOSITORY = Path(__file__).parents[2]
PAGES = (
    "README.md", "docs/how_it_works.md", "docs/configuration.md", "docs/watching.md", "docs/accelerate.md",
    "docs/contributing.md", "docs/context_parallelism.md",
)  # fmt: skip
HUB_ID = "Qwen/Qwen3-0.6B"
# Steps small enough for a test.
SHORTENED = ["--training.seq_len", "32", "--training.global_batch_size", "4"]
NEEDS_A_GPU = "scripts/gpu_check.sh"

# One write a line: scripts/test.sh starts two at once.
PYTHON = r"""
if [[ "$*" == *device_count* ]]; then echo 0; fi
if [[ "$1" == -m || "$1" == *.py ]]; then printf '%s\n' "$(printf '%q ' python "$@")" >>"$RECORD"; fi
"""
# Records itself, drops its options, and starts one process of the program that follows, with what follows set.
LAUNCHER = r"""
printf '%s\n' "$(printf '%q ' {name} "$@")" >>"$RECORD"
if [[ "$1" == launch ]]; then shift; fi
while [[ "$1" == -* ]]; do shift; done
if [[ "$1" == *.py ]]; then exec python "$@"; fi
if [[ "$1" == transformers_backend.* ]]; then exec python -m "$@"; fi
exec env {variables} "$@"
"""
STAND_INS = {
    "python": PYTHON,
    "torchrun": LAUNCHER.format(name="torchrun", variables=""),
    "accelerate": LAUNCHER.format(name="accelerate", variables="RANK=0 WORLD_SIZE=8 LOCAL_RANK=0"),
    "srun": LAUNCHER.format(name="srun", variables="SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=16"),
}


def read_page(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks_of(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language, in their order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", read_page(page), re.DOTALL | re.MULTILINE)
    return [text for found, text in fenced if found == language]


def all_blocks(language: str) -> list:
    return [
        pytest.param(block, id=f"{page}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks_of(page, language), start=1)
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented") / "checkout"
    folder.mkdir()
    for name in [entry.name for entry in REPOSITORY.iterdir() if not entry.name.startswith(".")] + [".ci"]:
        if name != "outputs":
            (folder / name).symlink_to(REPOSITORY / name)
    config = Qwen3Config(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder / "my_model")
    ByT5Tokenizer().save_pretrained(folder / "my_model")
    for text in ("my_text", "my_held_out_text"):
        (folder / text).mkdir()
        (folder / text / "a.txt").write_text("Some text of the reader's own. " * 40)
    (folder / "my_run.toml").write_text(blocks_of("README.md", "toml")[0])
    (folder / "my_training.py").write_text(blocks_of("README.md", "python")[1])
    (folder / "my_loop.py").write_text(blocks_of("docs/accelerate.md", "python")[0])
    return folder


# --- commands


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_ins")
    for name, script in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("block", all_blocks("bash"))
def test_commands_run_and_their_arguments_are_understood(
    block: str, checkout: Path, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [line for line in block.replace("\\\n", " ").splitlines() if not line.startswith(NEEDS_A_GPU)]
    path = f"{stand_ins}:{os.environ['PATH']}"
    for number, command in enumerate(commands):
        record = tmp_path / str(number)
        environment = {"PATH": path, "PYTHON": str(stand_ins / "python"), "RECORD": str(record), "NPROC": "2"}
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"
        assert record.exists(), f"{command}: starts nothing that is known here"
        monkeypatch.chdir(checkout)
        for line in record.read_text().splitlines():
            program, *arguments = shlex.split(line)
            {"python": check_python, "torchrun": check_torchrun, "accelerate": check_accelerate, "srun": check_srun}[
                program
            ](arguments)
        if program_of(command) in ("srun", "accelerate"):
            assert "transformers_backend.launch" not in record.read_text(), "it has its processes already"


def program_of(command: str) -> str:
    return next(word for word in shlex.split(command) if "=" not in word)


def check_python(arguments: list[str]) -> None:
    """Hand a Python program's arguments to the parser that it has."""
    if arguments[0] != "-m":
        check_file(arguments)
        return
    _, module, *rest = arguments
    if module == "transformers_backend.launch":
        check_torchrun(rest)
    elif module == "transformers_backend.train" and "--help" not in rest:
        load_job_config(rest)  # raises for what it does not understand
    elif module == "transformers_backend.verify":
        assert parse_verify(rest).models
    elif module == "pytest":
        assert all(Path(name).exists() for name in rest if "/" in name and not name.startswith("-"))
    else:
        assert (module, rest[:1]) in [
            ("transformers_backend.train", ["--help"]),
            ("ruff", ["check"]),
            ("ruff", ["format"]),
        ]


def check_file(arguments: list[str]) -> None:
    file, *options = arguments
    if file == "scripts/plan_pipeline.py":
        _, options = parse_plan(options)
        assert load_job_config(options).parallelism.pipeline_parallel_degree > 1
        return
    program = Path("transformers_backend", Path(file).name)  # where a script is only the way to start a module
    text = Path(file).read_text() + (program.read_text() if program.is_file() else "")
    names = [option.removeprefix("--").partition("=")[0] for option in options if option.startswith("--")]
    assert all(re.search(rf'"(--)?{name}"', text) for name in names), f"{file} knows not all of {names}"


def check_torchrun(arguments: list[str]) -> None:
    options = parse_torchrun(arguments)
    module = ["-m"] if options.module else []
    check_python([*module, options.training_script, *options.training_script_args])


def check_accelerate(arguments: list[str]) -> None:
    launch = pytest.importorskip("accelerate.commands.launch", reason="accelerate is not installed")
    options = launch.launch_command_parser().parse_args(arguments[1:])
    assert arguments[0] == "launch"
    if options.module or not options.no_python:
        module = ["-m"] if options.module else []
        check_python([*module, options.training_script, *options.training_script_args])
    else:
        assert Path(options.training_script).is_file()


def check_srun(arguments: list[str]) -> None:
    options = [argument for argument in arguments if argument.startswith("-")]
    assert options == ["--nodes=2", "--ntasks-per-node=8"], "the stand-in sets the variables of these"


def test_the_default_run_prints_what_the_readme_shows(checkout: Path) -> None:
    shortened = "--training.steps 2 --training.local_batch_size 1 --job.sample_tokens 4".split()
    ran = subprocess.run(
        ["scripts/train.sh", *shortened], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHON": sys.executable, "NPROC": "1", "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    printed = {shape_of(line) for line in ran.stdout.splitlines()}
    (shown,) = blocks_of("README.md", "text")
    lines = [line for line in shown.splitlines() if line.startswith("[rank0]")]
    assert len(lines) >= 5
    assert [line for line in lines if shape_of(line) not in printed] == [], ran.stdout
    assert {"config.toml", "metrics.jsonl"} <= {path.name for path in (checkout / "outputs/default").iterdir()}


def shape_of(line: str) -> str:
    """A line without its numbers, and without what depends on the processor and the number of processes."""
    line = re.sub(r"hh:mm:ss|\d[\d.,:]*(e[+-]\d+)?", "#", line)
    return " ".join(re.sub("b?float#", "TYPE", re.sub("mesh [^;]*;", "mesh;", line)).split())


# --- configs and code


@pytest.mark.parametrize("block", all_blocks("toml"))
def test_configs_load(
    block: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(checkout)
    (tmp_path / "example.toml").write_text(block)
    config = load_job_config([str(tmp_path / "example.toml")])
    assert config != load_job_config([])
    assert caplog.text == ""


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process that torchrun might have started; what a run leaves behind in it goes."""
    variables = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",  # any that is free
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    gc.enable()
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_tour_works(checkout: Path, clean_process: None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Train with the TOML, load the result, train in a loop of one's own, go on with the Trainer class."""
    monkeypatch.chdir(checkout)
    load, loop, trainer = blocks_of("README.md", "python")
    assert train.main(["my_run.toml", "--training.steps", "2", *SHORTENED]) == 0

    loaded = execute(load, {"step-500-hf": "step-2-hf"})
    before = AutoModelForCausalLM.from_pretrained("my_model").state_dict()
    after = loaded["model"].state_dict()
    assert after.keys() == before.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert loaded["tokenizer"]("ab").input_ids == ByT5Tokenizer()("ab").input_ids

    execute(loop, {HUB_ID: "./my_model"})
    lines = re.findall(r"^loss (\S+)  gradient norm (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == 2
    assert all(4 < float(loss) < 8 and float(norm) > 0 for loss, norm in lines)  # near ln(384)
    exported = AutoModelForCausalLM.from_pretrained("outputs/my_export").state_dict()
    assert exported.keys() == before.keys()
    assert not torch.equal(exported["model.norm.weight"], before["model.norm.weight"])

    options = ", ".join(f'"{word}"' for word in ["--training.steps", "3", *SHORTENED])
    ran = execute(trainer, {'"--training.steps", "10"': options})
    assert ran["trainer"].step == 3
    assert Path("outputs/from_python/checkpoint/step-3").is_dir()
    assert not Path("outputs/my_run/checkpoint/step-3").exists(), "the finished run is left alone"


def execute(code: str, replacements: dict[str, str]) -> dict:
    """Run a block with some strings replaced, each of which must be in it; returns its variables."""
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new)
    variables: dict = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), variables)
    return variables


# --- names


def test_keys_exist() -> None:
    sections = field_types(JobConfig)
    named = re.findall(rf"`({'|'.join(sections)})\.(\w+)", read_page("docs/configuration.md"))
    assert len(named) > 20
    assert [f"{section}.{key}" for section, key in named if key not in field_types(sections[section])] == []


def test_every_section_is_explained() -> None:
    rows = re.findall(r"^\| `\[(\w+)\]` \|", read_page("docs/configuration.md"), re.MULTILINE)
    assert sorted(rows) == sorted(field_types(JobConfig))


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page: str) -> None:
    folders = "transformers_backend|parallelize|scripts|tests|train_configs|docs"
    files = [REPOSITORY / name for name in re.findall(rf"`((?:{folders})/[\w./]*)", read_page(page))]
    links = re.findall(r"\]\((?!https?://)([^)#]+)", read_page(page))
    files += [(REPOSITORY / page).parent / link for link in links]
    assert [str(file) for file in files if not file.exists()] == []


def test_the_picture_brings_its_own_colours() -> None:
    """It is shown on light and on dark pages: no text or line may be left in the default black."""
    picture = ElementTree.parse(REPOSITORY / "docs" / "flow.svg").getroot()
    texts = [element for element in picture.iter() if element.tag.endswith("}text")]
    assert len(texts) > 10
    assert all("fill" in element.attrib for element in texts)
