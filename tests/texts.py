"""Small data sets on disk, and what tests of the data package read back from batches (tokens are ByT5's)."""

from __future__ import annotations

import functools
import json
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path

import torch

from transformers_backend import data

EOS, OFFSET, IGNORED = 1, 3, -100

load_byt5 = functools.cache(functools.partial(data.load_tokenizer, "byt5"))


def build_batches(path: Path | None = None, **changes) -> data.PackedBatches:
    """Batches of 2 x 8 ByT5 tokens of the text at `path`; `changes` are keys of the source or of build_batches."""
    keys = {"dataset_path": None if path is None else str(path)}
    arguments = {
        "tokenizer": load_byt5(), "vocabulary_size": 384, "seq_len": 8, "batch_size": 2, "data_rank": 0,
        "data_world_size": 1, "seed": 7,
    }  # fmt: skip
    for key, value in changes.items():
        (keys if key in {entry.name for entry in fields(data.SourceKeys)} else arguments)[key] = value
    sources = arguments.pop("sources", None) or {"": data.SourceKeys(**keys)}
    return data.build_batches(sources, **arguments)


def write_text_files(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_bytes(text.encode("utf-8"))
    return folder


def write_json_lines(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rewrite(path: Path, text: str) -> None:
    """Replace a file in one step: whoever reads it meanwhile sees the old text or the new one, not an empty file."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    os.replace(temporary, path)


def tokens_of(batches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    """All tokens with a label, in order."""
    return [token for batch in batches for token in batch["labels"].flatten().tolist() if token != IGNORED]


def documents_of(tokens: list[int]) -> list[str]:
    """The texts of complete documents; a first and a last incomplete one stay as they are."""
    text = "".join("\n" if token == EOS else chr(token - OFFSET) for token in tokens)
    return text.strip("\n").split("\n")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def assert_resumes(make: Callable[[], data.PackedBatches], steps: int) -> None:
    """From after every batch, a new loader with the saved state gives exactly the batches that follow.

    `make` gives the only data rank's; with more ranks their states would have to be collected.
    """
    straight = make()
    states, batches = [straight.state_dict()], []
    for batch in islice(straight, steps):
        batches.append(batch)
        states.append(pickle.loads(pickle.dumps(straight.state_dict())))
    straight.close()
    for done, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(of_all_ranks(state))
        rest = list(islice(resumed, len(batches) - done))
        resumed.close()
        assert len(rest) == len(batches) - done
        assert all(map(same, batches[done:], rest)), f"after {done} batches"


def of_all_ranks(state: dict) -> list[dict]:
    """States of as many ranks as saved `state`, where only that of its own rank will be used."""
    return [state | {"data_rank": rank} for rank in range(state["data_world_size"])]
