"""Pretrained safetensors straight into (sharded) parameters.

Every rank reads the headers of all files, decides with Transformers' own key conversion where each tensor goes, and
holds that plan against the model before it reads a byte of weights: missing, unexpected or misshapen tensors stop
every rank with the same message. Then it reads, file by file, only the rows that it keeps.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from parallelize.tensor_parallel.packing import packing_of
from transformers_backend.weights.shards import fill_local, named_tensors

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LISTED = 10  # names that an error lists of each kind


@dataclass
class _Conversion:
    """A group of tensors on disk that Transformers converts together (split, merged) into tensors of the model."""

    converter: WeightConverter
    sources: list[tuple[Path, str, str]] = field(default_factory=list)  # file, key on disk, pattern that it matched


@dataclass
class _LoadPlan:
    direct: dict[str, tuple[Path, str]]  # name in the model -> file, key on disk
    conversions: dict[str, _Conversion]  # first name in the model -> conversion
    unexpected: list[str]
    shapes: dict[str, tuple[int, ...]]  # key on disk -> shape


def load_hf_weights(model: nn.Module, blueprint: PreTrainedModel, name: str, *, revision: str | None = None) -> None:
    """Load a folder or hub id of safetensors into the allocated (sharded) `model`.

    blueprint: the same model, unsharded, on the meta device; its Transformers class declares the key conversion. A
    stage of a pipeline has some of its tensors only, and the others are not read. Raises a ValueError, the same on
    every rank, that lists what is missing, unexpected, misshapen, truncated or not safetensors.
    """
    folder = resolve_folder(name, revision)
    files = find_weight_files(folder)
    targets = named_tensors(model)
    plan = _make_plan(files, blueprint)
    _check_plan(plan, blueprint, folder)
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for target, (file, key) in plan.direct.items():
        if target in targets:
            by_file.setdefault(file, []).append((target, key))
    for file, entries in by_file.items():
        with _open(file) as opened:  # one file mapped at a time bounds the host memory
            for target, key in entries:
                view = opened.get_slice(key)
                fill_local(
                    targets[target],
                    lambda region, view=view: view[region] if region else view[...],
                    packing_of(model, target),
                )
    for first, conversion in plan.conversions.items():
        if targets.keys().isdisjoint(_convert(first, conversion, blueprint, shapes_only=True)):
            continue
        for target, full in _convert(first, conversion, blueprint).items():
            fill_local(targets[target], lambda region, full=full: full[region], packing_of(model, target))


def recall_conversions(blueprint: PreTrainedModel, folder: Path) -> None:
    """Note on the blueprint which conversions loading the files of `folder` takes, as a load does.

    For an export of weights that come from elsewhere (a checkpoint of a run that began with `folder`): it reverts
    these, so its files are laid out as those of the folder. Reads headers only.
    """
    _make_plan(find_weight_files(folder), blueprint)


def resolve_folder(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """A local folder as it is; a hub id is downloaded (safetensors, configs and tokenizer files only).

    weights: False leaves the safetensors out of the download.
    """
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    # Some repositories hold the same weights a second time, in their authors' own format.
    ignored = ["consolidated*", "original/*"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; a ValueError says what is wrong with a folder that has none."""
    if (folder / _INDEX).is_file():
        names = _read_index(folder / _INDEX)
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(f"{folder}: {_INDEX} names files that are not there: {', '.join(absent)}. Download again.")
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder}: only pickled .bin weights, which can run code when they are read; safetensors are needed. "
            f"Convert once: AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')."
        )
    raise ValueError(
        f"{folder}: neither {_SINGLE} nor {_INDEX}; a folder or repository with safetensors is needed. Pickled "
        ".bin weights are not read: load them with Transformers once and write them with save_pretrained."
    )


def check_weight_files(folder: Path) -> None:
    """Raise a ValueError that names the file if one of a model folder's is missing, truncated or no safetensors."""
    for file in find_weight_files(folder):
        with _open(file):
            pass


def _read_index(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{index}: damaged ({error!r}): it must map tensors to files. Download it again.") from error


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or damaged safetensors ({error}). Download or write it again.") from error


def _make_plan(files: list[Path], blueprint: PreTrainedModel) -> _LoadPlan:
    expected = named_tensors(blueprint)
    mapping = get_model_conversion_mapping(blueprint)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = {p: e for e in mapping if isinstance(e, WeightConverter) for p in e.source_patterns}
    prefix = blueprint.base_model_prefix
    plan = _LoadPlan({}, {}, [], {})
    for file in files:
        with _open(file) as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                plan.shapes[key] = tuple(opened.get_slice(key).get_shape())
                target, pattern = rename_source_key(key, renamings, list(converters.values()), prefix, expected)
                if target not in expected and key in expected:
                    target, pattern = key, None
                if target not in expected:
                    plan.unexpected.append(key)
                elif pattern is None:
                    plan.direct[target] = (file, key)
                else:
                    fresh = _Conversion(copy.deepcopy(converters[pattern]))
                    plan.conversions.setdefault(target, fresh).sources.append((file, key, pattern))
    # As `from_pretrained` does: what was used in loading is what an export reverts.
    blueprint._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return plan


def _check_plan(plan: _LoadPlan, blueprint: PreTrainedModel, folder: Path) -> None:
    expected = named_tensors(blueprint)
    found = set(plan.direct)
    for first, conversion in plan.conversions.items():
        found |= set(_convert(first, conversion, blueprint, shapes_only=True))
    for target, source in blueprint.all_tied_weights_keys.items():
        if {target, source} <= plan.direct.keys():
            _check_tied_equal(plan.direct[target], plan.direct[source], folder)
            del plan.direct[target]
        if {target, source} & found:
            found |= {target, source}
    problems = {
        "missing in the files": _not_ignored(set(expected) - found, blueprint._keys_to_ignore_on_load_missing),
        "unexpected in the files": _not_ignored(
            set(plan.unexpected), {*(blueprint._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"}
        ),
        "of another shape": [
            f"{target} (model {tuple(expected[target].shape)}, file {plan.shapes[key]})"
            for target, (_, key) in plan.direct.items()
            if tuple(expected[target].shape) != plan.shapes[key]
        ],
    }
    lines = [
        f"  {len(names)} {kind}: {', '.join(sorted(names)[:_LISTED])}{' ...' if len(names) > _LISTED else ''}"
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(
            "\n".join([f"{folder}: the weights do not fit {type(blueprint).__name__} as configured:", *lines])
            + "\nCheck the model, its revision and [hf_transformers] config_overrides, or set hf_transformers.init = "
            '"scratch" to draw all weights anew.'
        )


def _not_ignored(names: set[str], patterns) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]


def _check_tied_equal(one: tuple[Path, str], other: tuple[Path, str], folder: Path) -> None:
    tensors = []
    for file, key in (one, other):
        with _open(file) as opened:
            tensors.append(opened.get_tensor(key))
    if not torch.equal(*tensors):
        raise ValueError(
            f"{folder}: the config ties {one[1]} to {other[1]}, but the files hold different values for them. Set "
            "[hf_transformers.config_overrides] tie_word_embeddings = false to train them as two parameters."
        )


def _convert(
    first: str, conversion: _Conversion, blueprint: PreTrainedModel, *, shapes_only: bool = False
) -> dict[str, torch.Tensor]:
    """Run one of Transformers' conversions; full tensors of one group are alive at a time (meta if shapes_only)."""
    converter = copy.deepcopy(conversion.converter)
    for file, key, pattern in conversion.sources:
        with _open(file) as opened:
            if shapes_only:
                tensor = torch.empty(opened.get_slice(key).get_shape(), device="meta")
            else:
                tensor = opened.get_tensor(key)
        converter.add_tensor(first, key, pattern, tensor)
    converted = converter.convert(first, model=blueprint, config=blueprint.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}
