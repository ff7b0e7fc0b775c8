"""The folders of checkpoints, local and remote: what counts as whole, what is cleaned up, what a name promises."""

from __future__ import annotations

import errno
import pickle
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from tests.jobs import tiny_job
from transformers_backend import Trainer
from transformers_backend.checkpoint.local import LocalStorage
from transformers_backend.checkpoint.places import locate_folder, open_storage, require_shared
from transformers_backend.checkpoint.reading import DamagedCheckpoint, read_metadata
from transformers_backend.checkpoint.remote import RemoteStorage
from transformers_backend.checkpoint.storage import DamagedFileError, Found, Storage, StorageError


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


def _index(**sizes: int) -> bytes:
    """An index that names files of so many bytes."""
    parts = {MetadataIndex(file): _StorageInfo(f"{file}.distcp", 0, size) for file, size in sizes.items()}
    return pickle.dumps(Metadata({}, storage_data=parts))


def _write(storage: Storage, name: str, **files: bytes) -> None:
    writer = storage.writer(name)
    for file, content in files.items():
        path = writer.fs.concat_path(writer.path, ".metadata" if file == "index" else f"{file}.distcp")
        with writer.fs.create_stream(path, "wb") as stream:
            stream.write(content)


def test_steps_are_whole_checkpoints_in_order(place):
    assert place.storage.find() == Found()
    for name in ("step-10", "step-9x", "step-9", "step-100", "step-11-hf", "step-", "step-x", "other"):
        place.put(f"{name}/.metadata")
    place.put("step-300/__0_0.distcp")  # without its index
    place.abandoned(400)
    for step in (12, 7):
        place.put(f"step-{step}-model/.metadata")
    place.put("step-13-model/__0_0.distcp")
    assert place.storage.find() == Found(whole=[9, 10, 100], damaged=[300], abandoned=[400], models=[7, 12])


def test_a_checkpoint_appears_when_it_is_committed(place):
    storage = place.storage
    place.put("step-2/.metadata")
    storage.begin("step-4")
    index = _index(a=5)
    for file, content in (("a", b"12345"), ("index", index)):
        _write(storage, "step-4", **{file: content})
        assert storage.find() == Found(whole=[2]), "not before the last of its files"
    storage.commit("step-4", {"config.toml": "[job]"})
    assert storage.find() == Found(whole=[2, 4])
    assert storage.sizes("step-4") == {"a.distcp": 5, ".metadata": len(index), "config.toml": 5}
    assert storage.read_text("step-4", "config.toml") == "[job]"
    assert storage.read_text("step-2", "config.toml") is None
    reader = storage.reader("step-4")
    with reader.fs.create_stream(reader.fs.concat_path(reader.path, "a.distcp"), "rb") as stream:
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
    _write(place.storage, "step-4", a=b"12345")
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
    _write(place.storage, "step-3", index=_index())
    place.storage.commit("step-3", {})
    assert place.storage.find().whole == [3]


@pytest.mark.parametrize("written", [{}, {"b": b"1234"}], ids=["on another machine", "cut off"])
def test_what_rank_0_does_not_see_is_not_committed(place, written):
    place.storage.begin("step-4")
    _write(place.storage, "step-4", a=b"12345", index=_index(a=5, b=5), **written)
    with pytest.raises(StorageError, match=r"b\.distcp .*although it was written: checkpoint\.folder must be a place"):
        place.storage.commit("step-4", {})
    assert place.storage.find() == Found()


def test_other_runs_further_down_are_left_alone():
    """A bucket of runs that is a run's checkpoint.folder itself, while one of the others is writing."""
    place = _Remote()
    others = {"other/step-3/.incomplete", "other/step-3/a.distcp", "mine/.incomplete", "step-3/deeper/.incomplete"}
    for path in (*others, "step-2/.incomplete", "step-2-model/.incomplete"):
        place.put(path)
    assert place.storage.find() == Found(damaged=[])
    place.storage.begin("step-4")
    assert place.files() == {*others, "step-4/.incomplete"}


def test_a_checkpoint_that_was_cut_off_is_not_read():
    place = _Remote()
    place.storage.begin("step-4")
    _write(place.storage, "step-4", index=_index())
    assert not place.storage.is_whole("step-4")
    with pytest.raises(DamagedCheckpoint, match=r"step-4 is incomplete: its save or its deletion was cut off"):
        read_metadata(place.storage, "step-4")
    place.storage.commit("step-4", {})
    assert place.storage.is_whole("step-4")
    assert read_metadata(place.storage, "step-4").storage_data == {}
    assert not place.storage.is_whole("step-5"), "there is none"


def test_damage_is_told_from_a_failure_that_passes(place):
    place.put("step-1/a.distcp", "no archive")
    fs, path = place.storage.reader("step-1").fs, place.storage.locate("step-1/a.distcp")
    with pytest.raises(DamagedFileError, match=r"a\.distcp: "), fs.create_stream(path, "rb") as stream:
        torch.load(stream)
    passing = [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied"),
               RuntimeError("DefaultCPUAllocator: can't allocate memory")]  # fmt: skip
    for error in passing:
        with pytest.raises(StorageError, match=r"a\.distcp: ") as caught, fs.create_stream(path, "rb"):
            raise error
        assert not isinstance(caught.value, DamagedFileError)
    with pytest.raises(torch.OutOfMemoryError), fs.create_stream(path, "rb"):
        raise torch.OutOfMemoryError("of a device, while a tensor was copied to it")


class _NoConnection(Exception):
    """As botocore's: no OSError."""


def test_every_failure_of_a_remote_storage_is_a_storage_error(monkeypatch: pytest.MonkeyPatch):
    place = _Remote()
    place.put("step-1/.metadata", "x")
    reader, writer = place.storage.reader("step-1"), place.storage.writer("step-2")

    def fail(*arguments, **keywords):
        raise _NoConnection("Could not connect to the endpoint")

    for name in ("find", "pipe_file", "cat_file", "isfile", "rm", "rm_file", "makedirs", "exists", "rename", "open"):
        monkeypatch.setattr(type(place.storage._fs), name, fail)
    actions = {
        "find": place.storage.find, "begin": lambda: place.storage.begin("step-2"),
        "commit": lambda: place.storage.commit("step-2", {}), "discard": lambda: place.storage.discard("step-2"),
        "sizes": lambda: place.storage.sizes("step-1"), "text": lambda: place.storage.read_text("step-1", "a.toml"),
        "abandon": lambda: place.storage.abandon(1), "delete": lambda: place.storage.delete(1),
        "mark": lambda: place.storage.leave_mark("x"), "see": lambda: place.storage.sees_mark("x"),
        "read": reader.read_metadata, "write": lambda: _write(place.storage, "step-2", a=b"1"),
        "mkdir": lambda: writer.fs.mkdir(writer.path), "exists": lambda: writer.fs.exists(writer.path),
        "rename": lambda: writer.fs.rename(writer.path, "x"), "remove": lambda: writer.fs.rm_file(writer.path),
    }  # fmt: skip
    for action in actions.values():
        with pytest.raises(StorageError, match=r"memory://bucket.*: Could not connect to the endpoint"):
            action()


def test_training_goes_on_without_a_lost_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    place = _Remote()
    trainer = Trainer(
        tiny_job(tmp_path, "run", training__steps=3, checkpoint__enable=True, checkpoint__interval=1,
                 checkpoint__folder=place.storage.url, checkpoint__on_save_error="continue")
    )  # fmt: skip
    open_file, failed = type(place.storage._fs).open, []

    def fail_once(self, path, mode="rb", **keywords):
        if "step-2" in path and "w" in mode:
            failed.append(path)
            raise _NoConnection("Could not connect to the endpoint")
        return open_file(self, path, mode, **keywords)

    monkeypatch.setattr(type(place.storage._fs), "open", fail_once)
    try:
        trainer.train()
        assert failed
        assert trainer.checkpointer.steps() == [1, 3]
    finally:
        trainer.close()


def test_ranges_that_cannot_be_fetched_name_their_file(monkeypatch: pytest.MonkeyPatch):
    place, answer = _Remote(), []
    reader = place.storage.reader("step-1")
    reader.storage_data = {MetadataIndex("a"): _StorageInfo("a.distcp", 0, 5)}
    items = [type("Item", (), {"storage_index": MetadataIndex("a")})()]
    monkeypatch.setattr(type(place.storage._fs), "cat_ranges", lambda *arguments, **keywords: answer)
    for content, kind in ((_NoConnection("late"), StorageError), (FileNotFoundError("gone"), DamagedFileError),
                          (b"1234", DamagedFileError)):  # fmt: skip
        answer[:] = [content]
        with pytest.raises(StorageError, match=r"step-1/a\.distcp: ") as caught:
            list(reader._fetch(items))
        assert type(caught.value) is kind


def test_an_error_names_its_file(place):
    reader = place.storage.reader("step-1")
    path = reader.fs.concat_path(reader.path, "absent")
    with pytest.raises(StorageError, match=r"step-1/absent: "), reader.fs.create_stream(path, "rb"):
        pass


def test_a_path_is_local_and_a_url_is_not(tmp_path: Path):
    assert open_storage("checkpoint", tmp_path).locate("step-1") == str(tmp_path / "checkpoint" / "step-1")
    assert open_storage("/elsewhere", tmp_path).locate("step-1") == "/elsewhere/step-1"
    assert open_storage("memory://bucket/run/", tmp_path).locate("step-1") == "memory://bucket/run/step-1"


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inside = tmp_path / "outputs"
    assert open_storage("~/run", inside).locate("step-1") == str(tmp_path / "home" / "run" / "step-1")
    assert locate_folder("~/run", inside) == str(tmp_path / "home" / "run")
    assert locate_folder("run", inside) == str(inside / "run")
    assert locate_folder("s3://bucket/run/", inside) == "s3://bucket/run"


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_shared_place_is_tried(place, one_rank, monkeypatch: pytest.MonkeyPatch):
    require_shared(place.storage)
    assert place.files() == set(), "nothing is left"
    looks = iter([False, True])
    monkeypatch.setattr(place.storage, "sees_mark", lambda mark: next(looks))
    require_shared(place.storage)  # a network file system may take a while
    monkeypatch.setattr(place.storage, "sees_mark", lambda mark: False)
    with pytest.raises(
        ValueError, match=r'checkpoint\.folder = ".*run" is not the same place for all ranks: .* rank 0'
    ):
        require_shared(place.storage, patience=0.0)
    assert place.files() == set()

    def refuse(mark: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(place.storage, "leave_mark", refuse)
    with pytest.raises(ValueError, match=r"run\" cannot be written: .*Permission denied. Correct the access"):
        require_shared(place.storage)


def test_an_unknown_protocol_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r'checkpoint\.folder = "s4://bucket/run": Protocol not known: s4.*s3://bucket'
    ):
        open_storage("s4://bucket/run", tmp_path)
    with pytest.raises(ValueError, match=r'^checkpoint\.initial_load_path = "s4://bucket/run": Protocol'):
        open_storage("s4://bucket/run", tmp_path, key="checkpoint.initial_load_path")

    def not_installed(url: str):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", not_installed)
    with pytest.raises(ImportError, match=r'checkpoint\.folder = "s3://bucket/run": Install s3fs to access S3'):
        open_storage("s3://bucket/run", tmp_path)
