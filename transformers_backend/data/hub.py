"""Documents of a data set that is streamed from the Hugging Face hub, without keeping a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from transformers_backend.data.sources import BUILT_IN_SOURCE, ChooseFormat, Encoder, import_datasets
from transformers_backend.data.streams import Records, Stream


def open_stream(
    dataset: str, configuration: str | None, split: str, revision: str | None, choose_format: ChooseFormat
) -> tuple[Stream, Encoder]:
    name = f'dataset = "{dataset}"'
    datasets = import_datasets(name)
    if int(datasets.__version__.partition(".")[0]) < 5:
        raise ImportError(
            f"{name}: streaming needs datasets >= 5, found {datasets.__version__}: pip install -U datasets"
        )
    try:
        records = datasets.load_dataset(dataset, name=configuration, split=split, revision=revision, streaming=True)
    except (OSError, ValueError) as error:  # not found or no connection; unknown configuration or split
        raise ValueError(
            f'{name} (dataset_name = {configuration!r}, dataset_split = "{split}", dataset_revision = {revision!r}): '
            f'must be "{BUILT_IN_SOURCE}" or a dataset of the Hugging Face hub, and could not be opened. Check these '
            f"keys and the connection, or give local files in dataset_path. ({type(error).__name__}: {error})"
        ) from error
    record_format = choose_format(records.column_names, name)  # names may be known only when a record is read
    fingerprint = {
        "dataset": dataset, "configuration": configuration, "split": split, "revision": revision,
        "columns": ", ".join(record_format.columns),
    }  # fmt: skip
    return Stream(name, _HubParts(records), fingerprint), record_format.encode


@dataclass(frozen=True)
class _HubParts:
    """`datasets` splits files over ranks where their number allows, else every rank reads its share of all files."""

    records: Any

    def __call__(self, seed: int | None, epoch: int, data_rank: int, data_world_size: int) -> Records:
        from datasets.distributed import split_dataset_by_node

        records = self.records
        if seed is not None:
            # A buffer of one record: only the order of files changes. Taking records from several files at a time was
            # measured 20 times slower (`datasets` 5.2), and 5.0 then loses the split by files (its issue 8669).
            seed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
            records = records.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        return split_dataset_by_node(records, rank=data_rank, world_size=data_world_size)
