"""scripts/export.py on one process: any checkpoint of a run becomes the folder that the run itself would export."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shlex
import shutil
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.jobs import tiny_job
from transformers_backend import Trainer, export, generate
from transformers_backend.export import export_checkpoint, main
from transformers_backend.saved_checkpoint import NoCheckpointError, SavedCheckpoint, find_checkpoint
from transformers_backend.twin import build_twin

STEP = "run/checkpoint/step-1"


def _train(folder: Path, name: str = "run", **changes) -> None:
    """One step of the tiny job with a checkpoint; the run's own export goes to `folder`/`name`-live."""
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    changes = {"training__steps": 1, "checkpoint__enable": True, **changes}
    trainer = Trainer(tiny_job(folder, name, **changes))
    try:
        trainer.train()
        trainer.model.save_pretrained(folder / f"{name}-live", tokenizer=trainer.tokenizer)
        torch.save(trainer.model.full_state_dict(), folder / f"{name}.pt")
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    _train(folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage; its data and its working folder are gone."""
    shutil.copytree(trained / "run", tmp_path / "run")
    for config in (tmp_path / "run").rglob("config.toml"):
        config.write_text(config.read_text().replace(str(trained), "/gone"))
    return tmp_path / "run"


def _assert_same_folders(one: Path, other: Path) -> None:
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def _assert_loads(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def test_the_command_writes_what_the_run_would_have_exported(
    trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(run / "checkpoint" / "step-1")]) == 0
    exported = run / "checkpoint" / "step-1-hf"
    assert capsys.readouterr().out.startswith(f"exported to {exported}: 1 weight file, ")
    _assert_same_folders(exported, trained / "run-live")
    _assert_loads(exported, torch.load(trained / "run.pt"))
    assert AutoTokenizer.from_pretrained(exported)("abc").input_ids == ByT5Tokenizer()("abc").input_ids


OTHER_MODELS = {
    "tied": {"hf_transformers__model_type": "qwen2"},
    "head of another name": {"hf_transformers__model_type": "gpt_neox"},
    "bfloat16": {"hf_transformers__model_type": "llama", "training__dtype": "bfloat16"},
}


@pytest.mark.parametrize("changes", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_other_models(tmp_path: Path, changes: dict):
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if changes["hf_transformers__model_type"] != "gpt_neox":
        sizes |= {"tie_word_embeddings": "qwen2" in changes.values(), "num_key_value_heads": 2}
    _train(tmp_path, hf_transformers__config_overrides={**sizes, "intermediate_size": 48}, **changes)
    export_checkpoint(str(tmp_path / STEP), str(tmp_path / "out"))
    _assert_same_folders(tmp_path / "out", tmp_path / "run-live")
    _assert_loads(tmp_path / "out", torch.load(tmp_path / "run.pt"))
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("embed_out.weight" in names) == (changes["hf_transformers__model_type"] == "gpt_neox")


@pytest.mark.parametrize("fused", [True, False])
def test_a_published_layout_is_kept(tmp_path: Path, fused: bool):
    """hrm_text exists with fused matrices and without; an export is laid out as what the run began with."""
    config = CONFIG_MAPPING["hrm_text"]()
    twin = build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], seed=1)
    twin.generation_config.max_new_tokens = 5
    twin.save_pretrained(tmp_path / "in")
    if not fused:
        save_file(
            {name: value.clone() for name, value in twin.state_dict().items()},
            tmp_path / "in" / "model.safetensors",
            metadata={"format": "pt"},
        )
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "in")
    _train(
        tmp_path,
        hf_transformers__model_type=None,
        hf_transformers__model=str(tmp_path / "in"),
        hf_transformers__config_overrides={},
        model__hf_assets_path=None,
    )
    export_checkpoint(str(tmp_path / STEP), str(tmp_path / "out"))
    _assert_same_folders(tmp_path / "out", tmp_path / "run-live")
    _assert_loads(tmp_path / "out", torch.load(tmp_path / "run.pt"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert any("gate_up_proj" in name for name in after) == fused
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 5


def test_dtype_and_file_size(run: Path, trained: Path, tmp_path: Path):
    assert main([str(run), str(tmp_path / "out"), "--dtype", "bfloat16", "--max_file_size", "20KB"]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    sizes = {name: sum(t.numel() * 2 for t in load_file(tmp_path / "out" / name).values()) for name in files}
    assert max(sizes.values()) <= 24_576, "the embedding alone is larger than a file"
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    expected = {name: tensor.bfloat16() for name, tensor in torch.load(trained / "run.pt").items()}
    _assert_loads(tmp_path / "out", expected)


def test_no_tokenizer_and_another_one(run: Path, tmp_path: Path):
    export_checkpoint(str(run), str(tmp_path / "without"), tokenizer="none")
    assert not list((tmp_path / "without").glob("*token*"))
    ByT5Tokenizer(extra_ids=3).save_pretrained(tmp_path / "tokenizer")
    export_checkpoint(str(run), str(tmp_path / "with"), tokenizer=str(tmp_path / "tokenizer"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "with")) == len(ByT5Tokenizer(extra_ids=3))


# -- which checkpoint -------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_found(run: Path):
    folder = run / "checkpoint"
    for name in ("step-9", "step-10"):
        shutil.copytree(folder / "step-1", folder / name)
    shutil.copytree(folder / "step-1", folder / "step-11.tmp")
    shutil.copytree(folder / "step-1", folder / "step-12.abandoned")
    (folder / "step-13").mkdir()  # its metadata, written last, is not there
    for location in (run, folder, f"{run}/"):
        assert _found(location) == str(folder / "step-10")
    assert _found(folder / "step-9") == str(folder / "step-9")
    assert _found(folder / "step-12.abandoned") == str(folder / "step-12.abandoned"), "asked for by name"
    shutil.copytree(folder / "step-1", folder / "step-10-model")
    assert _found(run) == str(folder / "step-10")
    shutil.copytree(folder / "step-1", folder / "step-20-model")
    assert _found(run) == str(folder / "step-20-model")


def _found(location: object) -> str:
    storage, name = find_checkpoint(str(location))
    return storage.locate(name)


def test_the_newest_whole_checkpoint_is_found_in_a_bucket():
    """There a checkpoint is written in place, and a mark says that it is not whole, or was set aside."""
    memory, root = fsspec.filesystem("memory"), f"/newest-{uuid.uuid4().hex}"
    for name, files in {"step-1": [], "step-2-model": [], "step-3": [".incomplete"], "step-4": [".abandoned"]}.items():
        for file in (".metadata", "config.toml", *files):
            memory.pipe_file(f"{root}/run/{name}/{file}", b"")
    url = f"memory:/{root}"
    assert _found(f"{url}/run") == f"{url}/run/step-2-model"
    assert _found(f"{url}/run/step-1/") == f"{url}/run/step-1"
    with pytest.raises(NoCheckpointError, match=r"run/step-3: its save or its deletion was cut off"):
        find_checkpoint(f"{url}/run/step-3")
    memory.pipe_file(f"{root}/step-7/.metadata", b"")
    assert _found(url) == f"{url}/step-7", "a whole bucket"


def test_a_checkpoint_folder_of_another_name(run: Path, trained: Path):
    config = run / "config.toml"
    config.write_text(config.read_text().replace('folder = "checkpoint"', 'folder = "saved/here"'))
    (run / "saved").mkdir()
    (run / "checkpoint").rename(run / "saved" / "here")
    shutil.copy(config, run / "saved" / "here" / "step-1" / "config.toml")
    assert _found(run) == str(run / "saved" / "here" / "step-1")


def test_weights_alone(tmp_path: Path):
    _train(tmp_path, checkpoint__last_save_model_only=True)
    assert not (tmp_path / STEP).exists()
    folder, _ = export_checkpoint(str(tmp_path / "run"))
    assert folder == tmp_path / f"{STEP}-model-hf"
    _assert_same_folders(folder, tmp_path / "run-live")


def test_the_config_beside_the_weights_comes_first(run: Path):
    shutil.copy(run / "config.toml", run / "checkpoint" / "step-1" / "config.toml")
    (run / "config.toml").write_text("[hf_transformers]\nmodel_type = 'gpt2'\n")
    assert SavedCheckpoint(str(run / "checkpoint" / "step-1")).model_args.model_type == "llama"


def test_a_checkpoint_behind_a_url(run: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    memory = fsspec.filesystem("memory")
    memory.put(str(run), "/bucket/run", recursive=True)
    try:
        assert main(["memory://bucket/run"]) == 2
        assert "needs the name of a local folder, OUTPUT" in capsys.readouterr().err
        assert main(["memory://bucket/run", str(tmp_path / "out")]) == 0
        _assert_same_folders(tmp_path / "out", trained / "run-live")
        (run / "config.toml").write_text(
            (run / "config.toml")
            .read_text()
            .replace('folder = "checkpoint"', 'folder = "memory://bucket/run/checkpoint"')
        )
        shutil.rmtree(run / "checkpoint")
        folder, _ = export_checkpoint(str(run), str(tmp_path / "named by the run's config"))
        _assert_same_folders(folder, trained / "run-live")
        memory.rm("/bucket/run/checkpoint/step-1/__0_0.distcp")
        assert main(["memory://bucket/run", str(tmp_path / "out")]) == 2
        assert (
            "bucket/run/checkpoint/step-1 is damaged: __0_0.distcp is missing. Use another" in capsys.readouterr().err
        )
        assert main([str(run), "memory://bucket/out"]) == 2
        assert "OUTPUT memory://bucket/out: must be a local folder" in capsys.readouterr().err
    finally:
        memory.rm("/bucket", recursive=True)


# -- what cannot be exported ------------------------------------------------------------------------------------------


def _refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    *_, message = capsys.readouterr().err.splitlines()  # after the log, which shows the model's config overrides
    assert message.startswith("error: "), "one line"
    return message


def test_places_without_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert f"{tmp_path / 'nowhere'}: no such folder" in _refusal(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no whole checkpoint there (a folder step-N" in _refusal(capsys, tmp_path / "empty")
    (run / "checkpoint" / "step-1" / ".metadata").unlink()
    for location in (run, run / "checkpoint", run / "checkpoint" / "step-1"):
        assert "a file .metadata, which is written last" in _refusal(capsys, location)
    assert "Name a folder, or a URL of a protocol that fsspec knows" in _refusal(capsys, "nosuch://bucket/run")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def _scramble(path: Path) -> None:
    path.write_bytes(bytes(len(path.read_bytes())))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("__0_0.distcp", _truncate, "is damaged: __0_0.distcp has "),
        ("__0_0.distcp", Path.unlink, "is damaged: __0_0.distcp is missing"),
        ("__0_0.distcp", _scramble, "__0_0.distcp: "),
        (".metadata", _truncate, "/.metadata: pickle data was truncated"),
        (".metadata", _scramble, "/.metadata: invalid load key"),
    ],
)
def test_a_damaged_checkpoint_names_the_file(run: Path, name: str, damage, message: str, capsys):
    damage(run / "checkpoint" / "step-1" / name)
    refusal = _refusal(capsys, run)
    assert str(run / "checkpoint" / "step-1") in refusal
    assert message in refusal
    assert "Use another" in refusal
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == ["step-1"], "nothing is left behind"


def test_without_a_config(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "config.toml").unlink()
    (run / "checkpoint" / "step-1" / "config.toml").unlink()
    message = _refusal(capsys, run / "checkpoint")
    assert f"step-1: no config.toml there or in {run}, which would say what model it is of" in message
    (run / "config.toml").write_text("model_type =")
    assert "config.toml: not valid TOML" in _refusal(capsys, run / "checkpoint")
    (run / "config.toml").write_text("[hf_transformers]\nmodel_type = 'lama'\n[training]\ndtype = 'int8'\n")
    with pytest.raises(ValueError, match=r"the nearest is \"llama\"") as caught:
        SavedCheckpoint(str(run / "checkpoint"))
    assert f"{run}/config.toml: training.dtype = 'int8'" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_hidden_layers = 2", "num_hidden_layers = 3", "9 values that it does not have: model.model.layers"),
        ("num_hidden_layers = 2", "num_hidden_layers = 1", "9 weights that the model does not have: model.model.l"),
        ("vocab_size = 384", "vocab_size = 400",
         "2 of another shape: model.lm_head.weight (here (400, 32), saved (384, 32))"),
    ],
)  # fmt: skip
def test_the_config_of_another_model(run: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]):
    config = run / "checkpoint" / "step-1" / "config.toml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    refusal = _refusal(capsys, run)
    assert "its weights do not fit LlamaForCausalLM as its config.toml describes it" in refusal
    assert message in refusal


def test_what_is_no_export_is_not_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("three years of work")
    assert "holds files and no config.json" in _refusal(capsys, run, out)
    (out / "config.json").write_text("{}")
    assert f"{out} holds thesis.tex, which is no part of an export" in _refusal(capsys, run, out)
    (out / "thesis.tex").unlink()
    (tmp_path / "out.partial").mkdir()  # of an export that was killed
    (tmp_path / "out.partial" / "model-00007-of-00009.safetensors").touch()
    for _ in range(2):
        assert main([str(run), str(out)]) == 0, "an earlier export is replaced"
        assert not (out / "model-00007-of-00009.safetensors").exists()
        assert not list(tmp_path.glob("out.*"))


def test_a_disk_that_is_too_small(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100_000, 100_000))
    message = _refusal(capsys, run, tmp_path / "out")
    assert f"{tmp_path}: the export takes 0.00016 GB, and 0.0001 GB are free. Make room" in message
    assert not list(tmp_path.glob("out*"))


def test_without_the_tokenizer_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = run / "checkpoint" / "step-1" / "config.toml"
    config.write_text(config.read_text().replace('"byt5"', '"/moved/away"'))
    assert "/moved/away: no tokenizer there. Name one with --tokenizer" in _refusal(capsys, run)
    assert main([str(run), str(tmp_path / "out"), "--tokenizer", "byt5"]) == 0


def test_the_working_folder_is_no_output(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes").touch()
    monkeypatch.chdir(tmp_path / "work")
    assert f"{tmp_path / 'work'} holds files and no config.json" in _refusal(capsys, run, ".")
    assert main([str(run), "../out/"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_disk_that_is_full(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(*arguments, **options) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers_backend.weights.export.save_file", fail)
    message = _refusal(capsys, run, tmp_path / "out")
    assert "model.safetensors could not be written: [Errno 28] No space left on device" in message
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("size", ["5 gigabytes", "0", "-1", "1.5GB"])
def test_bad_sizes(size: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["run", f"--max_file_size={size}"])
    assert caught.value.code == 2
    assert f"--max_file_size {size}: must be bytes, or a number with KB, MB or GB" in capsys.readouterr().err


def test_only_one_file_is_held_in_memory(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Counted at the source: a file's tensors are read just before it is written, and forgotten after."""
    held, events = [], []
    read = SavedCheckpoint.read

    @functools.wraps(read)
    def counting(self, names, *, keep=True):
        tensors = read(self, names, keep=keep)
        held.extend(tensor.numel() * 4 for tensor in tensors.values())
        return tensors

    def write(tensors, path, metadata) -> None:
        save_file(tensors, path, metadata=metadata)
        events.append((sum(held), path.stat().st_size))
        held.clear()

    monkeypatch.setattr(SavedCheckpoint, "read", counting)
    monkeypatch.setattr("transformers_backend.weights.export.save_file", write)
    export_checkpoint(str(run), str(tmp_path / "out"), max_file_size=60_000)
    assert len(events) >= 3
    assert all(0 < read_bytes <= file_bytes for read_bytes, file_bytes in events), "each tensor is read once"


def test_the_documented_commands_are_understood():
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    parsers = {"scripts/export.py": export._parse, "scripts/generate.py": generate._parse}
    for words in commands:
        script = next(index for index, word in enumerate(words) if word.startswith("scripts/"))
        parsers[words[script]](words[script + 1 :])  # exits on an option that it does not have
        assert words[:script] in (["python"], ["torchrun", "--nproc-per-node", "4"])
    assert len(commands) >= 6
    options = {option for parse in parsers.values() for option in _options(parse)}
    assert options == set(re.findall(r"`(--\w+)`", page)) | {"--help"}


def _options(parse) -> list[str]:
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as help_text:
        parse(["--help"])
    return re.findall(r"(?<![\w-])--\w+", help_text.getvalue().replace("--nproc-per-node", ""))
