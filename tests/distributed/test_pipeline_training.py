"""Whole jobs with a pipeline beside the same on one device: steps, validation, sample, table, and what is refused."""

from __future__ import annotations

import contextlib
import json
import re
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallelize.config import ActivationCheckpointConfig
from tests.distributed.workers import Messages, WorkerPool
from tests.jobs import restored_process, tiny_job
from transformers_backend import JobConfig, ParallelismConfig, Trainer
from transformers_backend.attention import stand_in_for_flash
from transformers_backend.isolation import Isolation
from transformers_backend.run_summary import estimate_run_memory

_WIDTHS = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_LLAMA = _WIDTHS | {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": False}
MODELS = {
    "llama": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8, "tie_word_embeddings": True},
    "falcon": _WIDTHS,
    "gpt2": {"vocab_size": 384, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip
_ROWS, _STEPS = 8, 3
_DOCUMENTS = ((9, 1, 21), (31,), (14, 17), (2, 29))  # lengths in each row of half a batch


def _job(folder: str, name: str, model_type: str, parallelism: dict, **changes) -> JobConfig:
    """Eight sequences a step. With a pipeline of one data rank micro-batches of one take the place of accumulation."""
    options = {
        "training__steps": _STEPS, "training__local_batch_size": 1, "training__global_batch_size": _ROWS,
        "hf_transformers__model_type": model_type, "hf_transformers__config_overrides": MODELS[model_type],
    }  # fmt: skip
    config = tiny_job(folder, name, **(options | changes))
    config.parallelism = ParallelismConfig(**parallelism)
    return config


# -- the numbers of one device ---------------------------------------------------------------------------------------


def _run(config: JobConfig) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Train to the end; what was logged, and the weights."""
    with Messages("transformers_backend.trainer") as messages, contextlib.closing(Trainer(config)) as trainer:
        trainer.train()
        return messages.texts, trainer.model.full_state_dict()


def _lines(config: JobConfig, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(config.job.dump_folder) / file).read_text().splitlines()]


@pytest.mark.parametrize(
    ("model_type", "max_norm", "schedule"),
    [("llama", 1e9, "1F1B"), ("llama", 1e9, "ZBVZeroBubble"), ("llama", 1.0, "1F1B"), ("qwen3", 1e9, "1F1B")],
)
def test_a_job_is_that_of_one_device_bit_by_bit(
    two: WorkerPool, folder: str, model_type: str, max_norm: float, schedule: str
):
    """Micro-batches add up as accumulation steps do. Two sums have another order: of the parts of a tied weight's
    gradient (over micro-batches first on each stage, then of both stages), and of the squares in the norm of all
    gradients (first of each rank), by which gradients are scaled where it is above the limit."""
    options = {
        "training__max_norm": max_norm, "job__sample_prompt": "1: line", "job__sample_tokens": 6,
        "validation__enable": True, "validation__freq": 2, "validation__dataset_path": f"{folder}/held_out.txt",
        "validation__local_batch_size": 3,
    }  # fmt: skip
    alone = _job(folder, "alone", model_type, {}, **options)
    pipeline = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": schedule}
    together = _job(folder, "together", model_type, pipeline, **options, training__local_batch_size=_ROWS)
    with restored_process():
        said, weights = _run(alone)
    (found_said, found_weights), _ = two.run(_run, together)
    is_exact = model_type == "llama" and max_norm == 1e9
    for file, number in (("metrics.jsonl", "loss"), ("validation.jsonl", "validation_loss")):
        expected, found = ([line[number] for line in _lines(config, file)] for config in (alone, together))
        assert len(found) == len(expected) > 0
        # A validation batch without a pipeline is not cut into micro-batches.
        is_equal = is_exact and number == "loss"
        assert found == (expected if is_equal else pytest.approx(expected, rel=1e-5))
    assert sorted(found_weights) == sorted(weights)
    if is_exact:
        assert all(torch.equal(found_weights[name], weight) for name, weight in weights.items())
    for line, expected in zip(_lines(together), _lines(alone), strict=True):
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert line["tokens_per_second"] == pytest.approx(2 * line["tokens_per_second_per_device"])
        flops, expected_flops = (
            figures["tflops_per_device"] / figures["tokens_per_second_per_device"] for figures in (line, expected)
        )
        assert flops == pytest.approx(expected_flops), "those of the whole model, on every rank"
    samples = [[text for text in texts if text.startswith("sample of")] for texts in (said, found_said)]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 1


def _batch(step: int, *, seq: int, packed: bool) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 300, (_ROWS, seq), generator=torch.Generator().manual_seed(step))
    if not packed:
        return {"input_ids": tokens, "labels": tokens.clone()}
    rows = [torch.cat([torch.arange(length) for length in row]) for row in (*_DOCUMENTS, *_DOCUMENTS[::-1])]
    positions = torch.stack(rows)
    return {"input_ids": tokens, "labels": tokens.masked_fill(positions == 0, -100), "position_ids": positions}


def _train(config: JobConfig, joins_rows: bool) -> list[float]:
    """Train on batches that depend on the step only, in two halves; losses and norms, and a validation's loss."""
    with contextlib.closing(Trainer(config)) as trainer:
        model, taken, ranks = trainer.model, iter(range(2 * _STEPS)), trainer.model.dims.data_parallel_size
        assert trainer.accumulation_steps == 2
        if joins_rows:  # as flash kernels, which need a GPU, have it
            model.hf_model.set_attn_implementation(stand_in_for_flash())
            model._isolation = Isolation("joined rows")

        def next_batch(data) -> dict[str, torch.Tensor]:
            step, part = divmod(next(taken), 2)
            packed = config.training.packing == "documents"
            rows = _batch(step, seq=config.training.seq_len, packed=packed)
            own = torch.arange(_ROWS).chunk(2)[part].chunk(ranks)[model.data_rank]
            return {name: tensor[own] for name, tensor in rows.items()}

        trainer._next_batch = next_batch
        results = [trainer.train_step() for _ in range(_STEPS)]
        return [number.item() for result in results for number in (result.loss, result.grad_norm)]


_PACKED = {"training__packing": "documents", "training__seq_len": 31}
_TWO_ROWS = {"pipeline_parallel_schedule": "GPipe", "pipeline_parallel_microbatch_size": 2}
_SHARDED, _SPLIT = {"data_parallel_shard_degree": 2}, {"tensor_parallel_degree": 2}


@pytest.mark.parametrize(
    ("model_type", "parallelism", "changes", "tolerance"),
    [
        pytest.param("llama", _SPLIT, _PACKED, 1e-5, id="llama: documents by positions"),
        pytest.param("falcon", _SHARDED, _PACKED, 1e-5, id="falcon: documents by masks"),
        pytest.param("llama", {**_SHARDED, **_TWO_ROWS},
                     {**_PACKED, "joins_rows": True}, 1e-5, id="llama: documents in joined rows"),
        pytest.param("qwen3", {"pipeline_parallel_degree": 4, "pipeline_parallel_schedule": "GPipe"},
                     {"optimizer__name": "Muon"}, 1e-3, id="qwen3: Muon, on four ranks"),
        pytest.param("gpt2", {**_SHARDED, "pipeline_parallel_schedule": "Interleaved1F1B"},
                     {"training__enable_cpu_offload": True}, 1e-5, id="gpt2: offloaded, two stages a rank"),
        pytest.param("qwen3", _SPLIT, {"training__mixed_precision_param": "bfloat16"}, 3e-2, id="qwen3: bfloat16"),
        pytest.param("gpt2", _SHARDED, {"activation_checkpoint": ActivationCheckpointConfig("selective", "op")}, 1e-5,
                     id="gpt2: recomputed by operation"),
    ],
)  # fmt: skip
def test_what_a_job_may_have(
    four: WorkerPool, folder: str, model_type: str, parallelism: dict, changes: dict, tolerance: float
):
    parallelism = {"pipeline_parallel_degree": 2, **parallelism}
    data_ranks = parallelism.get("data_parallel_shard_degree", 1)
    keys = {key: value for key, value in changes.items() if "__" in key}
    alone = _job(folder, "alone", model_type, {}, **keys, training__local_batch_size=4)
    together = _job(folder, "together", model_type, parallelism, **keys, training__local_batch_size=4 // data_ranks)
    together.activation_checkpoint = changes.get("activation_checkpoint", together.activation_checkpoint)
    with restored_process():
        expected = _train(alone, changes.get("joins_rows", False))
    for found in four.run(_train, together, changes.get("joins_rows", False)):
        assert found == pytest.approx(expected, rel=tolerance)


# -- the table at the start ------------------------------------------------------------------------------------------


def _summary(config: JobConfig) -> list[str]:
    with Messages("transformers_backend.trainer") as messages, contextlib.closing(Trainer(config)):
        return [text for text in messages.texts if text.startswith("the run:")]


def test_the_table_tells_stages_and_the_fullest_rank(two: WorkerPool, folder: str):
    tables = {}
    for schedule in ("1F1B", "GPipe"):
        pipeline = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": schedule}
        config = _job(folder, "run", "qwen3", pipeline, training__local_batch_size=_ROWS)
        ((tables[schedule],), others) = two.run(_summary, config)
        assert others == [], "one rank writes"
    table = tables["1F1B"]
    parameters = 384 * 32 + 4 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32 + 2 * 8) + 32
    assert f"Qwen3ForCausalLM: {parameters:,} parameters, all trained" in table, "the tied weight counts once"
    assert "1F1B: 2 stages on 2 ranks, 8 micro-batches of 1 sequence; ranks are idle for" in table
    assert "of rank 0 of the pipeline (stage 0)" in table
    assert re.search(r"stage +rank +layers +parameters +FLOPs\n +0 +0 +0-2 +[\d,]+ +\d", table)
    kept = {name: float(re.search(r"activations of micro-batches +([\d.]+)", text)[1]) for name, text in tables.items()}
    assert kept["GPipe"] == pytest.approx(8 / 2 * kept["1F1B"], rel=0.2), "all micro-batches, or one for each rank"


class _Kept:
    """A tensor that autograd keeps, which is counted as long as this is there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _activations(config: JobConfig) -> tuple[float, float]:
    """Bytes that autograd keeps at most in a step, without weights; measured and estimated."""
    with contextlib.closing(Trainer(config)) as trainer:
        hf_model = trainer.model.hf_model
        own = {tensor.untyped_storage().data_ptr() for tensor in [*hf_model.parameters(), *hf_model.buffers()]}
        holders, kept, peak = Counter(), Counter(), 0

        def drop(address: int) -> None:
            holders[address] -= 1
            if holders[address] == 0:
                del kept[address]

        def keep(tensor: torch.Tensor) -> _Kept:
            nonlocal peak
            holder, storage = _Kept(tensor), tensor.untyped_storage()
            if (address := storage.data_ptr()) not in own:
                holders[address] += 1
                kept[address] = storage.nbytes()
                peak = max(peak, kept.total())
                weakref.finalize(holder, drop, address)
            return holder

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
            trainer.train_step()
        memory = estimate_run_memory(
            config, trainer.model, optimizers=trainer.optimizers, computes_in=torch.float32, accumulates=False
        )
        return peak, memory.activations + memory.logits


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
def test_activations_are_estimated_as_autograd_keeps_them(two: WorkerPool, folder: str, schedule: str):
    pipeline = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": schedule}
    wide = MODELS["llama"] | {"hidden_size": 128, "intermediate_size": 352}
    config = _job(folder, "run", "llama", pipeline, training__local_batch_size=_ROWS, training__seq_len=128,
                  hf_transformers__config_overrides=wide)  # fmt: skip
    for measured, estimated in two.run(_activations, config):
        assert estimated == pytest.approx(measured, rel=0.1)


# -- random numbers --------------------------------------------------------------------------------------------------


def _drawn(config: JobConfig) -> float:
    with contextlib.closing(Trainer(config)) as trainer:
        drawn = torch.rand(()).item()
        loss = trainer.train_step().loss
        assert loss.isfinite()
        return drawn


def test_stages_drop_different_things(four: WorkerPool, folder: str):
    dropping = MODELS["gpt2"] | {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
    options = {"hf_transformers__config_overrides": dropping, "training__local_batch_size": 2}
    by_data, by_matrices = (
        four.run(_drawn, _job(folder, "run", "gpt2", {"pipeline_parallel_degree": 2, **beside}, **options))
        for beside in (_SHARDED, _SPLIT)
    )
    assert len(set(by_data)) == 4, "other data, and other layers"
    assert by_matrices[0] == by_matrices[1] != by_matrices[2] == by_matrices[3], "of one layer the same"


# -- what goes wrong -------------------------------------------------------------------------------------------------


def _skip_a_bad_step(config: JobConfig) -> tuple[list[str], bool]:
    """A step with a NaN in layer 2, which the third of four stages has; what was said, and whether weights changed."""
    with Messages("transformers_backend.trainer") as messages, contextlib.closing(Trainer(config)) as trainer:
        layer = trainer.model.hf_model.model.layers[2]
        trainer.train_step()
        broken = layer.mlp.register_forward_hook(lambda mlp, args, output: output * float("nan"))
        before = trainer.model.full_state_dict()
        trainer.train_step()
        after = trainer.model.full_state_dict()
        is_unchanged = all(torch.equal(before[name], weight) for name, weight in after.items())
        broken.remove()
        assert trainer.train_step().loss.isfinite()
        return messages.texts, is_unchanged


def test_a_bad_number_in_a_middle_stage_is_named(two: WorkerPool, folder: str):
    pipeline = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B"}
    config = _job(folder, "run", "llama", pipeline, training__local_batch_size=4, debug__skip_nonfinite_steps=True)
    results = two.run(_skip_a_bad_step, config)
    assert [is_unchanged for _, is_unchanged in results] == [True, True]
    message = next(text for text in results[0][0] if "is skipped" in text)
    assert "loss nan" in message
    assert "Non-finite loss on rank 1 (the end of a pipeline of ranks 0, 1); non-finite gradients of lm_head" in message


def _refusal(config: JobConfig) -> str:
    try:
        Trainer(config).close()
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("parallelism", "layers", "message"),
    [
        ({}, 1, 'schedule = "1F1B": makes 2 stages on pipeline_parallel_degree = 2 ranks, and the model has 1 layers'),
        ({"pipeline_parallel_schedule": "Interleaved1F1B"}, 3, r"makes 4 stages .* 3 layers.*choose 1F1B or GPipe"),
        ({"pipeline_parallel_schedule": "1F2B"}, 4, "must be one of GPipe, 1F1B, .*the nearest is"),
        ({"pipeline_parallel_microbatch_size": 3}, 4, "local_batch_size = 8: must be divisible by .*one of 1, 2, 4, 8"),
        ({"pipeline_parallel_microbatch_size": 8}, 4, "number of micro-batches is 1, and must be at least 2"),
        ({"pipeline_parallel_layers_per_stage": 1}, 4, "makes 4 stages .* must be exactly 2, one for each rank"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(
    two: WorkerPool, folder: str, parallelism: dict, layers: int, message: str
):
    config = _job(folder, "run", "llama", {"pipeline_parallel_degree": 2, **parallelism}, training__local_batch_size=8)
    config.hf_transformers.config_overrides = {**MODELS["llama"], "num_hidden_layers": layers}
    for said in two.run(_refusal, config):
        assert re.search(message, said), said


def _misuse(config: JobConfig) -> list[str]:
    """What is said to somebody who gives ranks different batches, or calls the Transformers model."""
    with contextlib.closing(Trainer(config)) as trainer:
        model = trainer.model
        tokens = torch.arange(64).view(4, 16)
        changed = tokens + (dist.get_rank() == 3)
        calls = [
            lambda: model.forward_backward(changed, tokens),
            lambda: model.evaluate(tokens, changed),
            lambda: model.forward_backward(tokens[:3], tokens[:3]),
            lambda: model.hf_model(input_ids=tokens),
            lambda: model.hf_model.generate(input_ids=tokens, max_new_tokens=2),
            lambda: model.hf_model.save_pretrained(config.job.dump_folder),
        ]
        said = []
        for call in calls:
            try:
                said.append(f"nothing, and returns {call()}")
            except ValueError as error:
                said.append(str(error))
        assert model.forward_backward(tokens, tokens).isfinite(), "it goes on"
        return said


def test_misuse_is_told_on_every_rank(four: WorkerPool, folder: str):
    pipeline = {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2, **_SPLIT}
    for said in four.run(_misuse, _job(folder, "run", "llama", pipeline, training__local_batch_size=4)):
        for text in said[:2]:
            assert "differ between ranks of one tensor-parallel group of 2 or pipeline of 2" in text
        assert said[2].startswith("The number of sequences of a batch = 3: must be divisible by parallelism.pipeline_p")
        assert all("this rank has only some of its layers, so the model cannot be called" in text for text in said[3:5])
        assert "so it cannot save itself. Call save_pretrained of the HFTransformerModel" in said[5]
