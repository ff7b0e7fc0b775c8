"""Pipelines in a user's hands: frozen weights, batches of any kind, errors; and what they hold in memory and send.

The reference is the same model of Transformers, in one process and not split.
"""

from __future__ import annotations

import datetime
import functools
import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import schedules
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.utils.weak import TensorWeakRef
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from parallelize.config import ParallelismConfig
from parallelize.parallel_dims import ParallelDims
from parallelize.pipeline_parallel.shared import summed_gradients
from tests.distributed.workers import WorkerPool
from transformers_backend import HFTransformerModel
from transformers_backend.errors import is_lost_peer, is_meant_for_the_user

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
    for frozen in FROZEN:
        _train_frozen(frozen, schedule, tied=frozen in ("embedding", "all but a part"))


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
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


@pytest.mark.parametrize("schedule", ["GPipe", "Interleaved1F1B", "DualPipeV"])
def test_any_loop_of_a_user(two: WorkerPool, schedule: str):
    two.run(_any_loop, schedule, 2)


def test_three_stages(three: WorkerPool):
    for schedule in ("1F1B", "InterleavedZeroBubble"):
        three.run(_any_loop, schedule, 3)


def _batches_of_unlike_lengths() -> None:
    """Each data rank has its own length, which changes at another time than the other's."""
    plain, split = _build(), _build()
    parallelism = ParallelismConfig(pipeline_parallel_degree=2, data_parallel_shard_degree=2)
    model = HFTransformerModel.wrap(split).parallelize(parallelism, mesh=_mesh(2, shard=2))
    for lengths in ((13, 9), (13, 11), (7, 11)):
        batches = [_batch(2, length, seed) for seed, length in enumerate(lengths)]
        targets = sum((labels[:, 1:] != -100).sum() for _, labels in batches)
        for tokens, labels in batches:
            plain(input_ids=tokens, labels=labels, num_items_in_batch=targets).loss.backward()
        model.forward_backward(*batches[model.data_rank])
        _assert_same_gradients(model, plain)


def test_lengths_differ_between_data_ranks(four: WorkerPool):
    four.run(_batches_of_unlike_lengths)


class _Saved:
    """Bytes that autograd keeps for backwards: now, and at most so far."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> _Kept:
        return _Kept(self, tensor)


class _Kept:
    def __init__(self, saved: _Saved, tensor: torch.Tensor) -> None:
        self.saved, self.tensor, self.size = saved, tensor.detach(), 0  # with its graph it would keep itself alive
        if not isinstance(tensor, nn.Parameter):
            self.size = tensor.numel() * tensor.element_size()
        saved.now += self.size
        saved.peak = max(saved.peak, saved.now)

    def __del__(self) -> None:
        self.saved.now -= self.size


def _peaks(schedule: str) -> tuple[int, int]:
    """What is kept for backwards at most, with 3 micro-batches and with 16."""
    model = _parallelized(_build(), schedule)
    peaks = []
    for rows in (3, 16):
        saved = _Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
            model.forward_backward(*_batch(rows))
        assert saved.now == 0, "nothing outlives the step"
        peaks.append(saved.peak)
    return tuple(peaks)


def test_activations_are_freed_as_the_schedule_says(two: WorkerPool):
    for few, many in two.run(_peaks, "1F1B"):
        assert many == pytest.approx(few, rel=0.01)
    for few, many in two.run(_peaks, "GPipe"):
        assert many > 4 * few


def _left_over(schedule: str) -> None:
    """No hidden states, received or computed, stay after a step or an evaluation."""
    model = _parallelized(_build(), schedule)
    outputs: list[TensorWeakRef] = []
    for layer in model.pipelined.layers:
        model.hf_model.get_submodule(layer).register_forward_hook(lambda *a: outputs.append(TensorWeakRef(a[-1])))
    for run in (model.forward_backward, model.evaluate):
        outputs.clear()
        run(*_batch(8))
        gc.collect()
        assert len(outputs) >= 8
        assert all(output() is None for output in outputs)
        alive = [
            o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (1, 13, 32) and o.is_contiguous()
        ]
        assert alive == []
    schedule_of_shape = weakref.ref(model.pipelined._pipeline._schedule)
    model.forward_backward(*_batch(8, length=9))
    gc.collect()
    assert schedule_of_shape() is None, "nor do buffers of another shape"


def test_nothing_is_left_after_a_step(two: WorkerPool):
    for schedule in ("1F1B", "ZBVZeroBubble"):
        two.run(_left_over, schedule)


def _sent(schedule: str, rows: int, tp: int) -> tuple[int, int]:
    """The number and bytes of what this rank sends to other ranks of the pipeline in a step."""
    model = _parallelized(_build(), schedule, tensor_parallel_degree=tp)
    batch = _batch(rows)
    model.forward_backward(*batch)
    exchange, sizes = schedules._batch_p2p, []

    def count(operations: list, **options) -> list:
        sent = [operation.tensor for operation in operations if operation.op is dist.isend]
        sizes.extend(tensor.numel() * tensor.element_size() for tensor in sent)
        return exchange(operations, **options)

    with mock.patch.object(schedules, "_batch_p2p", count):
        model.forward_backward(*batch)
    return len(sizes), sum(sizes)


@pytest.mark.parametrize(("schedule", "stages"), [("1F1B", 2), ("Interleaved1F1B", 4), ("ZBVZeroBubble", 4)])
def test_hidden_states_and_their_gradients_are_all_that_is_sent(two: WorkerPool, schedule: str, stages: int):
    sent = two.run(_sent, schedule, 8, 1)
    boundaries = 2 if schedule == "ZBVZeroBubble" else stages - 1  # of its three, one is within a rank
    assert sum(count for count, _ in sent) == 2 * boundaries * 8
    assert sum(size for _, size in sent) == 2 * boundaries * 8 * (13 * 32 * 4)


def test_with_sequence_parallelism_a_part_of_the_sequence_is_sent(four: WorkerPool):
    """13 tokens on 2 ranks: 7 each, padded."""
    assert four.run(_sent, "1F1B", 4, 2) == [(4, 4 * 7 * 32 * 4)] * 4


def _step_with_an_error(schedule: str, seconds: float) -> tuple[str, str, float]:
    """The error of a step in which a layer of rank 1 raises, and after how many seconds it came."""
    model = _parallelized(_build(), schedule)
    model.pipelined._pipeline._group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    tokens, labels = _batch(4)
    model.forward_backward(tokens, labels)
    if dist.get_rank() == 1:
        layer = model.hf_model.get_submodule(model.pipelined.layers[-1])

        def fail(*args) -> None:
            raise torch.OutOfMemoryError("no memory for this layer")

        layer.register_forward_hook(fail)
    start = time.monotonic()
    try:
        model.forward_backward(tokens, labels)
    except Exception as error:  # whatever it is, the test looks at it
        kind = "peer" if is_lost_peer(error) else type(error).__name__
        return kind, str(error), time.monotonic() - start
    return "none", "", 0.0


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_an_error_in_a_stage_is_its_own_and_others_end_with_the_timeout(schedule: str):
    with WorkerPool(2) as pool:
        (kind, message, waited), (own_kind, own_message, _) = pool.run(_step_with_an_error, schedule, 3.0)
    assert (own_kind, own_message) == ("OutOfMemoryError", "no memory for this layer")
    assert kind == "peer", message
    assert waited < 20


def _mistakes() -> list[tuple[str, bool]]:
    """Messages of calls that cannot work; every rank raises them before anything is sent, and then goes on."""
    model = _parallelized(_build(), "1F1B", pipeline_parallel_microbatch_size=2)
    tokens, labels = _batch(4)
    messages = []
    for call in (
        lambda: model.forward_backward(tokens[:3], labels[:3]),
        lambda: model.forward_backward(tokens[:2], labels[:2]),
        lambda: model.forward_backward(tokens, labels[:, 1:]),
        lambda: model.hf_model(input_ids=tokens),
        lambda: torch.no_grad()(model.forward_backward)(tokens, labels),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            call()
        messages.append((str(error.value), is_meant_for_the_user(error.value)))
    plain = _build()
    plain(input_ids=tokens, labels=labels).loss.backward()
    model.forward_backward(tokens, labels)
    _assert_same_gradients(model, plain)
    return messages


def test_mistakes_are_told_on_every_rank_before_anything_hangs(two: WorkerPool):
    expected = (
        "sequences of a batch = 3: must be divisible by parallelism.pipeline_parallel_microbatch_size = 2",
        "the number of micro-batches is 1, and must be at least 2",
        "labels has shape (4, 12)",
        "this rank has only some of its layers",
        "it was called under torch.no_grad()",
    )
    for messages in two.run(_mistakes):
        for (message, is_for_the_user), part in zip(messages, expected, strict=True):
            assert part in message
            assert is_for_the_user


def _train_by_file(path: str) -> None:
    model, plain = _parallelized(_build(tied=False), pipeline_parallel_schedule_csv=path), _build(tied=False)
    tokens, labels = _batch(3)
    expected = plain(input_ids=tokens, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(model.forward_backward(tokens, labels), expected.detach())
    _assert_same_gradients(model, plain)


def test_a_file_may_have_any_order_but_that_of_the_last_forwards(two: WorkerPool, tmp_path: Path):
    path = tmp_path / "schedule.csv"
    path.write_text(
        "0F2,0F0,0F1,2F1,2F0,2F2,2B1,2B2,2B0,0B0,0B2,0B1\n1F1,1F2,1F0,3F0,3F1,3F2,3B2,3I0,3B1,3W0,1B1,1I2,1B0,1W2\n"
    )
    two.run(_train_by_file, str(path))


def _sum_copies() -> None:
    """Ranks 0 and 2 of three hold a parameter: what a block adds is summed, what was there before is left alone."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("shard", "pp"))
    group = mesh.get_group("pp")
    for dtype in (torch.float32, torch.bfloat16):
        for sharded in (False, True):
            if rank == 1:
                with summed_gradients({}, group):
                    pass
                continue
            value = torch.zeros(3, 2, dtype=dtype)
            parameters = [nn.Parameter(value.clone()) for _ in range(4)]
            if sharded:
                parameters = [
                    nn.Parameter(distribute_tensor(p.detach(), mesh["shard"], [Shard(0)])) for p in parameters
                ]
            before, on_one, _, spoilt = parameters
            before.grad = torch.ones_like(before)
            kept = before.grad
            with summed_gradients(dict.fromkeys(parameters, (0, 2)), group):
                before.grad = torch.full_like(before, 1.0 + rank)
                if rank == 0:
                    on_one.grad = torch.full_like(on_one, 5.0)
                spoilt.grad = torch.full_like(spoilt, float("nan") if rank == 2 else 1.0)
            full = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
            assert all(gradient.dtype is dtype for gradient in full)
            assert before.grad is kept, "in place, as autograd accumulates"
            assert torch.equal(full[0], torch.full_like(full[0], 1 + 1 + 3))
            assert torch.equal(full[1], torch.full_like(full[1], 5))
            assert not full[2].any()
            assert full[3].isnan().all()


def test_copies_on_some_of_the_ranks_get_one_gradient(three: WorkerPool):
    three.run(_sum_copies)
