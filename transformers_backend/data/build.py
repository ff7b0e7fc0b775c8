"""From the keys of `[training]` or `[validation]` to batches: choose the source, pack it, try the first block."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from transformers_backend.data.batches import PackedBatches
from transformers_backend.data.files import open_path, open_standard_library
from transformers_backend.data.hub import open_stream
from transformers_backend.data.sources import BUILT_IN_SOURCE, IndexedSource, StreamedSource
from transformers_backend.data.tokens import document_encoder

_ALIASES = {"c4": ("allenai/c4", "en")}  # as torchtitan's files name it


def build_batches(
    *,
    dataset: str,
    dataset_path: str | None,
    dataset_name: str | None,
    dataset_split: str,
    dataset_revision: str | None,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
    seq_len: int,
    batch_size: int,
    data_rank: int,
    data_world_size: int,
    seed: int,
    repeat: bool = True,
) -> PackedBatches:
    """Open the dataset and return this data rank's iterator over batches.

    Args:
        dataset: "python_stdlib", or the hub id of a dataset that is streamed. Unused where `dataset_path` is given.
        dataset_path: a .txt, .jsonl, .json, .parquet, .csv or .arrow file, or a folder with files of one such kind.
            A .txt file is one document (a long one several, of about 64 KiB), else each record is one.
        dataset_name, dataset_revision: configuration and git revision of a hub dataset.
        dataset_split: split of a hub dataset, or "train" or "validation" of the built-in source. Records of local
            files are one split, of any name; a slice of it works too ("train[:90%]").
        text_column: the field of a record that holds its text.
        vocabulary_size: rows of the model's embedding; the tokenizer must not have more tokens.
        data_rank, data_world_size: which of how many parts of the data this is. Ranks that differ only in tensor,
            pipeline or context parallelism have the same.
        seed: decides the order of documents, together with the epoch. Unused with `repeat=False`.
        repeat: True goes on with the next epoch for ever; False (validation) ends after one, see `PackedBatches`.

    Raises ValueError for what the dataset lacks and ImportError where `datasets` is needed and missing. Every source
    is opened and the first block is read here, so that mistakes show before the first step.
    """
    assert 0 <= data_rank < data_world_size
    assert min(seq_len, batch_size) > 0
    if len(tokenizer) > vocabulary_size:
        raise ValueError(
            f"model.hf_assets_path: the tokenizer has {len(tokenizer)} tokens, and the model's vocabulary "
            f"{vocabulary_size}: it must have at least as many. Use the model's own tokenizer, or set vocab_size = "
            f"{len(tokenizer)} in hf_transformers.config_overrides."
        )
    # Validation reads everything on every rank, in its own order, so that its figures compare between runs.
    order = (seed, data_rank, data_world_size) if repeat else (None, 0, 1)
    dataset, dataset_name = _ALIASES.get(dataset, (dataset, dataset_name))
    source: IndexedSource | StreamedSource
    if dataset_path is not None:
        source = open_path(dataset_path, dataset_split, text_column, order)
    elif dataset == BUILT_IN_SOURCE:
        source = open_standard_library(dataset_split, order)
    else:
        source = open_stream(dataset, dataset_name, dataset_split, dataset_revision, text_column, order)
    fingerprint = source.fingerprint | {
        "tokenizer": f"{type(tokenizer).__name__} with {len(tokenizer)} tokens",
        "seed": seed if repeat else None,
        "repeat": repeat,
    }
    fill_token = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    batches = PackedBatches(
        source,
        document_encoder(tokenizer),
        seq_len=seq_len,
        batch_size=batch_size,
        data_rank=data_rank,
        data_world_size=data_world_size,
        repeat=repeat,
        fill_token=fill_token,
        fingerprint=fingerprint,
    )
    batches.require_first_block()
    return batches
