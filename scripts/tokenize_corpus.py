"""Tokenizes text once, into a folder that training reads as memory: scripts/tokenize_corpus.py --help

    python scripts/tokenize_corpus.py ./my_text --tokenizer Qwen/Qwen3-0.6B --output ./my_tokens
    scripts/train.sh my_run.toml --training.dataset_path ./my_tokens

Documents keep their order, whatever the number of processes, and become the tokens that training on the text itself
would make of them; empty ones are left out. The folder is written beside its place, under a temporary name, and appears
when it is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from transformers_backend.data.build import SourceKeys, open_source
from transformers_backend.data.sources import Collection, Encoder
from transformers_backend.data.streams import Stream, encode_stream_record, next_records
from transformers_backend.data.token_file import TokenFileMeta, write_token_file
from transformers_backend.data.tokens import load_tokenizer
from transformers_backend.data.workers import Chunk, CollectionReader, Failure, Request, WorkerIterator, make_chunk

_DOCUMENTS_A_REQUEST = 64
_PREFETCH = 4  # requests that each worker is ahead


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        meta, seconds = tokenize_corpus(options)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{options.output}: {meta.documents:,} documents, {meta.tokens:,} tokens as {meta.dtype}, "
        f"{meta.tokens / seconds:,.0f} tokens/s in {seconds:.1f} s"
    )
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/tokenize_corpus.py", description="Tokenize text once.")
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="text files (as training.dataset_path) or folders")
    parser.add_argument("--dataset", help="a hub id, in place of files")
    parser.add_argument("--dataset_name", help="its configuration")
    parser.add_argument("--dataset_split", default="train", help="its split, or a slice of the files' records")
    parser.add_argument("--dataset_revision", help="its git revision")
    parser.add_argument("--tokenizer", required=True, metavar="ID_OR_FOLDER", help='the model\'s, or "byt5"')
    parser.add_argument("--text_column", default="text", help="the field of a record that holds its text")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="must not exist yet")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    options = parser.parse_args(arguments)
    if bool(options.sources) == bool(options.dataset):
        parser.error("name files or folders, or a hub id with --dataset (one of the two)")
    if options.num_workers < 1:
        parser.error(f"--num_workers {options.num_workers}: must be at least 1")
    return options


def tokenize_corpus(options: argparse.Namespace) -> tuple[TokenFileMeta, float]:
    """Write the folder; returns what it holds and the seconds that it took. ValueError for what cannot be read."""
    output = options.output.expanduser()
    if output.exists():
        raise ValueError(f'--output "{output}": exists already. Name another folder, or remove it first.')
    tokenizer = load_tokenizer(options.tokenizer)
    opened = [open_source(keys, tokenizer, len(tokenizer)) for keys in _source_keys(options)]
    total = sum(source.count for source, _ in opened if isinstance(source, Collection)) or None
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    start = time.perf_counter()
    try:
        with tqdm(total=total, unit=" documents", disable=None) as progress:
            documents = _documents(opened, tokenizer, options.num_workers, progress)
            meta = write_token_file(temporary, documents, tokenizer, options.tokenizer)
        if not meta.tokens:
            raise ValueError(f"{', '.join(source.name for source, _ in opened)}: all documents are empty.")
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta, time.perf_counter() - start


def _source_keys(options: argparse.Namespace) -> list[SourceKeys]:
    common = {"dataset_split": options.dataset_split, "text_column": options.text_column}
    if options.dataset is None:
        return [SourceKeys(dataset_path=source, **common) for source in options.sources]
    keys = {"dataset_name": options.dataset_name, "dataset_revision": options.dataset_revision}
    return [SourceKeys(dataset=options.dataset, **keys, **common)]


def _documents(
    opened: list[tuple[Collection | Stream, Encoder]], tokenizer: PreTrainedTokenizerBase, num_workers: int, progress
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens and lengths of some documents at a time, in order, without those that have no token."""
    for source, encode in opened:
        chunks = _collection_chunks if isinstance(source, Collection) else _stream_chunks
        with contextlib.closing(chunks(source, encode, num_workers)) as answers:
            for chunk in answers:
                if isinstance(chunk, Failure):
                    raise ValueError(chunk.message)
                if (highest := chunk.tokens.max(initial=0)) >= len(tokenizer):
                    raise ValueError(
                        f"{source.name}: holds token {highest}, and the tokenizer has {len(tokenizer)}. Name the one "
                        "that the data was made with."
                    )
                if chunk.labels is not None and (chunk.labels != chunk.tokens).any():
                    raise ValueError(
                        f"{source.name}: has labels that are not its tokens, which a folder of tokens cannot hold: "
                        "training on it would learn what they leave out. Train on the records themselves, as "
                        "training.dataset_path or training.dataset, or remove the labels."
                    )
                yield chunk.tokens, chunk.lengths[chunk.lengths > 0]
                progress.update(len(chunk.lengths))


def _collection_chunks(collection: Collection, encode: Encoder, num_workers: int) -> Iterator[Chunk | Failure]:
    requests = (
        Request(0, np.arange(first, min(first + _DOCUMENTS_A_REQUEST, collection.count)), 0)
        for first in range(0, collection.count, _DOCUMENTS_A_REQUEST)
    )
    reader = CollectionReader([(collection, encode)])
    workers = WorkerIterator(reader, requests, num_workers=num_workers, prefetch_factor=_PREFETCH)
    try:
        for _, answer in workers:
            yield answer
    finally:
        workers.close()


def _stream_chunks(stream: Stream, encode: Encoder, num_workers: int) -> Iterator[Chunk | Failure]:
    """This process reads the stream, once and in its order; the workers tokenize."""
    records = iter(stream.part(None, 0, 0, 1))
    requests = iter(lambda: next_records(stream.name, records, _DOCUMENTS_A_REQUEST), [])
    reader = _RecordEncoder(stream.name, encode)
    workers = WorkerIterator(reader, requests, num_workers=num_workers, prefetch_factor=_PREFETCH)
    try:
        yield from workers
    finally:
        workers.close()


class _RecordEncoder(Dataset):
    """What runs in a worker for a stream: makes a chunk of records that were read elsewhere."""

    def __init__(self, name: str, encode: Encoder) -> None:
        self._name, self._encode = name, encode

    def __getitem__(self, records: list[Any]) -> Chunk | Failure:
        try:
            return make_chunk([encode_stream_record(self._encode, record, self._name) for record in records])
        except ValueError as error:
            return Failure(str(error))


if __name__ == "__main__":
    sys.exit(main())
