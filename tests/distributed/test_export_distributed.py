"""Exports by several ranks: the same bytes as by one, every file of the index there, and an error of one stops all."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.distributed.workers import WorkerPool
from tests.jobs import tiny_job
from transformers_backend import Trainer
from transformers_backend.export import export_checkpoint, main
from transformers_backend.weights import export

REPOSITORY = Path(__file__).parents[2]
FILE_SIZE = 20_000  # about ten files


def _fingerprints(state: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:12] for name, tensor in state.items()}


def _train(folder: str, name: str = "run", live: str = "live", **changes) -> dict[str, str]:
    trainer = Trainer(tiny_job(folder, name, training__steps=2, checkpoint__enable=True, **changes))
    try:
        trainer.train()
        trainer.model.save_pretrained(f"{folder}/{live}", tokenizer=trainer.tokenizer, max_file_size=FILE_SIZE)
        return _fingerprints(trainer.model.full_state_dict())
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def trained(two: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").mkdir()
    for number in range(4):
        (folder / "text" / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    weights, same = two.run(_train, str(folder))
    assert weights == same
    return folder, weights


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in folder.iterdir()}


def test_the_live_model_and_its_checkpoint_give_the_same_folder(two: WorkerPool, trained, tmp_path: Path):
    """Exported by the run on two ranks, by the command on one, and from the checkpoint on two."""
    folder, weights = trained
    live = _contents(folder / "live")
    assert len([name for name in live if name.endswith(".safetensors")]) > 5
    assert main([str(folder / "run"), str(tmp_path / "one"), f"--max_file_size={FILE_SIZE}"]) == 0
    assert _contents(tmp_path / "one") == live
    two.run(_export, str(folder / "run"), str(tmp_path / "two"))
    assert _contents(tmp_path / "two") == live
    assert _fingerprints(AutoModelForCausalLM.from_pretrained(folder / "live").state_dict()) == weights
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def _export(checkpoint: str, output: str, **options) -> None:
    export_checkpoint(checkpoint, output, **{"max_file_size": FILE_SIZE, **options})
    assert Path(output, "config.json").exists(), "the folder is whole when any rank returns"


def _train_other(folder: str, model_type: str) -> dict[str, str]:
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "tie_word_embeddings": model_type == "qwen2"}
    sizes |= {"num_key_value_heads": 2} if model_type == "qwen2" else {}
    changes = {"hf_transformers__model_type": model_type, "hf_transformers__config_overrides": sizes}
    return _train(folder, model_type, f"{model_type}-live", **changes)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt_neox"], ids=["tied", "head of another name"])
def test_other_models(two: WorkerPool, trained, tmp_path: Path, model_type: str):
    folder, _ = trained
    weights, _ = two.run(_train_other, str(folder), model_type)
    live = _contents(folder / f"{model_type}-live")
    assert main([str(folder / model_type), str(tmp_path / "one"), f"--max_file_size={FILE_SIZE}"]) == 0
    two.run(_export, str(folder / model_type), str(tmp_path / "two"))
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two") == live
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert _fingerprints(model.state_dict()) == weights
    assert model.config.tie_word_embeddings == (model_type == "qwen2")


def test_the_command_under_torchrun(trained, tmp_path: Path):
    folder, _ = trained
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", REPOSITORY / "scripts" / "export.py",
         folder / "run" / "checkpoint" / "step-2", tmp_path / "out", f"--max_file_size={FILE_SIZE}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"exported to {tmp_path / 'out'}: ")
    assert ran.stdout.count("exported") == 1, "by one of them"
    assert _contents(tmp_path / "out") == _contents(folder / "live")


@pytest.mark.parametrize("max_file_size", [20_000, 60_000, 150_000, 10**9])
def test_every_file_of_the_index_is_there(two: WorkerPool, trained, tmp_path: Path, max_file_size: int):
    folder, _ = trained
    two.run(_export_live, str(folder), str(tmp_path / "out"), max_file_size)
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    if max_file_size == 10**9:
        assert files == {"model.safetensors"}
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
        return
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == files
    assert len(files) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())


def _make_trainer(folder: str) -> Trainer:
    return Trainer(tiny_job(folder, "other", training__steps=1))


def _export_live(folder: str, output: str, max_file_size: int = FILE_SIZE) -> None:
    trainer = _make_trainer(folder)
    try:
        trainer.model.save_pretrained(output, max_file_size=max_file_size)
    finally:
        trainer.close()


def _writers(folder: str, checkpoint: str, output: str) -> tuple[list[str], list[str]]:
    """Files that this rank wrote, of a live model and from a checkpoint."""
    names: list[str] = []

    def write(tensors, path, metadata) -> None:
        names.append(path.name)
        save_file(tensors, path, metadata=metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "save_file", write)
        _export_live(folder, output)
        live = len(names)
        _export(checkpoint, output)
    return names[:live], names[live:]


def test_files_are_dealt_to_the_ranks(two: WorkerPool, trained, tmp_path: Path):
    folder, _ = trained
    ranks = two.run(_writers, str(folder), str(folder / "run"), str(tmp_path / "out"))
    for first, second in zip(*ranks, strict=True):  # live, checkpoint
        assert [name[6:11] for name in first] == [f"{number:05d}" for number in range(1, len(first) * 2, 2)]
        assert [name[6:11] for name in second] == [f"{number:05d}" for number in range(2, len(second) * 2 + 1, 2)]


def _disk_full(failing_rank: int, folder: str, checkpoint: str | None, output: str) -> tuple[str, float]:
    """The disk of one rank is full when it writes its second file: what each rank is told, and how soon."""
    written = []

    def write(tensors, path, metadata) -> None:
        written.append(path)
        if dist.get_rank() == failing_rank and len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "save_file", write)
        start = time.perf_counter()
        save = functools.partial(_export_live, folder) if checkpoint is None else functools.partial(_export, checkpoint)
        with pytest.raises(OSError, match="No space left on device") as caught:
            save(output)
    dist.barrier()  # no rank is left behind in a collective
    assert len(written) == 2, "and nobody writes on"
    return str(caught.value), time.perf_counter() - start


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("live", [True, False], ids=["live", "checkpoint"])
def test_an_error_of_one_rank_stops_all(two: WorkerPool, trained, tmp_path: Path, live: bool, failing_rank: int):
    folder, _ = trained
    out = tmp_path / "out"
    two.run(_export, str(folder / "run"), str(out))
    before = _contents(out)
    checkpoint = None if live else str(folder / "run")
    outcomes = two.run(_disk_full, failing_rank, str(folder), checkpoint, str(out))
    (message, seconds), (other_message, other_seconds) = outcomes
    assert message == other_message
    assert message.startswith(f"rank {failing_rank}: {out}.partial/model-0000{failing_rank + 3}-of-")
    assert "could not be written: [Errno 28] No space left on device" in message
    assert max(seconds, other_seconds) < 60, "long before any timeout"
    assert _contents(out) == before, "the older export is as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "and nothing is left of the new one"


def _refused(checkpoint: str, output: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller reads it
        export_checkpoint(checkpoint, output)
    dist.barrier()
    return str(caught.value)


def test_every_rank_gets_the_same_refusal(two: WorkerPool, trained, tmp_path: Path):
    folder, _ = trained
    (tmp_path / "notes.txt").write_text("keep me")
    for checkpoint, text in ((folder / "run", "holds files and no config.json"), (tmp_path, "no whole checkpoint")):
        messages = two.run(_refused, str(checkpoint), str(tmp_path))
        assert messages[0] == messages[1]
        assert text in messages[0]
        assert messages[0].startswith(str(tmp_path)), "all found the same, so it is nobody's in particular"


def _only_rank_0_sees_the_folder(checkpoint: str, output: str) -> str:
    return _refused(checkpoint, f"{output}/{dist.get_rank()}/out")


def test_a_folder_that_is_not_shared(two: WorkerPool, trained, tmp_path: Path):
    folder, _ = trained
    messages = two.run(_only_rank_0_sees_the_folder, str(folder / "run"), str(tmp_path))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"rank 1: {tmp_path}/1/out.partial was made by the first rank")
    assert "a file system that they share" in messages[0]
    assert not list(tmp_path.glob("**/out*"))
