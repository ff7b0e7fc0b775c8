"""From text to batches: load the tokenizer, read documents, pack them into blocks of `seq_len` tokens.

It stands between the model and the training step: `load_tokenizer` and `build_batches` are called once, then
`train_step` calls `next()` on the `PackedBatches`, whose `state_dict()` goes into every checkpoint.

    documents (one of three sources) -> tokens, one end-of-sequence token after each -> blocks -> batches

A source says how many documents there are, in what order this data rank reads them in an epoch, and how to go on
from a position. The sources are text files (the built-in one is the Python standard library's own source code),
records of local data files, and records streamed from the Hugging Face hub. The last two need the `datasets` package,
which is imported only there.

Errors name the keys of `[training]`, which `[validation]` shares, without their section.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

IGNORED_LABEL = -100
BUILT_IN_SOURCE = "python_stdlib"
FILE_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json"} | {
    f".{kind}": kind for kind in ("parquet", "csv", "arrow")
}
# Documents of a stream are shuffled inside windows of this many. `datasets` has a shuffle buffer of its own, but
# loses its content on a resume; a window is simply read again.
SHUFFLE_WINDOW = 1000
_NOT_EMPTY = "Point it to data that is not empty."


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a hub id or a local folder; "byt5" is the byte-level one, which needs no files.

    Raises ValueError where there is none. Transformers makes an empty tokenizer, which knows no word, for a folder
    with a model config only; that is refused too.
    """
    if name_or_path == "byt5":
        return ByT5Tokenizer()
    remedy = 'Name a hub id or a folder with tokenizer files, or use the built-in byte-level "byt5".'
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError) as error:  # missing; not a tokenizer; a slow one without its vocabulary
        raise ValueError(
            f'model.hf_assets_path = "{name_or_path}": no tokenizer could be loaded from it. {remedy} '
            f"({type(error).__name__}: {error})"
        ) from error
    special = {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}
    if len(tokenizer.get_vocab().keys() - special) < 2:
        raise ValueError(
            f'model.hf_assets_path = "{name_or_path}": its tokenizer has no vocabulary, only special tokens; the '
            f"vocabulary file is missing. {remedy}"
        )
    return tokenizer


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
            Each .txt file is one document, else each record is one.
        dataset_name, dataset_revision: configuration and git revision of a hub dataset.
        dataset_split: split of a hub dataset. Records of local files are one split, of any name; a slice of it works
            too ("train[:90%]").
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
    source: _IndexedSource | _StreamedSource
    if dataset_path is not None:
        source = _open_path(dataset_path, dataset_split, text_column, order)
    elif dataset == BUILT_IN_SOURCE:
        source = _open_standard_library(order)
    else:
        source = _open_stream(dataset, dataset_name, dataset_split, dataset_revision, text_column, order)
    fingerprint = source.fingerprint | {
        "tokenizer": f"{type(tokenizer).__name__} with {len(tokenizer)} tokens",
        "seed": seed if repeat else None,
        "repeat": repeat,
    }
    fill_token = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    batches = PackedBatches(
        source,
        _document_encoder(tokenizer),
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


@dataclass(eq=False)
class PackedBatches:
    """Iterator over batches {"input_ids", "labels"}, both int64 of shape (batch_size, seq_len), on the CPU.

    Documents are tokenized as they are needed, concatenated and cut into blocks; a batch is the next `batch_size`
    blocks of this data rank. Labels follow Transformers: aligned with `input_ids` (the model shifts them), -100 is
    ignored.

    `repeat=True`: each data rank reads documents of its own, reshuffled every epoch, without end.

    `repeat=False`: the data ends, and the ranks must end after the same number of batches, or those that go on wait
    for ever in a collective. Without a word between them they can only agree on what all of them see. So every rank
    tokenizes everything, in the order of the source, and of these blocks, numbered 0, 1, ..., keeps
    `data_rank, data_rank + data_world_size, ...`. Where the data ends inside a block or a round of batches, the rest
    is filled with ignored labels: shapes never change, no token is lost, and each is seen by exactly one rank.
    """

    source: _IndexedSource | _StreamedSource
    encode: Callable[[str], np.ndarray]
    seq_len: int
    batch_size: int
    data_rank: int
    data_world_size: int
    repeat: bool
    fill_token: int
    fingerprint: dict[str, Any]

    def __post_init__(self) -> None:
        self.reset()

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        blocks = [self._next_block() for _ in range(self.batch_size)] if self.repeat else self._share_of_round()
        input_ids = np.full((self.batch_size, self.seq_len), self.fill_token, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        for row, block in enumerate(blocks):
            input_ids[row, : len(block)] = block
            labels[row, : len(block)] = block
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def reset(self) -> None:
        """Start over with the first batch of the first epoch (each validation does)."""
        self._start(epoch=0, position=None, leftover=())

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts, as plain numbers, strings, lists and dicts; each data rank has its own."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "leftover": self._tokens.tolist(),  # read and tokenized, but not yet part of a batch
            "data_rank": self.data_rank,
            "data_world_size": self.data_world_size,
            "fingerprint": dict(self.fingerprint),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken. Raises ValueError for one of other data or of another data rank."""
        saved, here = ((s["data_rank"], s["data_world_size"]) for s in (state, self.state_dict()))
        if saved != here:
            raise ValueError(
                f"The checkpoint's data state is of data rank {saved[0]} of {saved[1]}, and this is data rank "
                f"{here[0]} of {here[1]}: documents are split over data ranks, so their number must stay the same. "
                "Set parallelism.data_parallel_replicate_degree and data_parallel_shard_degree so that their product "
                "is what it was, or start a new run from the checkpoint's weights."
            )
        saved, here = state["fingerprint"], self.fingerprint
        differences = [
            f"{key} = {saved.get(key)!r} there and {here.get(key)!r} here"
            for key in sorted(saved.keys() | here.keys())
            if saved.get(key) != here.get(key)
        ]
        if differences:
            raise ValueError(
                f"The checkpoint's data state is of other data: {'; '.join(differences)}. Its position has a meaning "
                "only in the same data: give dataset, dataset_path, text_column, tokenizer and seed as they were, or "
                "start a new run from the checkpoint's weights."
            )
        self._start(state["epoch"], state["position"], state["leftover"])

    def require_first_block(self) -> None:
        """Read up to the first block, and raise ValueError if an epoch does not hold one (validation: any token)."""
        self._fill(self.seq_len, across_epochs=False)
        needed = self.seq_len if self.repeat else 1
        if len(self._tokens) < needed:
            raise ValueError(
                f"{self.source.name}: data rank {self.data_rank} of {self.data_world_size} gets "
                f"{len(self._tokens)} tokens of text in an epoch, and needs at least {needed} (seq_len = "
                f"{self.seq_len}). Use more text, a smaller seq_len or fewer data ranks."
            )

    def _start(self, epoch: int, position: Any, leftover: Any) -> None:
        self._epoch = epoch
        self._position = position
        self._tokens = np.asarray(leftover, dtype=np.int64)
        self._documents = self.source.read_from(epoch, position)

    def _fill(self, count: int, *, across_epochs: bool) -> None:
        """Tokenize documents until at least `count` tokens are there, or the epoch ends and may not be passed."""
        chunks, available = [self._tokens], len(self._tokens)
        while available < count:
            position_and_text = next(self._documents, None)
            if position_and_text is not None:
                self._position, text = position_and_text
                if text:
                    chunks.append(self.encode(text))
                    available += len(chunks[-1])
            elif across_epochs:
                self._start(self._epoch + 1, None, ())
            else:
                break
        self._tokens = np.concatenate(chunks)

    def _next_block(self) -> np.ndarray:
        """The next `seq_len` tokens; fewer, or none, at the end of the data (only with `repeat=False`)."""
        if len(self._tokens) < self.seq_len:
            self._fill(self.seq_len, across_epochs=self.repeat)
        block, self._tokens = self._tokens[: self.seq_len], self._tokens[self.seq_len :]
        return block

    def _share_of_round(self) -> list[np.ndarray]:
        """This rank's blocks of one round (a batch for every rank), some of them possibly empty."""
        blocks = [self._next_block() for _ in range(self.batch_size * self.data_world_size)]
        if len(blocks[0]) == 0:
            raise StopIteration
        return blocks[self.data_rank :: self.data_world_size]


def _document_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], np.ndarray]:
    """Return the function from a document's text to its tokens (int64): those of the tokenizer, and one end token.

    Where the tokenizer has an end-of-sequence token, exactly one stands at the end, whether or not the tokenizer
    (or the text) puts one there; a beginning token stands there once if the tokenizer puts one. Special tokens that
    a text spells out ("</s>") become those tokens, as the tokenizer has it.

    ByT5's tokenizer works character by character in Python. A token is a byte's value plus its offset of 3, which
    is computed directly (some hundred times as fast); only texts that spell out an added token go through it.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    end = [] if eos is None else [eos]

    def encode(text: str) -> np.ndarray:
        # ByT5 warns about a text that ends in "</s>" when it adds special tokens, of which it has none but that.
        tokens = tokenizer(text, add_special_tokens=not is_byt5, return_attention_mask=False, verbose=False).input_ids
        if bos is not None and tokens[:2] == [bos, bos]:
            tokens = tokens[1:]
        while end and tokens and tokens[-1] == eos:
            tokens.pop()
        return np.asarray(tokens + end, dtype=np.int64)

    def encode_bytes(text: str) -> np.ndarray:
        if added_tokens.search(text):
            return encode(text)
        values = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        return np.concatenate([values.astype(np.int64) + tokenizer.offset, np.asarray(end, dtype=np.int64)])

    is_byt5 = type(tokenizer) is ByT5Tokenizer
    added_tokens = re.compile("|".join(map(re.escape, tokenizer.added_tokens_encoder)))
    return encode_bytes if is_byt5 else encode


# (seed or None for the source's own order, data_rank, data_world_size)
_Order = tuple["int | None", int, int]


class _IndexedSource:
    """Documents that can be read by number: every epoch a full shuffle, of which rank r reads r, r + world, ..."""

    def __init__(self, name: str, read: Callable[[int], str], count: int, order: _Order, fingerprint: dict[str, Any]):
        if count == 0:
            raise ValueError(f"{name}: holds no documents. {_NOT_EMPTY}")
        self.name = name
        self._read = read
        self._count = count
        self._seed, self._rank, self._world_size = order
        self.fingerprint = fingerprint | {"documents": count}

    def read_from(self, epoch: int, position: int | None) -> Iterator[tuple[int, str]]:
        numbers = _permutation(self._count, self._seed, epoch)[self._rank :: self._world_size]
        for place in range(position or 0, len(numbers)):
            yield place + 1, self._read(int(numbers[place]))


class _StreamedSource:
    """Records of an iterable dataset, which knows no numbers: files are shuffled and split over data ranks by
    `datasets`, records are shuffled inside windows of `SHUFFLE_WINDOW`.

    A position is the window's number, the place in its order, and the state of the stream where it starts.
    """

    def __init__(self, name: str, dataset: Any, text_column: str, order: _Order, fingerprint: dict[str, Any]):
        self.name = name
        self._dataset = dataset
        self._text_column = text_column
        self._seed, self._rank, self._world_size = order
        self.fingerprint = fingerprint | {"text_column": text_column}
        if dataset.column_names is not None:  # else known only when a record is read
            _require_column(text_column, dataset.column_names, name)

    def read_from(self, epoch: int, position: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], str]]:
        position = position or {"window": 0, "place": 0, "stream": None}
        window, place, stream = position["window"], position["place"], position["stream"]
        dataset = self._dataset_of_epoch(epoch)
        if stream is not None:
            dataset.load_state_dict(stream)
        records = iter(dataset)
        while True:
            with _without_shuffle_buffer_message():
                texts = [self._text(record) for record in islice(records, SHUFFLE_WINDOW)]
            if not texts:
                return
            numbers = _permutation(len(texts), self._seed, epoch, window)
            while place < len(texts):
                place += 1
                yield {"window": window, "place": place, "stream": stream}, texts[numbers[place - 1]]
            window, place, stream = window + 1, 0, dataset.state_dict()

    def _dataset_of_epoch(self, epoch: int) -> Any:
        from datasets.distributed import split_dataset_by_node

        dataset = self._dataset
        if self._seed is not None:
            # A buffer of one record: only the order of files changes. Taking records from several files at a time was
            # measured 20 times slower (`datasets` 5.2), and 5.0 then loses the split by files (its issue 8669).
            seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
            dataset = dataset.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        return split_dataset_by_node(dataset, rank=self._rank, world_size=self._world_size)

    def _text(self, record: dict[str, Any]) -> str:
        _require_column(self._text_column, record, self.name)
        return _require_text(record[self._text_column], self._text_column, f"{self.name}: record {str(record)[:100]}")


def _open_standard_library(order: _Order) -> _IndexedSource:
    """The .py files of the running Python's standard library; those that are not UTF-8 (test data) are skipped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = _files_below(root, skip_folders=("site-packages", "dist-packages"))
    files = [path for path in paths if path.suffix == ".py"]

    def read(number: int) -> str:
        try:
            return files[number].read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            return ""

    name = f'dataset = "{BUILT_IN_SOURCE}"'
    return _IndexedSource(name, read, len(files), order, _fingerprint_of_files(BUILT_IN_SOURCE, root, files))


def _open_path(dataset_path: str, split: str, text_column: str, order: _Order) -> _IndexedSource:
    """Local files: .txt ones are read directly, records through `datasets`, which keeps an Arrow copy in its cache."""
    root = Path(dataset_path).expanduser()
    kind, files = _data_files(root, name := f'dataset_path = "{dataset_path}"')
    files = [file for file in files if file.stat().st_size > 0]
    fingerprint = _fingerprint_of_files(root.resolve().name, root, files)
    if not files:
        raise ValueError(f"{name}: all its files are empty. {_NOT_EMPTY}")
    split_name, bracket, bounds = split.partition("[")
    if kind == "text":
        if bracket:
            raise ValueError(
                f'dataset_split = "{split}": {name} is plain text, of which no slice can be taken. Put the files of '
                "each split into a folder of its own."
            )
        return _IndexedSource(name, lambda number: _read_text_file(files[number], name), len(files), order, fingerprint)

    datasets = _import_datasets(name)
    try:
        records = datasets.load_dataset(kind, data_files={split_name: [str(file) for file in files]}, split=split)
    except (ValueError, datasets.exceptions.DatasetsError) as error:  # no record; a bad slice; not what it is named
        raise ValueError(
            f'{name} (dataset_split = "{split}"): must hold at least one record in valid {kind} form, and could not '
            f"be read. Correct the files or the split. ({type(error).__name__}: {error.__cause__ or error})"
        ) from error
    _require_column(text_column, records.column_names, name)
    records = records.select_columns([text_column])

    def read_record(number: int) -> str:
        where = f"{name}: record {number} (from 0, over {len(files)} files sorted by name, from {files[0].name})"
        return _require_text(records[number][text_column], text_column, where)

    fingerprint |= {"text_column": text_column, "slice": bracket + bounds}
    return _IndexedSource(name, read_record, len(records), order, fingerprint)


def _open_stream(
    dataset: str, configuration: str | None, split: str, revision: str | None, text_column: str, order: _Order
) -> _StreamedSource:
    name = f'dataset = "{dataset}"'
    datasets = _import_datasets(name)
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
    fingerprint = {"dataset": dataset, "configuration": configuration, "split": split, "revision": revision}
    return _StreamedSource(name, records, text_column, order, fingerprint)


def _data_files(root: Path, name: str) -> tuple[str, list[Path]]:
    """Return the kind of the data files at `root` ("text", "json", ...) and their sorted paths."""
    supported = ", ".join(FILE_KINDS)
    if root.is_file():
        if root.suffix.lower() not in FILE_KINDS:
            raise ValueError(
                f"{name}: unknown file type {root.suffix!r}: must be one of {supported}. Convert the file."
            )
        return FILE_KINDS[root.suffix.lower()], [root]
    if not root.is_dir():
        raise ValueError(f"{name}: no such file or folder; it must exist on every machine. Correct the path.")
    if (root / "dataset_dict.json").is_file():
        raise ValueError(f"{name}: holds several splits in folders. Give one of them, e.g. {root / 'train'}.")
    # `Dataset.save_to_disk` writes these two beside its .arrow files.
    files = [file for file in _files_below(root) if file.name not in ("dataset_info.json", "state.json")]
    files = [file for file in files if file.suffix.lower() in FILE_KINDS]
    kinds = sorted({FILE_KINDS[file.suffix.lower()] for file in files})
    if not files:
        raise ValueError(f"{name}: holds no file of a known type: must have some of {supported}. Convert the files.")
    if len(kinds) > 1:
        examples = ", ".join(next(f.name for f in files if FILE_KINDS[f.suffix.lower()] == kind) for kind in kinds)
        raise ValueError(
            f"{name}: holds files of several kinds ({examples}): must be of one kind. Give a file or a subfolder."
        )
    return kinds[0], files


def _files_below(root: Path, skip_folders: tuple[str, ...] = ()) -> list[Path]:
    """All files in `root` and its folders, sorted by relative path; hidden ones and `skip_folders` are left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in skip_folders and not s.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _fingerprint_of_files(name: str, root: Path, files: list[Path]) -> dict[str, Any]:
    """The name, and a digest of relative paths and sizes: data may move, and content would have to be read."""
    listing = "\n".join(f"{file.relative_to(root).as_posix()} {file.stat().st_size}" for file in files)
    return {"dataset": name, "files": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]}


def _read_text_file(path: Path, name: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path} is not UTF-8 text ({error}). Convert or remove the file.") from error


def _permutation(count: int, seed: int | None, *counters: int) -> np.ndarray:
    """The numbers below `count`, shuffled by seed and counters, or in order where `seed` is None."""
    return np.arange(count) if seed is None else np.random.default_rng((seed, *counters)).permutation(count)


def _require_column(text_column: str, columns: Any, name: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f'text_column = "{text_column}": must be a column of {name}, which has {", ".join(columns)}. '
            "Set text_column to the one with the text."
        )


def _require_text(value: Any, text_column: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f'{where} has text_column "{text_column}" = {value!r} of type {type(value).__name__}: must be a string. '
            "Correct or remove the record, or choose another text_column."
        )
    return value


def _import_datasets(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name}: reading it needs the `datasets` package, which is not installed: pip install datasets. "
            f'Without it, dataset = "{BUILT_IN_SOURCE}" and .txt files work.'
        ) from error
    return datasets


@contextmanager
def _without_shuffle_buffer_message() -> Iterator[None]:
    """Hold back the warning of `datasets` that a resumed shuffle buffer is refilled: ours holds a single record."""

    def is_other(record: logging.LogRecord) -> bool:
        return "state dict of a shuffle buffer" not in record.getMessage()

    logger = logging.getLogger("datasets.iterable_dataset")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
