"""From text to batches: load the tokenizer, read documents, pack them into blocks of `seq_len` tokens.

It stands between the model and the training step: `load_tokenizer` and `build_batches` are called once, then
`train_step` calls `next()` on the `PackedBatches`, whose `state_dict()` goes into every checkpoint.

    documents (one of three sources) -> tokens, one end-of-sequence token after each -> blocks -> batches
    files.py or hub.py                  tokens.py                                       batches.py

`build.py` puts them together. A source (`sources.py`) says how many documents there are, in what order this data rank
reads them in an epoch, and how to go on from a position. The sources are text files (the built-in one is the Python
standard library's own source code), records of local data files, and records streamed from the Hugging Face hub. The
last two need the `datasets` package, which is imported only there.

Errors name the keys of `[training]`, which `[validation]` shares, without their section.
"""

from transformers_backend.data.batches import PackedBatches
from transformers_backend.data.build import build_batches
from transformers_backend.data.sources import BUILT_IN_SOURCE
from transformers_backend.data.tokens import load_tokenizer

__all__ = ["BUILT_IN_SOURCE", "PackedBatches", "build_batches", "load_tokenizer"]
