"""How often tensor-parallel ranks exchange something, counted: the table in docs/how_it_works.md."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.workers import WorkerPool
from transformers_backend import HFTransformerModel, ParallelismConfig
from transformers_backend.loss import shift_labels

REDUCE, GATHER, SCATTER = "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"
# One layer, and everything around the layers; in the forward, and in the backward.
EXPECTED = {
    "never": {
        "layer": ({REDUCE: 2}, {REDUCE: 2}),
        # The token embedding, and two of the loss (maxima; sums of exponentials and target logits); the head's entry.
        "rest": ({REDUCE: 3}, {REDUCE: 1}),
    },
    "always": {
        # The backward sums the gradients of the two norms' weights, too.
        "layer": ({GATHER: 2, SCATTER: 2}, {GATHER: 2, SCATTER: 2, REDUCE: 2}),
        # Beside those above: the sequence is joined in the forward, and its gradient where it was cut in the backward.
        "rest": ({REDUCE: 3, GATHER: 1}, {REDUCE: 1, GATHER: 1}),
    },
}


def _count(sequence: str, layers: int) -> tuple[Counter, Counter]:
    """Exchanges of the forward, and of the backward."""
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    parallelism = ParallelismConfig(tensor_parallel_degree=2, sequence_parallel=sequence)
    model = HFTransformerModel.wrap(LlamaForCausalLM(config)).parallelize(parallelism).hf_model
    input_ids = torch.arange(2 * 10).view(2, 10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Bb]ackward hook", UserWarning)  # those of CommDebugMode itself
        with CommDebugMode() as forward:
            loss = model(input_ids=input_ids, targets=shift_labels(input_ids))
        with CommDebugMode() as backward:
            loss.backward()
    return tuple(
        Counter({operator.__name__.split(".")[0]: count for operator, count in mode.get_comm_counts().items()})
        for mode in (forward, backward)
    )


@pytest.mark.parametrize("sequence", ["never", "always"])
def test_exchanges_of_a_layer_and_of_the_rest(two: WorkerPool, sequence: str):
    for with_two, with_three in zip(two.run(_count, sequence, 2), two.run(_count, sequence, 3), strict=True):
        for direction in (0, 1):
            layer = with_three[direction] - with_two[direction]
            rest = with_two[direction] - layer - layer
            assert layer == EXPECTED[sequence]["layer"][direction], direction
            assert rest == EXPECTED[sequence]["rest"][direction], direction
