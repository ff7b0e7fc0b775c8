"""Float8, emulated, on two gloo processes: under each parallelism beside one process, and through a checkpoint's names.

What is not split computes the same, but for the order in which gradients are added up; where weights or sequences are
split, parts have scales of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from parallelize.config import ActivationCheckpointConfig, CompileConfig, Float8Config, ParallelismConfig
from tests.distributed.workers import WorkerPool
from tests.jobs import tiny_job
from transformers_backend import Trainer
from transformers_backend.float8_plan import choose_float8
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.run_summary import _float8_lines
from transformers_backend.twin import VOCABULARY_SIZE, build_twin

pytestmark = pytest.mark.usefixtures("torchao")

Step = tuple[float, dict[str, torch.Tensor]]
ROWS = 4


@pytest.fixture(scope="module")
def one() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


def _model(parallelism: dict, float8: Float8Config, **options) -> HFTransformerModel:
    twin = build_twin(*HFTransformerModelArgs(model_type="llama").resolve(), minimum_layers=4)
    torch._dynamo.reset()
    with patch("transformers_backend.plan.choose_float8", functools.partial(choose_float8, emulate=True)):
        return HFTransformerModel.wrap(twin).parallelize(
            ParallelismConfig(**parallelism), float8=float8, param_dtype=torch.bfloat16, **options
        )


def _step(parallelism: dict, float8: Float8Config, options: dict) -> Step:
    """Loss and gradients of four rows, one after the other."""
    model = _model(parallelism, float8, **options)
    tokens = torch.randint(3, VOCABULARY_SIZE - 3, (ROWS, 32), generator=torch.Generator().manual_seed(5))
    own = ROWS // model.dims.data_parallel_size
    rows = tokens[own * model.data_rank :][:own]
    targets = model.count_targets(rows)
    batches = [rows] if model.pipelined is not None else rows.split(1)
    loss = sum(model.forward_backward(batch, batch, num_items_in_batch=targets).item() for batch in batches)
    return loss, model.full_gradients()


def _cosine(ours: Step, theirs: Step) -> float:
    flat = (torch.cat([step[1][name].flatten() for name in theirs[1]]) for step in (ours, theirs))
    return F.cosine_similarity(*flat, dim=0).item()


RECOMPUTED = {"activation_checkpoint": ActivationCheckpointConfig("full")}
PER_OP = {"activation_checkpoint": ActivationCheckpointConfig("selective", "op")}
COMPILED = {"compile": CompileConfig(True, backend="aot_eager")}


@pytest.mark.parametrize(
    ("parallelism", "recipe", "options"),
    [
        ({}, "tensorwise", RECOMPUTED),
        ({}, "rowwise", PER_OP),
        ({"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"}, "tensorwise", {}),
    ],
)
def test_what_is_not_split_is_the_same(two: WorkerPool, one: WorkerPool, parallelism: dict, recipe: str, options: dict):
    float8 = Float8Config(True, recipe)
    (expected,) = one.run(_step, {}, float8, {})
    found, _ = two.run(_step, parallelism, float8, options)
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # FSDP2 adds rows of the embedding up in bf16, one rank in fp32.
        tolerance = 1e-2 if name == "model.embed_tokens.weight" else 1e-5
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize(
    ("parallelism", "recipe", "options"),
    [
        ({"tensor_parallel_degree": 2}, "tensorwise", {}),
        ({"tensor_parallel_degree": 2}, "rowwise", COMPILED),
        ({"context_parallel_degree": 2}, "tensorwise", {}),
    ],
)
def test_the_rest_is_as_close_to_bf16(two: WorkerPool, one: WorkerPool, parallelism: dict, recipe: str, options: dict):
    (plain,) = one.run(_step, {}, Float8Config(), {})
    (alone,) = one.run(_step, {}, Float8Config(True, recipe), {})
    found, _ = two.run(_step, parallelism, Float8Config(True, recipe), options)
    assert found[0] == pytest.approx(plain[0], rel=1e-3)
    distance, usual = 1 - _cosine(found, plain), 1 - _cosine(alone, plain)
    assert 0.5 * usual < distance < 1.5 * usual, "neither bf16 nor further off than float8 on one rank"


def _train_and_export(folder: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    model = _model({}, Float8Config(True, exclude=["o_proj"]))
    optimizer = torch.optim.AdamW(model.hf_model.parameters())
    tokens = torch.randint(3, VOCABULARY_SIZE - 3, (2, 32), generator=torch.Generator().manual_seed(6))
    model.forward_backward(tokens, tokens)
    optimizer.step()
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"A micro-batch of 62 tokens: .* a multiple of 16"):
        model.forward_backward(tokens[:, 1:], tokens[:, 1:])
    return model.full_state_dict(), _float8_lines(model)


def test_an_export_is_that_of_the_model(two: WorkerPool, tmp_path):
    (state, lines), _ = two.run(_train_and_export, str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    plain = build_twin(*HFTransformerModelArgs(model_type="llama").resolve(), minimum_layers=4).state_dict()
    assert state.keys() == loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert not torch.equal(loaded["model.layers.0.mlp.up_proj.weight"], plain["model.layers.0.mlp.up_proj.weight"])
    assert {"4 x self_attn.q_proj: float8, tensorwise", "4 x self_attn.o_proj: excluded", "1 x lm_head: the head"} < {
        *lines
    }


def _refusal(folder: str) -> str:
    config = tiny_job(folder, "refused", training__mixed_precision_param="bfloat16", float8__enable=True)
    with pytest.raises(ValueError, match="float8") as refused:
        Trainer(config)
    return str(refused.value)


def test_a_job_on_a_cpu_is_refused(one: WorkerPool, folder: str):
    (said,) = one.run(_refusal, folder)
    assert "float8.enable = true: needs a GPU of compute capability 8.9 or higher" in said
    assert "this is a cpu; set it to false" in said
