"""Pipelines in a user's hands: frozen weights, batches of any kind, errors; and what they hold in memory and send.

The reference is the same model of Transformers, in one process and not split.
"""

from __future__ import annotations

import functools
import gc
import time
import weakref
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.utils.weak import TensorWeakRef
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from parallelize.config import ParallelismConfig
from parallelize.parallel_dims import ParallelDims
from parallelize.pipeline_parallel.shared import summed_gradients
from tests.distributed.workers import WorkerPool
from transformers_backend import HFTransformerModel

_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 48, "vocab_size": 98, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip


@pytest.fixture(scope="module")
def three():
    with WorkerPool(3) as pool:
        yield pool


@functools.cache
def _mesh(pp: int, shard: int = 1, tp: int = 1):
    """In a worker, once: process groups take a while to start."""
    return ParallelDims(pp=pp, dp_replicate=1, dp_shard=shard, cp=1, tp=tp).build_mesh("cpu")


def _build(*, tied: bool = True, frozen: Callable[[str], bool] = lambda name: False, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**_SIZES, "tie_word_embeddings": tied, **changes})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
    return model


def _batch(rows: int, length: int = 13, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels; the first row has no target, and the others unlike numbers of them."""
    tokens = torch.randint(2, 98, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    for row in range(rows):
        labels[row, : 3 * (row % 4)] = -100
    labels[0] = -100
    return tokens, labels


def _parallelized(hf_model: PreTrainedModel, schedule: str = "1F1B", *, pp: int = 2, **fields) -> HFTransformerModel:
    parallelism = ParallelismConfig(pipeline_parallel_degree=pp, pipeline_parallel_schedule=schedule, **fields)
    mesh = _mesh(pp, tp=parallelism.tensor_parallel_degree)
    return HFTransformerModel.wrap(hf_model).parallelize(parallelism, mesh=mesh)


def _assert_same_gradients(model: HFTransformerModel, plain: PreTrainedModel) -> None:
    found = model.full_gradients()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


FROZEN = {
    "embedding": lambda name: "embed_tokens" in name,
    "first stage": lambda name: "embed_tokens" in name or "layers.0." in name or "layers.1." in name,
    "last stage": lambda name: "lm_head" in name or "layers.2." in name or "layers.3." in name or "model.norm" in name,
    "head": lambda name: "lm_head" in name,
    "all but a part": lambda name: "q_proj" not in name,
    "all but the last norm": lambda name: "model.norm" not in name,
    "all but one in the middle": lambda name: "layers.1.mlp.up_proj" not in name,
}


def _train_frozen(frozen: str, schedule: str, tied: bool) -> None:
    plain, split = (_build(tied=tied, frozen=FROZEN[frozen]) for _ in range(2))
    model = _parallelized(split, schedule)
    tokens, labels = _batch(4)
    for _ in range(2):  # the second accumulates
        plain(input_ids=tokens, labels=labels).loss.backward()
        model.forward_backward(tokens, labels)
    _assert_same_gradients(model, plain)
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.testing.assert_close(model.clip_grad_norm_(0.1), norm, rtol=1e-4, atol=0)
    _assert_same_gradients(model, plain)


def _train_all_frozen(schedule: str) -> None:
    problems = []
    for tied in (True, False):
        for frozen in FROZEN:
            try:
                _train_frozen(frozen, schedule, tied)
            except (AssertionError, RuntimeError) as error:
                problems.append((frozen, tied, repr(error)[:600]))
    assert not problems, problems


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_frozen_weights(two: WorkerPool, schedule: str):
    two.run(_train_all_frozen, schedule)


def _any_loop(schedule: str, pp: int) -> None:
    """Batches of any size and length, evaluation between, several before a step, clipped twice and not at all."""
    plain, split = _build(num_hidden_layers=6), _build(num_hidden_layers=6)
    model = _parallelized(split, schedule, pp=pp)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (plain, split)]
    fewest = 2 * pp if schedule == "DualPipeV" else pp if schedule == "1F1B" else 1
    for step, (rows, length) in enumerate([(6, 13), (6, 13), (12, 7), (6, 9), (6, 13), (fewest, 13)]):
        tokens, labels = _batch(rows, length, seed=step)
        if fewest == 1:
            labels[0, -2:] = 5  # one row has to have a target
        repeats = 3 if step == 2 else 1
        for _ in range(repeats):
            expected = plain(input_ids=tokens, labels=labels).loss
            expected.backward()
            torch.testing.assert_close(model.forward_backward(tokens, labels), expected.detach(), rtol=1e-5, atol=0)
        if step != 3:
            for limit in (0.5, 0.3)[: 1 + step % 2]:
                norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), limit)
                torch.testing.assert_close(model.clip_grad_norm_(limit), norm, rtol=1e-4, atol=0)
        _assert_same_gradients(model, plain)
        if step in (1, 4):
            with torch.no_grad():
                held_out, targets = _batch(5, 11)
                total, count = model.evaluate(held_out, targets)
                torch.testing.assert_close(total / count, plain(input_ids=held_out, labels=targets).loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    tokens = _batch(4)[0]
    none = torch.full_like(tokens, -100)
    for rows in ((tokens, none), (torch.cat([tokens, tokens]), torch.cat([none, none]))):
        assert model.forward_backward(*(r[: max(4, fewest)] for r in rows)).item() == 0
    assert all(not gradient.any() for gradient in model.full_gradients().values())


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "ZBVZeroBubble", "DualPipeV"])
def test_any_loop_of_a_user(two: WorkerPool, schedule: str):
    two.run(_any_loop, schedule, 2)


def test_three_stages(three: WorkerPool):
    for schedule in ("1F1B", "InterleavedZeroBubble"):
        three.run(_any_loop, schedule, 3)
