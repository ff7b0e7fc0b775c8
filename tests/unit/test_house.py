"""The house in order: the README's tree, the import contracts, the pins, and the scripts' way to start training."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = [*sorted((REPOSITORY / "scripts").glob("*.sh")), REPOSITORY / ".ci" / "run"]
A_FILE_OR_FOLDER = re.compile(r"(?=.*[./])[\w.*/-]+|LICENSE")

# --- the README's tree


def read_tree(readme: str) -> dict[str, list[str]]:
    """Parse the README's tree into the names under each folder; "" is the checkout itself.

    The tree is the fenced block with a line that begins with `transformers_backend/`. A line is indented under its
    folder (spaces or box characters) and begins with a folder's name, which ends in `/`, or those of one or more
    files, which have a dot. What follows is the description; names that it begins with are some of the folder's own.
    `...` among the names says that a folder holds more.
    """
    block = next(
        (
            b
            for b in re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL)
            if re.search(r"^\W*transformers_backend/", b, re.M)
        ),
        None,
    )
    assert block is not None, "README.md has no fenced block with the tree (a line that begins transformers_backend/)"
    tree: dict[str, list[str]] = {"": []}
    open_folders: list[tuple[int, str]] = []  # (column, path)
    for line in block.splitlines():
        text = re.sub(r"[│├└─|`]", " ", line)
        names = _leading_names(text.split())
        if not names:
            continue
        column = len(text) - len(text.lstrip())
        while open_folders and open_folders[-1][0] >= column:
            open_folders.pop()
        parent = open_folders[-1][1] if open_folders else ""
        if not names[0].endswith("/"):
            tree.setdefault(parent, []).extend(names)
            continue
        folder, *some_inside = names
        tree.setdefault(parent, []).append(folder)
        if some_inside:
            tree[parent + folder] = [*some_inside, "..."]
        open_folders.append((column, parent + folder))
    return tree


def _leading_names(words: list[str]) -> list[str]:
    names = []
    for word in words:
        name = word.rstrip(",")
        if name != "..." and not A_FILE_OR_FOLDER.fullmatch(name):
            break
        names.append(name)
    return names


def names_on_disk(folder: Path) -> list[str]:
    """What a reader sees in a folder of the checkout, folders with a `/`: no hidden, ignored, or licence files."""
    ignored = [
        line.rstrip("/") for line in (REPOSITORY / ".gitignore").read_text().splitlines() if line[:1] not in "# "
    ]
    return [
        entry.name + "/" * entry.is_dir()
        for entry in sorted(folder.iterdir())
        if not entry.name.startswith(".")
        and entry.name not in ("LICENSE", "__init__.py")
        and not any(fnmatch.fnmatch(entry.name, pattern) for pattern in ignored)
    ]


def test_what_the_readme_names_is_on_disk() -> None:
    tree = read_tree((REPOSITORY / "README.md").read_text())
    missing = [
        folder + name
        for folder, names in tree.items()
        for name in names
        if name != "..." and not list(REPOSITORY.glob((folder + name).rstrip("/")))
    ]
    assert missing == [], f"README.md's tree names what is not there: {missing}"


def test_what_is_on_disk_is_in_the_readme() -> None:
    tree = read_tree((REPOSITORY / "README.md").read_text())
    unnamed = [
        folder + entry
        for folder, names in tree.items()
        if "..." not in names
        for entry in names_on_disk(REPOSITORY / folder)
        if not any(fnmatch.fnmatch(entry, name) for name in names)
    ]
    assert unnamed == [], f"README.md's tree leaves out: {unnamed}"


def test_a_tree_is_read_with_several_names_a_line_and_box_characters() -> None:
    readme = """
```
pyproject.toml
transformers_backend/     the application. Knows all
├── train.py              main()
│   loss.py  data.py      from logits, to text
└── weights/  two files
    └── load.py, save.py
scripts/                  train.sh, test.sh and others
docs/                     what else there is to read
  ...
```
"""
    assert read_tree(readme) == {
        "": ["pyproject.toml", "transformers_backend/", "scripts/", "docs/"],
        "transformers_backend/": ["train.py", "loss.py", "data.py", "weights/"],
        "transformers_backend/weights/": ["load.py", "save.py"],
        "scripts/": ["train.sh", "test.sh", "..."],
        "docs/": ["..."],
    }


# --- imports and versions


def test_imports_run_one_way() -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    found = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


def _project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_every_dependency_has_a_pin_that_it_allows() -> None:
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / "constraints.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    project = _project()
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        versions = [specifier for pin in pins if pin.name == requirement.name for specifier in pin.specifier]
        assert [v.operator for v in versions] == ["=="], f"constraints.txt must pin {requirement.name} once"
        assert versions[0].version in requirement.specifier, f"{requirement}, but constraints.txt has {versions[0]}"


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.14"])
def test_numpy_has_one_pin_for_each_python(python_version: str) -> None:
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / "constraints.txt").read_text().splitlines()]
    environment = {**default_environment(), "python_version": python_version}
    numpy_pins = [pin for line in lines if line.startswith("numpy") if (pin := Requirement(line)).marker]
    assert sum(pin.marker.evaluate(environment) for pin in numpy_pins if pin.marker) == 1


def test_the_set_up_accepts_the_versions_that_the_project_supports() -> None:
    script = (REPOSITORY / "scripts" / "setup_environment.sh").read_text()
    for requirement in map(Requirement, _project()["dependencies"]):
        for specifier in requirement.specifier:
            assert f'"{requirement.name}": ({specifier.version.replace(".", ", ")})' in script


# --- the scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_sound_and_executable(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert os.access(script, os.X_OK), f"chmod +x {script}"
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A stand-in for Python that has everything installed, sees no GPU, and prints how a module is started."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        "#!/usr/bin/env bash\n"
        'if [[ "$*" == *device_count* ]]; then echo 0; fi\n'
        'if [[ "$1" == -m ]]; then echo "$PWD" "$@"; env; fi\n'
    )
    stand_in.chmod(0o755)
    return stand_in


def run_script(name: str, *arguments: str, python: Path, cwd: Path = REPOSITORY, **variables: str) -> tuple[str, dict]:
    """Run a script with a stand-in for Python; return the command line that it ends in, and that one's environment."""
    ran = subprocess.run(
        [REPOSITORY / "scripts" / name, *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    command, *environment = ran.stdout.splitlines()
    assert command.startswith(f"{REPOSITORY} "), "scripts run in the checkout"
    return command.removeprefix(f"{REPOSITORY} "), dict(line.split("=", 1) for line in environment if "=" in line)


def test_training_starts_by_the_launcher_on_this_node(recorder: Path) -> None:
    command, environment = run_script("train.sh", "--training.steps", "3", python=recorder, NPROC="4")
    assert command == (
        "-m transformers_backend.launch --nproc-per-node 4 --nnodes 1 --max-restarts 0 --standalone "
        "-m transformers_backend.train --training.steps 3"
    )
    assert environment["PYTHONPATH"] == str(REPOSITORY)
    assert int(environment["OMP_NUM_THREADS"]) >= 1


def test_training_starts_by_the_launcher_on_several_nodes(recorder: Path) -> None:
    command, _ = run_script(
        "train.sh", python=recorder, NPROC="8", NNODES="2", NODE_RANK="1", RDZV_ENDPOINT="host:1234", RDZV_ID="run",
        MAX_RESTARTS="3",
    )  # fmt: skip
    assert command == (
        "-m transformers_backend.launch --nproc-per-node 8 --nnodes 2 --max-restarts 3 --rdzv-backend c10d "
        "--rdzv-endpoint host:1234 --rdzv-id run --node-rank 1 -m transformers_backend.train"
    )


def test_several_nodes_without_a_meeting_point_are_refused(recorder: Path) -> None:
    ran = subprocess.run(
        [REPOSITORY / "scripts" / "train.sh"],
        env={"PATH": os.environ["PATH"], "PYTHON": str(recorder), "NPROC": "1", "NNODES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "NNODES = 2 needs RDZV_ENDPOINT: set it to host:port of one of the nodes" in ran.stderr


def test_a_started_process_trains_without_the_launcher(recorder: Path) -> None:
    command, environment = run_script("train.sh", python=recorder, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert command == "-m transformers_backend.train"
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("1", "2")


@pytest.mark.parametrize(
    ("nodes", "first"), [("node[03-07,12]", "node03"), ("gpu-a,gpu-b", "gpu-a"), ("one", "one"), ("n[5,7],m1", "n5")]
)
def test_a_task_of_srun_trains_without_the_launcher(recorder: Path, nodes: str, first: str) -> None:
    slurm = {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_JOB_ID": "100", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": nodes, "SLURM_CPUS_PER_TASK": "6",
    }  # fmt: skip
    command, environment = run_script("train.sh", python=recorder, **slurm)
    assert command == "-m transformers_backend.train"
    wanted = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": first, "OMP_NUM_THREADS": "6"}
    assert wanted.items() <= environment.items()
    assert 20000 <= int(environment["MASTER_PORT"]) < 30000


def test_a_batch_script_is_no_task_of_srun(recorder: Path) -> None:
    """The script that sbatch runs has SLURM_PROCID = 0 and the job's SLURM_NTASKS: it must not wait for others."""
    slurm = {"SLURM_JOB_ID": "100", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    command, environment = run_script("train.sh", python=recorder, **slurm)
    assert command.startswith("-m transformers_backend.launch")
    assert "RANK" not in environment


def test_help_comes_without_the_launcher(recorder: Path) -> None:
    command, _ = run_script("train.sh", "--help", python=recorder)
    assert command == "-m transformers_backend.train --help"


def test_a_config_is_looked_up_from_where_the_user_is(recorder: Path, tmp_path: Path) -> None:
    (tmp_path / "my.toml").touch()
    command, _ = run_script("train.sh", "my.toml", "--job.dump_folder", "out", python=recorder, cwd=tmp_path, NPROC="1")
    assert command.endswith(f"-m transformers_backend.train {tmp_path}/my.toml --job.dump_folder out")
    command, _ = run_script("train.sh", "train_configs/some.toml", python=recorder, cwd=tmp_path, NPROC="1")
    assert command.endswith("-m transformers_backend.train train_configs/some.toml"), "or else from the checkout"


def test_verify_passes_its_arguments_on(recorder: Path) -> None:
    command, _ = run_script("verify.sh", "llama", "--fsdp", "2", python=recorder)
    assert command == "-m transformers_backend.verify llama --fsdp 2"


def test_a_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/usr/bin/env bash\nexit 1\n")
    old.chmod(0o755)
    ran = subprocess.run(
        [REPOSITORY / "scripts" / "train.sh"],
        env={"PATH": os.environ["PATH"], "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert f"{old} is no Python >= 3.10; install one, or name it with PYTHON=" in ran.stderr
