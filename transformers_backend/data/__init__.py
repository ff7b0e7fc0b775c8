"""From text to batches: load the tokenizer, read documents, pack them into blocks of `seq_len` tokens.

It stands between the model and the training step: `load_tokenizer` and `build_batches` are called once, then
`train_step` calls `next()` on the `PackedBatches`, whose `state_dict()` goes into every checkpoint.

    documents of sources  -> tokens, in workers -> the next document of each -> blocks    -> batches
    files.py, hub.py,        tokens.py,            feeds.py, in the order       packing.py   batches.py
    streams.py               workers.py            of order.py

`build.py` puts them together. A source (`sources.py`) is a `Collection`, whose documents are read by number, or a
`Stream` (`streams.py`), which is read from its start. Collections are text files (the built-in one is the Python
standard library's own source code), records of local files, and tokens written before (`token_file.py`); streams come
from the Hugging Face hub; a user's own function (`hook.py`, `registry.py`) gives either. Records are text, tokens
(`tokenized.py`) or conversations (`chat.py`). They need the `datasets` package, which is imported only there.

Errors name the keys of a source without the section that they stand in.
"""

from transformers_backend.data.batches import PackedBatches, Stage
from transformers_backend.data.build import SourceKeys, build_batches, configured_sources
from transformers_backend.data.registry import register_dataset
from transformers_backend.data.sources import BUILT_IN_SOURCE
from transformers_backend.data.tokens import load_tokenizer

__all__ = [
    "BUILT_IN_SOURCE",
    "PackedBatches",
    "SourceKeys",
    "Stage",
    "build_batches",
    "configured_sources",
    "load_tokenizer",
    "register_dataset",
]
