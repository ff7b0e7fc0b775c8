"""The folders of checkpoints, local and remote: what counts as whole, what is cleaned up, what a name promises."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest

from transformers_backend.checkpoint.local import LocalStorage
from transformers_backend.checkpoint.places import open_storage
from transformers_backend.checkpoint.remote import RemoteStorage
from transformers_backend.checkpoint.storage import Found, Storage, StorageError


class _Local:
    """A storage, and a way to put files beside its back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage: Storage = LocalStorage(folder)
        self.unfinished = "step-9.tmp/half.distcp"

    def put(self, path: str, text: str = "x") -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}

    def abandoned(self, step: int) -> None:
        self.put(f"step-{step}.abandoned/.metadata")


class _Remote:
    def __init__(self) -> None:
        self.root = f"/bucket-{uuid.uuid4()}/run"
        self.storage: Storage = RemoteStorage(f"memory:/{self.root}")
        self.unfinished = "step-9/half.distcp"
        self._fs = fsspec.filesystem("memory")

    def put(self, path: str, text: str = "x") -> None:
        self._fs.pipe_file(f"{self.root}/{path}", text.encode())
        if path == self.unfinished:
            self._fs.pipe_file(f"{self.root}/step-9/.incomplete", b"")

    def files(self) -> set[str]:
        return {path.removeprefix(f"{self.root}/") for path in self._fs.find(self.root)}

    def abandoned(self, step: int) -> None:
        self.put(f"step-{step}/.metadata")
        self.put(f"step-{step}/.abandoned")


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> _Local | _Remote:
    return _Local(tmp_path / "run") if request.param == "local" else _Remote()


def test_steps_are_whole_checkpoints_in_order(place):
    assert place.storage.find() == Found()
    for name in ("step-10", "step-9x", "step-9", "step-100", "step-11-hf", "step-", "step-x", "other"):
        place.put(f"{name}/.metadata")
    place.put("step-300/__0_0.distcp")  # without its index
    place.abandoned(400)
    assert place.storage.find() == Found(whole=[9, 10, 100], damaged=[300], abandoned=[400])


def test_a_checkpoint_appears_when_it_is_committed(place):
    storage = place.storage
    place.put("step-2/.metadata")
    storage.begin("step-4")
    writer = storage.writer("step-4")
    for file in ("__0_0.distcp", ".metadata"):
        with writer.fs.create_stream(writer.fs.concat_path(writer.path, file), "wb") as stream:
            stream.write(b"12345")
        assert storage.find() == Found(whole=[2]), "not before the last of its files"
    storage.commit("step-4", {"config.toml": "[job]"})
    assert storage.find() == Found(whole=[2, 4])
    assert storage.sizes("step-4") == {"__0_0.distcp": 5, ".metadata": 5, "config.toml": 5}
    assert storage.read_text("step-4", "config.toml") == "[job]"
    assert storage.read_text("step-2", "config.toml") is None
    reader = storage.reader("step-4")
    with reader.fs.create_stream(reader.fs.concat_path(reader.path, "__0_0.distcp"), "rb") as stream:
        assert stream.read() == b"12345"


def test_what_a_killed_run_left_is_removed_by_the_next_save(place):
    place.put(place.unfinished)
    place.put("step-8/.metadata")
    assert place.storage.find() == Found(whole=[8])
    place.storage.begin("step-10")
    assert not [file for file in place.files() if "half" in file]
    assert "step-8/.metadata" in place.files()


def test_a_save_that_failed_leaves_nothing(place):
    place.put("step-2/.metadata")
    place.storage.begin("step-4")
    writer = place.storage.writer("step-4")
    with writer.fs.create_stream(writer.fs.concat_path(writer.path, "__0_0.distcp"), "wb") as stream:
        stream.write(b"12345")
    place.storage.discard("step-4")
    assert place.files() == {"step-2/.metadata"}


def test_a_step_is_set_aside_and_deleted(place):
    for step in (1, 2, 3):
        place.put(f"step-{step}/.metadata")
        place.put(f"step-{step}/data")
    place.storage.abandon(3)
    assert place.storage.find() == Found(whole=[1, 2], abandoned=[3])
    place.storage.delete(1)
    assert place.storage.find() == Found(whole=[2], abandoned=[3])
    place.storage.delete(3, abandoned=True)
    assert place.files() == {"step-2/.metadata", "step-2/data"}


def test_a_step_is_saved_again_where_it_was_set_aside(place):
    place.put("step-3/.metadata")
    place.storage.abandon(3)
    place.storage.begin("step-3")
    writer = place.storage.writer("step-3")
    with writer.fs.create_stream(writer.fs.concat_path(writer.path, ".metadata"), "wb") as stream:
        stream.write(b"new")
    place.storage.commit("step-3", {})
    assert place.storage.find().whole == [3]


def test_an_error_names_its_file(place):
    reader = place.storage.reader("step-1")
    path = reader.fs.concat_path(reader.path, "absent")
    with pytest.raises(StorageError, match=r"step-1/absent: "), reader.fs.create_stream(path, "rb"):
        pass


def test_a_path_is_local_and_a_url_is_not(tmp_path: Path):
    assert open_storage("checkpoint", tmp_path).locate("step-1") == str(tmp_path / "checkpoint" / "step-1")
    assert open_storage("/elsewhere", tmp_path).locate("step-1") == "/elsewhere/step-1"
    assert open_storage("memory://bucket/run/", tmp_path).locate("step-1") == "memory://bucket/run/step-1"


def test_an_unknown_protocol_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r'checkpoint\.folder = "s4://bucket/run": Protocol not known: s4.*s3://bucket'
    ):
        open_storage("s4://bucket/run", tmp_path)

    def not_installed(url: str):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", not_installed)
    with pytest.raises(ImportError, match=r'checkpoint\.folder = "s3://bucket/run": Install s3fs to access S3'):
        open_storage("s3://bucket/run", tmp_path)
