"""A checkpoint of a run, read without the run: where it is, which model it holds, and its full tensors.

What `scripts/export.py` and `scripts/generate.py` stand on. A checkpoint is found by a path or a URL (`s3://...`), its
`config.toml` says which model it is of, and tensors are read straight from its files, whatever mesh wrote them.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping

from transformers_backend.checkpoint import CONFIG_FILE, is_remote, open_storage
from transformers_backend.checkpoint.reading import DamagedCheckpoint, find_misfits, read_metadata
from transformers_backend.checkpoint.storage import INCOMPLETE, METADATA, Storage, StorageError
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

_LISTED = 3  # names that an error lists


class NoCheckpointError(ValueError):
    """There is no checkpoint at a place."""


class SavedCheckpoint:
    """One checkpoint: `blueprint` and `config` of its model, and `meta` and `read` as an export's `TensorSource`.

    location: a `step-N` (or `step-N-model`) folder, or a folder of them or of a run, whose newest is meant. Raises a
    ValueError where there is no checkpoint, its model is not described, or its files are missing or too short.
    """

    def __init__(self, location: str) -> None:
        self._storage, self._name = find_checkpoint(location)
        self.folder = self._storage.locate(self._name)
        self.is_local = not is_remote(self.folder)
        self._reader = self._storage.reader(self._name)
        self._metadata = self._read_metadata()
        self.config = self._read_config()
        self.model_args = HFTransformerModelArgs().update_from_config(self.config)
        hf_config, self.model_class = self.model_args.resolve()
        self.blueprint = build_on_meta(hf_config, self.model_class, self.model_args)
        self.decoder = describe_decoder(self.blueprint)
        self._recall_conversions()
        self._stored = _stored_names(self.blueprint)
        self._check_model()

    # -- the tensors ----------------------------------------------------------------------------------------------

    def meta(self, name: str) -> torch.Tensor:
        """Shape and dtype of a tensor of the checkpoint, on the meta device."""
        saved = self._metadata.state_dict_metadata[f"model.{self._stored[name]}"]
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
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            if not isinstance(cause, StorageError):
                raise cause from None
            names = ", ".join(list(tensors)[:_LISTED]) + (" ..." if len(tensors) > _LISTED else "")
            raise ValueError(f"{names} cannot be read: {cause}. Use another checkpoint.") from error

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
            return read_metadata(self._storage, self._name)
        except DamagedCheckpoint as error:
            raise ValueError(f"{error} Use another checkpoint.") from error

    def _read_config(self) -> JobConfig:
        run_folder = _parent(_parent(self.folder))
        text, place = self._storage.read_text(self._name, CONFIG_FILE), self.folder
        if text is None:
            text, place = _read_text(run_folder, CONFIG_FILE), run_folder
        if text is None:
            raise ValueError(
                f"{self.folder}: no {CONFIG_FILE} there or in {run_folder}, which would say what model it is of. Copy "
                "the one of the run (in its job.dump_folder) into the checkpoint's folder."
            )
        return read_model_sections(text, f"{place}/{CONFIG_FILE}")

    def _recall_conversions(self) -> None:
        """An export is laid out as the files that the run loaded, where its architecture knows several layouts."""
        if self.model_args.init == "pretrained" and get_model_conversion_mapping(self.blueprint, add_legacy=False):
            recall_conversions(self.blueprint, resolve_folder(self.model_args.model, self.model_args.revision))

    def _check_model(self) -> None:
        tensors = named_tensors(self.blueprint)
        expected = {"model": {stored: tensors[stored] for stored in self._stored.values()}}
        if misfits := find_misfits(expected, self._metadata):
            raise ValueError(
                f"{self.folder}: its weights do not fit {self.model_class.__name__} as its {CONFIG_FILE} describes it: "
                f"{misfits}. Was the config of the model changed since, or is it another run's?"
            )


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


def find_checkpoint(location: str) -> tuple[Storage, str]:
    """The storage and the name of the checkpoint that `location` names: itself, or the newest that it holds."""
    location = _absolute(location)
    storage, name = _split(location)
    if storage.is_whole(name):
        return storage, name
    if INCOMPLETE in storage.sizes(name):
        raise NoCheckpointError(f"{location}: its save or its deletion was cut off. Name another checkpoint.")
    if not is_remote(location) and not Path(location).is_dir():
        raise NoCheckpointError(f"{location}: no such folder. Name a checkpoint (.../step-N), or the folder of a run.")
    storage = _open(location)
    newest = _find_newest(storage)
    if newest is None and (text := _read_text(location, CONFIG_FILE)) is not None:
        config = read_model_sections(text, f"{location}/{CONFIG_FILE}")
        inside = config.checkpoint.folder
        storage = open_storage(inside, Path(location)) if is_remote(inside) else _open(f"{location}/{inside}")
        newest = _find_newest(storage)
    if newest is None:
        raise NoCheckpointError(
            f"{location}: no whole checkpoint there (a folder step-N with a file {METADATA}, which is written last). "
            "Name a checkpoint (.../step-N), or the folder of a run that saved one."
        )
    return storage, newest


def _find_newest(storage: Storage) -> str | None:
    """The whole checkpoint of the highest step; of one step the full one rather than that of the weights alone."""
    found = storage.find()
    names = [(step, True, f"step-{step}") for step in found.whole]
    names += [(step, False, f"step-{step}-model") for step in found.models]
    return max(names)[-1] if names else None


def _absolute(location: str) -> str:
    return location.rstrip("/") if is_remote(location) else os.path.abspath(Path(location).expanduser())


def _open(location: str) -> Storage:
    return open_storage(location, Path("/"), key="CHECKPOINT")


def _split(location: str) -> tuple[Storage, str]:
    """The folder that `location` lies in, and its name there; "" for a whole bucket."""
    parent = _parent(location)
    return _open(parent), location.removeprefix(parent).lstrip("/")


def _parent(location: str) -> str:
    """The folder that `location` lies in; a whole bucket lies in itself."""
    parent = os.path.dirname(location)
    return parent if is_remote(parent) or not is_remote(location) else location


def _read_text(folder: str, file: str) -> str | None:
    """A text file of any folder; None where there is none."""
    storage, name = _split(folder)
    return storage.read_text(name, file)


def _stored_names(blueprint: PreTrainedModel) -> dict[str, str]:
    """Name in the model -> the name that a checkpoint stores it under: for tied ones the first of their names."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(blueprint).items()}
