"""Pipelines together with everything else: every schedule x what changes a backward, against plain Transformers.

The reference is the same model of Transformers in one process, not split, run micro-batch by micro-batch. Compared: a
step of two accumulated batches, and one of a batch with the weights that it left: losses, every gradient and norms.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from parallelize.config import PIPELINE_SCHEDULES, ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from parallelize.mixed_precision import parameters_cast_to
from parallelize.parallel_dims import ParallelDims
from tests.distributed.workers import Messages, WorkerPool
from transformers_backend import HFTransformerModel, loss
from transformers_backend.proof import relative_errors

_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 48, "vocab_size": 98, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
_LENGTH = 13
_TWO_CHUNKS = 2 * 98  # of logits; a micro-batch of 13 tokens makes more


@dataclass(frozen=True)
class Case:
    """What is put together. parallelism: fields of a ParallelismConfig."""

    schedule: str = "1F1B"
    parallelism: dict = field(default_factory=dict)
    tied: bool = True
    param_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    recompute: str = "none"
    """ "none", "full", or what selective_ac_option is."""
    compile: tuple[str, ...] = ()
    """compile.components"""
    backend: str = "aot_eager"
    chunk_elements: int = _TWO_CHUNKS
    rows: int = 4
    """Of a batch of a data rank, each a micro-batch."""
    tolerance: float = 1e-4


def _build(tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_SIZES, tie_word_embeddings=tied))


@functools.cache
def _mesh(pp: int, replicate: int, shard: int, tp: int) -> DeviceMesh:
    """In a worker, once: process groups take a while to start."""
    return ParallelDims(pp=pp, dp_replicate=replicate, dp_shard=shard, cp=1, tp=tp).build_mesh("cpu")


def _batch(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels; one row has no target, and the others have unlike numbers."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 98, (rows, _LENGTH), generator=generator)
    labels = tokens.clone()
    labels[0] = -100
    labels[1, :6] = -100
    return tokens, labels


def _parallelized(case: Case) -> HFTransformerModel:
    options = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": case.schedule, **case.parallelism}
    parallelism = ParallelismConfig(**options)
    dims = ParallelDims.resolve(parallelism, torch.distributed.get_world_size())
    if case.recompute in ("none", "full"):
        recompute = ActivationCheckpointConfig(mode=case.recompute)
    else:
        recompute = ActivationCheckpointConfig(mode="selective", selective_ac_option=case.recompute)
    return HFTransformerModel.wrap(_build(case.tied)).parallelize(
        parallelism,
        activation_checkpoint=recompute,
        compile=CompileConfig(enable=bool(case.compile), components=list(case.compile), backend=case.backend),
        param_dtype=case.param_dtype,
        cpu_offload=case.cpu_offload,
        mesh=_mesh(dims.pp, dims.dp_replicate, dims.dp_shard, dims.tp),
    )


def _plain_step(plain: PreTrainedModel, batches: list, dtype: torch.dtype | None) -> torch.Tensor:
    """Gradients of all batches, a row at a time, and the loss."""
    targets = sum((labels[:, 1:] != -100).sum() for _, labels in batches)
    total = torch.zeros(())
    for tokens, labels in batches:
        for row in range(len(tokens)):
            with parameters_cast_to(plain, dtype):
                logits = plain(input_ids=tokens[row : row + 1], use_cache=False).logits[:, :-1].float()
                value = torch.nn.functional.cross_entropy(logits[0], labels[row, 1:], reduction="sum") / targets
                value.backward()
            total += value.detach()
    return total


def _compare(case: Case) -> None:
    with mock.patch.dict(loss._CHUNK_ELEMENTS, {"cpu": case.chunk_elements}):
        model = _parallelized(case)
        plain = _build(case.tied)
        data_ranks = model.dims.data_parallel_size
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model.hf_model)]
        for step in range(2):
            batches = [_batch(2 * step + number, case.rows * data_ranks) for number in range(2 - step)]
            expected = _plain_step(plain, batches, case.param_dtype)
            own = [tuple(t.chunk(data_ranks)[model.data_rank] for t in batch) for batch in batches]
            targets = sum(model.count_targets(labels) for _, labels in own)
            found = sum(model.forward_backward(*batch, num_items_in_batch=targets) for batch in own)
            torch.testing.assert_close(found, expected, rtol=case.tolerance, atol=0)
            gradients = {name: p.grad for name, p in plain.named_parameters()}
            errors = relative_errors(gradients, model.full_gradients())
            worst = max(errors, key=errors.get)
            assert errors[worst] <= case.tolerance, f"step {step}: {worst} {errors[worst]:.1e}, all {errors}"
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            torch.testing.assert_close(model.clip_grad_norm_(0.5), norm, rtol=case.tolerance, atol=0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


_SHARDED, _REPLICATED = {"data_parallel_shard_degree": 2}, {"data_parallel_replicate_degree": 2}
_TENSOR = {"tensor_parallel_degree": 2}  # with sequence parallelism, 13 tokens on 2 ranks
_FREED, _HELD = ({**_SHARDED, "fsdp_reshard_after_forward": when} for when in ("always", "never"))
_BFLOAT16 = {"param_dtype": torch.bfloat16, "tolerance": 3e-2}
_ONE_CHUNK = 10**6

ON_TWO = [
    *(Case(schedule) for schedule in PIPELINE_SCHEDULES),
    Case("ZBVZeroBubble", tied=False),
    *(Case("1F1B", recompute=recompute) for recompute in ("full", "2", "op")),
    Case("InterleavedZeroBubble", recompute="full"),
    *(Case(schedule, **_BFLOAT16) for schedule in ("1F1B", "InterleavedZeroBubble", "DualPipeV")),
    *(Case(schedule, cpu_offload=True) for schedule in ("Interleaved1F1B", "ZBVZeroBubble")),
    Case("DualPipeV", compile=("loss",), chunk_elements=_ONE_CHUNK),
]
ON_FOUR = [
    Case("1F1B", _FREED, recompute="full"),
    Case("LoopedBFS", _FREED),
    Case("Interleaved1F1B", _HELD),
    Case("InterleavedZeroBubble", _SHARDED, recompute="2"),
    Case("DualPipeV", _SHARDED, cpu_offload=True, **_BFLOAT16),
    Case("1F1B", _REPLICATED, **_BFLOAT16),
    Case("ZBVZeroBubble", _REPLICATED),
    Case("GPipe", {**_TENSOR, "sequence_parallel": "never"}, recompute="op"),
    Case("InterleavedZeroBubble", _TENSOR, recompute="full"),
    Case("ZBVZeroBubble", _TENSOR, param_dtype=torch.bfloat16, tolerance=5e-2),
]


def _compare_all(cases: list[Case]) -> None:
    for case in cases:
        try:
            _compare(case)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"{case}: {error}") from error


def test_on_two_processes(two: WorkerPool):
    two.run(_compare_all, ON_TWO)


def test_on_four_processes(four: WorkerPool):
    four.run(_compare_all, ON_FOUR)


def test_compiled_layers(two: WorkerPool):
    schedules = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS")
    two.run(_compare_all, [Case(schedule, compile=("model",)) for schedule in schedules])


def _gradients_of_many(case: Case) -> dict[str, torch.Tensor]:
    model = _parallelized(case)
    ranks = model.dims.data_parallel_size
    batch = _batch(0, case.rows * ranks)
    model.forward_backward(*(tensor.chunk(ranks)[model.data_rank] for tensor in batch))
    return model.full_gradients()


def _compare_sums(schedule: str) -> None:
    """16 gradients in bfloat16 are added up in float32: in whichever order, the same but for float32's rounding."""
    case = Case(schedule, _SHARDED, param_dtype=torch.bfloat16, rows=16)
    errors = relative_errors(_gradients_of_many(replace(case, schedule="GPipe")), _gradients_of_many(case))
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-6, (schedule, worst, errors[worst])


def test_gradients_of_micro_batches_are_added_up_in_float32(four: WorkerPool):
    for schedule in ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        four.run(_compare_sums, schedule)


def _forwards_of_a_layer(schedule: str) -> tuple[float, list[str]]:
    """How often a layer runs for a micro-batch when it is recomputed, and the warnings about it."""
    with Messages("transformers_backend.decisions", logging.WARNING) as messages:
        model = _parallelized(Case(schedule, recompute="full"))
    runs = []
    model.hf_model.get_submodule(model.pipelined.layers[-1]).mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.forward_backward(*_batch(0, 4))
    return len(runs) / 4, messages.texts


def test_a_warning_says_how_often_a_zero_bubble_schedule_recomputes(two: WorkerPool):
    assert two.run(_forwards_of_a_layer, "1F1B") == [(2, []), (2, [])]
    for count, (warning,) in two.run(_forwards_of_a_layer, "InterleavedZeroBubble"):
        assert count == 11
        assert "a layer of Llama runs forward 11 times a micro-batch instead of twice" in warning
        assert 'pipeline_parallel_schedule = "InterleavedZeroBubble"' in warning


def _refusals() -> list[str]:
    messages = []
    for case in (
        Case("ZBVZeroBubble", compile=("model",)),
        Case("ZBVZeroBubble", recompute="op"),
        Case("ZBVZeroBubble", {"fsdp_reshard_after_forward": "always"}),
    ):
        with pytest.raises(
            ValueError, match="computes the gradients of inputs and weights at different times"
        ) as error:
            _parallelized(case)
        messages.append(str(error.value))
    return messages


def test_what_cannot_be_right_is_refused(two: WorkerPool):
    for compiled, recomputed, freed in two.run(_refusals):
        assert "in compiled layers" in compiled
        assert "backward only once" in recomputed
        assert "frees parameters" in freed
