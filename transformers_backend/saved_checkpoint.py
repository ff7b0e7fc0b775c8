"""A checkpoint of a run, read without the run: where it is, which model it holds, and its full tensors.

What `scripts/export.py` and `scripts/generate.py` stand on. A checkpoint is found by a path or a URL (`s3://...`), its
`config.toml` says which model it is of, and tensors are read straight from its files, whatever mesh wrote them.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader  # the reader that torch documents for URLs
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping

from transformers_backend.data import load_tokenizer
from transformers_backend.decoder import describe_decoder
from transformers_backend.job_config import JobConfig, read_model_sections
from transformers_backend.model_args import HFTransformerModelArgs, build_on_meta
from transformers_backend.weights import (
    allocate,
    init_buffers,
    named_tensors,
    recall_conversions,
    resolve_folder,
)

_STEP_FOLDER = re.compile(r"step-(\d+)(-model)?")
_METADATA, _CONFIG = ".metadata", "config.toml"
_BYTES_AT_ONCE = 2**29  # of a remote checkpoint, fetched side by side
_LISTED = 3  # names that an error lists of each kind
# What unpickling bytes raises that are none of a checkpoint's.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
)  # fmt: skip


class NoCheckpointError(ValueError):
    """There is no checkpoint at a place."""


class SavedCheckpoint:
    """One checkpoint: `blueprint` and `config` of its model, and `meta` and `read` as an export's `TensorSource`.

    location: a `step-N` (or `step-N-model`) folder, or a folder of them or of a run, whose newest is meant. Raises a
    ValueError where there is no checkpoint, its model is not described, or its files are missing or too short.
    """

    def __init__(self, location: str) -> None:
        self._fs, folder = find_checkpoint(location)
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.folder = folder if self.is_local else self._fs.unstrip_protocol(folder)
        self._reader = _Reader(self.folder)
        self._metadata = self._read_metadata()
        self.config = self._read_config()
        self.model_args = HFTransformerModelArgs().update_from_config(self.config)
        hf_config, self.model_class = self.model_args.resolve()
        self.blueprint = build_on_meta(hf_config, self.model_class, self.model_args)
        self.decoder = describe_decoder(self.blueprint)
        self._recall_conversions()
        self._stored = _stored_names(self.blueprint)
        self._check_model()
        self._check_files()

    # -- the tensors ----------------------------------------------------------------------------------------------

    def meta(self, name: str) -> torch.Tensor:
        """Shape and dtype of a tensor of the checkpoint, on the meta device."""
        saved = self._tensors[self._stored[name]]
        return torch.empty(saved.size, dtype=saved.properties.dtype, device="meta")

    def read(self, names: tuple[str, ...], *, keep: bool = True) -> dict[str, torch.Tensor]:
        """{name: full tensor on the CPU}; without `keep` nothing is read."""
        tensors = {name: torch.empty_like(self.meta(name), device="cpu") for name in (names if keep else ())}
        self._read_into({self._stored[name]: tensor for name, tensor in tensors.items()})
        return tensors

    def load_model(self, device: torch.device, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The Transformers model with the checkpoint's weights, on `device`, in `dtype` (None: the checkpoint's)."""
        self.model_args.dtype = dtype or self.model_args.dtype
        model, blueprint = (build_on_meta(self.blueprint.config, self.model_class, self.model_args) for _ in range(2))
        allocate(model, device, buffer_device=device)
        init_buffers(model, blueprint, device=device)
        tensors = named_tensors(model)
        self._read_into({stored: tensors[stored].detach() for stored in self._stored.values()})
        model.generation_config = self.generation_config or model.generation_config
        return model.eval()

    def _read_into(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill full tensors, named as the checkpoint stores them, of any dtype and device."""
        if not tensors:
            return
        try:
            with warnings.catch_warnings():  # which `no_dist` gives, asked for or not
                warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
                dcp.load({"model": tensors}, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            files = {
                info.relative_path
                for index, info in self._metadata.storage_data.items()
                if index.fqn.removeprefix("model.") in tensors
            }
            listed = ", ".join(sorted(files)[:_LISTED]) + (" ..." if len(files) > _LISTED else "")
            raise ValueError(
                f"{self.folder}: damaged: {', '.join(list(tensors)[:_LISTED])} cannot be read from {listed} "
                f"({type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}). Use another "
                "checkpoint."
            ) from error

    # -- what describes them --------------------------------------------------------------------------------------

    @functools.cached_property
    def generation_config(self) -> GenerationConfig | None:
        """That of the pretrained model which the run began with; None where there is none."""
        if self.model_args.init != "pretrained":
            return None
        folder = resolve_folder(self.model_args.model, self.model_args.revision, weights=False)
        has_one = (folder / "generation_config.json").is_file()
        return GenerationConfig.from_pretrained(folder) if has_one else None

    def _read_metadata(self) -> Metadata:
        try:
            return self._reader.read_metadata()
        except _UNPICKLING_ERRORS as error:
            raise ValueError(
                f"{self.folder}/{_METADATA}: damaged ({type(error).__name__}: {error}). Use another checkpoint."
            ) from error

    def _read_config(self) -> JobConfig:
        run_folder = os.path.dirname(os.path.dirname(self.folder))
        places = [f"{folder}/{_CONFIG}" for folder in (self.folder, run_folder)]
        path = next((path for path in places if self._fs.isfile(path)), None)
        if path is None:
            raise ValueError(
                f"{self.folder}: no {_CONFIG} there or in {run_folder}, which would say what model it is of. Copy the "
                "one of the run (in its job.dump_folder) into the checkpoint's folder."
            )
        return read_model_sections(self._fs.cat_file(path).decode(), path)

    def _recall_conversions(self) -> None:
        """An export is laid out as the files that the run loaded, where its architecture knows several layouts."""
        if self.model_args.init == "pretrained" and get_model_conversion_mapping(self.blueprint, add_legacy=False):
            recall_conversions(self.blueprint, resolve_folder(self.model_args.model, self.model_args.revision))

    @functools.cached_property
    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        """The model's tensors as the checkpoint describes them, by the names it stores them under."""
        return {
            key.removeprefix("model."): saved
            for key, saved in self._metadata.state_dict_metadata.items()
            if key.startswith("model.") and isinstance(saved, TensorStorageMetadata)
        }

    def _check_model(self) -> None:
        expected = {stored: named_tensors(self.blueprint)[stored].shape for stored in self._stored.values()}
        problems = {
            "missing in it": sorted(expected.keys() - self._tensors.keys()),
            "unexpected": sorted(self._tensors.keys() - expected.keys()),
            "of another shape": [
                f"{name} (model {tuple(shape)}, checkpoint {tuple(self._tensors[name].size)})"
                for name, shape in expected.items()
                if name in self._tensors and self._tensors[name].size != shape
            ],
        }
        found = [
            f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{' ...' if len(names) > _LISTED else ''}"
            for kind, names in problems.items()
            if names
        ]
        if found:
            raise ValueError(
                f"{self.folder}: its weights do not fit {self.model_class.__name__} as its {_CONFIG} describes it: "
                f"{'; '.join(found)}. Was the config of the model changed since, or is it another run's?"
            )

    def _check_files(self) -> None:
        """Every file that holds weights is there and long enough, before anything is read from one."""
        needed: dict[str, int] = {}
        for index, info in self._metadata.storage_data.items():
            if index.fqn.startswith("model."):
                needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        found = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in self._fs.ls(self.folder, detail=True)}
        for name, size in sorted(needed.items()):
            path = f"{self.folder}/{name}"
            if name not in found:
                raise ValueError(f"{path}: missing, so the checkpoint is not whole. Use another one.")
            if found[name] < size:
                raise ValueError(f"{path}: truncated, {found[name]} bytes instead of {size}. Use another checkpoint.")


class _Reader(FsspecReader):
    """torch's reader for URLs, made for many small reads.

    It reads the metadata, which grows with tensors times ranks, once. From a remote file system it fetches the exact
    ranges of many tensors side by side, where the plain reader opens file after file and reads ahead in each.
    """

    def read_metadata(self, *args, **kwargs) -> Metadata:
        if (metadata := self.__dict__.get("_metadata")) is None:
            metadata = self._metadata = super().read_metadata(*args, **kwargs)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if isinstance(self.fs.fs, LocalFileSystem):
            return super().read_data(plan, planner)
        for items in _batches(plan.items, lambda item: self.storage_data[item.storage_index].length):
            places = [self.storage_data[item.storage_index] for item in items]
            contents = self.fs.fs.cat_ranges(
                [self.fs.concat_path(self.path, place.relative_path) for place in places],
                [place.offset for place in places],
                [place.offset + place.length for place in places],
                on_error="raise",
            )
            for item, content in zip(items, contents, strict=True):
                saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                part = saved[tuple(map(_slice, item.storage_offsets, item.lengths))]
                planner.resolve_tensor(item).detach().copy_(part)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _slice(start: int, length: int) -> slice:
    return slice(start, start + length)


def _batches(items: list[ReadItem], size: Callable[[ReadItem], int]) -> Iterator[list[ReadItem]]:
    """Consecutive items, as many at a time as `_BYTES_AT_ONCE` holds, at least one."""
    batch, filled = [], 0
    for item in items:
        if batch and filled + size(item) > _BYTES_AT_ONCE:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += size(item)
    if batch:
        yield batch


def run_tokenizer(config: JobConfig, name: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the run with this config; `name`, a folder or hub id, takes its place."""
    own = config.model.hf_assets_path
    if name is not None or own is not None:
        return command_tokenizer(name or own, trust_remote_code=config.hf_transformers.trust_remote_code)
    section = config.hf_transformers
    return command_tokenizer(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)


def command_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """`load_tokenizer`, whose error names the option of the commands."""
    try:
        return load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    except ValueError as error:
        reason = str(error.__cause__ or "it has no vocabulary").strip().splitlines()[0]
        raise ValueError(
            f"{name}: no tokenizer there. Name one with --tokenizer: a folder, a hub id, or "
            f'"byt5" for bytes. ({reason})'
        ) from error


def find_checkpoint(location: str) -> tuple[AbstractFileSystem, str]:
    """The file system and folder of the checkpoint that `location` names: itself, or the newest that it holds."""
    fs, folder = _open_file_system(location)
    if fs.isfile(f"{folder}/{_METADATA}"):
        return fs, folder
    if not fs.isdir(folder):
        raise NoCheckpointError(f"{location}: no such folder. Name a checkpoint (.../step-N), or the folder of a run.")
    newest = _newest(fs, folder)
    if newest is None and fs.isfile(f"{folder}/{_CONFIG}"):
        config = read_model_sections(fs.cat_file(f"{folder}/{_CONFIG}").decode(), f"{location}/{_CONFIG}")
        inside = config.checkpoint.folder
        if "://" in inside:
            fs, below = _open_file_system(inside)
        else:
            below = f"{folder}/{inside}"
        newest = _newest(fs, below) if fs.isdir(below) else None
    if newest is None:
        raise NoCheckpointError(
            f"{location}: no whole checkpoint there (a folder step-N with a file {_METADATA}, which is written last). "
            "Name a checkpoint (.../step-N), or the folder of a run that saved one."
        )
    return fs, newest


def _open_file_system(location: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, folder = url_to_fs(location if "://" in location else str(Path(location).expanduser()))
    except ImportError as error:
        raise ImportError(f"{location}: {error}. For s3:// it is the package s3fs: pip install s3fs.") from error
    except ValueError as error:
        raise ValueError(f"{location}: {error}. Name a folder, or a URL such as s3://bucket/run.") from error
    fs.invalidate_cache()
    return fs, folder.rstrip("/")


def _newest(fs: AbstractFileSystem, folder: str) -> str | None:
    """The whole checkpoint of the highest step; of one step the full one rather than that of the weights alone."""
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False)]
    steps = [(int(match[1]), match[2] is None, name) for name in names if (match := _STEP_FOLDER.fullmatch(name))]
    whole = (f"{folder}/{name}" for *_, name in sorted(steps, reverse=True))
    return next((path for path in whole if fs.isfile(f"{path}/{_METADATA}")), None)


def _stored_names(blueprint: PreTrainedModel) -> dict[str, str]:
    """Name in the model -> the name that a checkpoint stores it under: for tied ones the first of their names."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(blueprint).items()}
