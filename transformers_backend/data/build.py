"""From the keys of `[training]` or `[validation]` to batches: open the sources, pack them, try the first block.

`open_source` is where the kinds of sources are told apart, and `_choose_format` where the kinds of records are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from transformers_backend.data.batches import PackedBatches, Stage
from transformers_backend.data.chat import ChatEncoder, chat_encoder
from transformers_backend.data.feeds import Feeds
from transformers_backend.data.files import open_path, open_standard_library
from transformers_backend.data.hook import HookEncoder, hook_encoder, is_hook, open_hook
from transformers_backend.data.hub import open_stream
from transformers_backend.data.sources import (
    BUILT_IN_SOURCE,
    HUB_ALIASES,
    NOT_EMPTY,
    ChooseFormat,
    Collection,
    Encoder,
    Format,
    TextEncoder,
    require_column,
)
from transformers_backend.data.streams import RepeatedIterable, Stream
from transformers_backend.data.token_file import as_document, is_token_file, open_token_file, tokenizer_digest
from transformers_backend.data.tokenized import TokenizedEncoder, tokenized_encoder
from transformers_backend.data.tokens import TOKENIZER_KEYS, DocumentEncoder
from transformers_backend.job_config import TextSource, Training, stage_weights


@dataclass(frozen=True)
class SourceKeys:
    """What a job says about one source; names and meanings are those of the job config."""

    dataset: str = BUILT_IN_SOURCE
    """"python_stdlib", a path (the same as dataset_path), "module:function" or "file.py:function" (`hook.py`), or the
    hub id of a dataset that is streamed."""
    dataset_path: str | None = None
    """A .txt, .jsonl, .json, .parquet, .csv or .arrow file, or a folder with files of one such kind. A .txt file is one
    document (a long one several, of about 64 KiB), else each record is one. Or a folder of tokens (`token_file.py`)."""
    dataset_name: str | None = None
    """Configuration of a hub dataset."""
    dataset_split: str = "train"
    """Split of a hub dataset, or "train" or "validation" of the built-in source. Records of local files are one split,
    of any name; a slice of it works too ("train[:90%]")."""
    dataset_revision: str | None = None
    """Git revision of a hub dataset."""
    text_column: str = "text"
    """The field of a record that holds its text. Where there is none of the name, but input_ids, those are taken."""
    messages_column: str | None = None
    """The field that holds a conversation; None: records are no conversations."""
    chat_template: str | None = None
    """File with a chat template in place of the tokenizer's."""


def configured_sources(section: TextSource) -> tuple[dict[str, SourceKeys], list[Stage] | None]:
    """What a section of the job config says about sources and stages, as `build_batches` takes them."""
    keys = [entry.name for entry in fields(SourceKeys)]
    sources: dict[str, TextSource] = {"": section}
    stages = None
    if isinstance(section, Training) and section.sources:
        sources = {source.name: source for source in section.sources}
        stages = [Stage(*stage) for stage in stage_weights(section.sources, section.stages)]
    values = {name: {key: getattr(source, key) for key in keys} for name, source in sources.items()}
    if not isinstance(section, Training) and section.dataset is None:
        values[""]["dataset"] = BUILT_IN_SOURCE
    return {name: SourceKeys(**of_source) for name, of_source in values.items()}, stages


def build_batches(
    sources: dict[str, SourceKeys],
    stages: Sequence[Stage] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
    seq_len: int,
    batch_size: int,
    data_rank: int,
    data_world_size: int,
    seed: int,
    repeat: bool = True,
    packing: str = "concat",
    batches_per_step: int = 1,
    num_workers: int | None = None,
    prefetch_factor: int = 2,
) -> PackedBatches:
    """Open the sources and return this data rank's iterator over batches.

    Args:
        sources: what is read, by name; a job's only source has the name "".
        stages: from which step the sources have which weights. None: all have the same, always.
        vocabulary_size: rows of the model's embedding; the tokenizer must not have more tokens.
        data_rank, data_world_size: which of how many parts of the data this is. Ranks that differ only in tensor,
            pipeline or context parallelism have the same.
        seed: decides the order of documents, together with the epoch. Unused with `repeat=False`.
        repeat: True goes on with the next epoch for ever; False (validation) ends after one, see `PackedBatches`.
        packing: "concat", or "documents" for position_ids that restart with every document.
        batches_per_step: batches of this rank in one optimizer step.
        num_workers: processes that read and tokenize. None means 1 where documents go through a tokenizer, which keeps
            some hundred thousand tokens a second away from the training process; and 0, this process, where
            tokens are made almost for nothing (byt5), so that small runs pay for no process.
        prefetch_factor: chunks of about 65,000 tokens that each worker is ahead.

    Raises ValueError for what the dataset lacks and ImportError where `datasets` is needed and missing. Every source
    is opened and the first block is read here, so that mistakes show before the first step.
    """
    assert 0 <= data_rank < data_world_size
    assert min(seq_len, batch_size, batches_per_step) > 0
    assert packing in ("concat", "documents")
    require_vocabulary(tokenizer, vocabulary_size)
    opened = {name: open_source(keys, tokenizer, vocabulary_size) for name, keys in sources.items()}
    if num_workers is None:
        num_workers = int(any(_is_slow(encode) for _, encode in opened.values()))
    # Validation reads everything on every rank, in its own order, so that its figures compare between runs.
    order = (seed, data_rank, data_world_size) if repeat else (None, 0, 1)
    batches = PackedBatches(
        Feeds(list(opened.values()), order, repeat=repeat, num_workers=num_workers, prefetch_factor=prefetch_factor),
        names=tuple(opened),
        stages=stages or [Stage(1, (1.0,) * len(opened))],
        seq_len=seq_len,
        batch_size=batch_size,
        batches_per_step=batches_per_step,
        data_rank=data_rank,
        data_world_size=data_world_size,
        repeat=repeat,
        positions=packing == "documents",
        fill_token=next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0),
        fingerprint={
            "sources": {name: _fingerprint(source, encode) for name, (source, encode) in opened.items()},
            "tokenizer": f"{type(tokenizer).__name__} with {len(tokenizer)} tokens, {tokenizer_digest(tokenizer)[:16]}",
            "seed": seed if repeat else None,
            "repeat": repeat,
        },
    )
    try:
        batches.require_first_block()
    except ValueError:
        batches.close()
        raise
    return batches


def open_source(
    keys: SourceKeys, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int
) -> tuple[Collection | Stream, Encoder]:
    """Open what the keys of one source name, and choose how its records become documents."""
    choose_format = _choose_format(keys, tokenizer, vocabulary_size)
    dataset, configuration = _hub_names(keys)
    source: Collection | Stream
    is_path = not is_hook(dataset) and dataset != BUILT_IN_SOURCE and Path(dataset).expanduser().exists()
    path = keys.dataset_path or (dataset if is_path else None)
    if path is not None and is_token_file(path):
        source, encode = open_token_file(path, f'dataset_path = "{path}"', tokenizer, keys.dataset_split)
    elif path is not None:
        source, encode = open_path(path, keys.dataset_split, choose_format)
    elif dataset == BUILT_IN_SOURCE:
        source, encode = open_standard_library(keys.dataset_split, choose_format)
    elif is_hook(dataset):
        source, encode = _open_hook(keys, tokenizer, vocabulary_size)
    else:
        source, encode = open_stream(dataset, configuration, keys.dataset_split, keys.dataset_revision, choose_format)
    if isinstance(source, Collection) and source.count == 0:
        raise ValueError(f"{source.name}: holds no documents. {NOT_EMPTY}")
    return source, encode


def _hub_names(keys: SourceKeys) -> tuple[str, str | None]:
    """The data set and its configuration, with an alias resolved."""
    if keys.dataset not in HUB_ALIASES:
        return keys.dataset, keys.dataset_name
    dataset, configuration = HUB_ALIASES[keys.dataset]
    if keys.dataset_name not in (None, configuration):
        raise ValueError(
            f'dataset_name = "{keys.dataset_name}": dataset = "{keys.dataset}" stands for "{dataset}" with '
            f'dataset_name = "{configuration}". Write dataset = "{dataset}" for another one.'
        )
    return dataset, configuration


def _choose_format(keys: SourceKeys, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> ChooseFormat:
    text_encoder = TextEncoder(DocumentEncoder(tokenizer), keys.text_column)

    def choose(columns: Sequence[str] | None, name: str) -> Format:
        if keys.messages_column is not None:
            if columns is not None:
                require_column(keys.messages_column, columns, name, "messages_column")
            with_tools = [column for column in ("tools",) if column in (columns or ())]
            return Format([keys.messages_column, *with_tools], _chat_encoder(keys, tokenizer))
        if columns is not None and "input_ids" in columns and keys.text_column not in columns:
            used = [column for column in TokenizedEncoder.columns if column in columns]
            return Format(used, tokenized_encoder(vocabulary_size))
        if columns is not None:
            require_column(keys.text_column, columns, name)
        return Format([keys.text_column], text_encoder)

    return choose


def _chat_encoder(keys: SourceKeys, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return chat_encoder(tokenizer, keys.messages_column, keys.chat_template)


def _open_hook(
    keys: SourceKeys, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int
) -> tuple[Collection | Stream, Encoder]:
    name = f'dataset = "{keys.dataset}"'
    data = open_hook(keys.dataset, name, keys.dataset_split)
    encode = hook_encoder(
        text=TextEncoder(DocumentEncoder(tokenizer), keys.text_column),
        tokenized=tokenized_encoder(vocabulary_size),
        chat=None if keys.messages_column is None else _chat_encoder(keys, tokenizer),
        text_column=keys.text_column,
        messages_column=keys.messages_column,
    )
    if isinstance(data, Collection):
        return data, encode
    fingerprint = {"dataset": keys.dataset, "split": keys.dataset_split}
    return Stream(name, RepeatedIterable(data), fingerprint), encode


def _is_slow(encode: Encoder) -> bool:
    """Whether making tokens of a record costs so much that it belongs into a worker."""
    if isinstance(encode, TextEncoder):
        return not encode.encode_text.is_byt5
    return encode is not as_document and not isinstance(encode, TokenizedEncoder)


def _fingerprint(source: Collection | Stream, encode: Encoder) -> dict[str, object]:
    found = dict(source.fingerprint)
    if isinstance(source, Collection):
        found["documents"] = source.count
    chat = encode.chat if isinstance(encode, HookEncoder) else encode
    if isinstance(chat, ChatEncoder):
        found["chat_template"] = chat.template_digest
    return found


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> None:
    if len(tokenizer) > vocabulary_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, and the model's vocabulary {vocabulary_size}: it must have at "
            f"least as many. Name the model's own tokenizer in {TOKENIZER_KEYS}, or set vocab_size = {len(tokenizer)} "
            "in hf_transformers.config_overrides."
        )
