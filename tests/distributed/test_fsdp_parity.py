"""Sharded training in every arrangement, on gloo processes, against plain Transformers on one device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from parallelize.config import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from tests.distributed.workers import Messages, WorkerPool
from transformers_backend.model import HFTransformerModel
from transformers_backend.twin import VOCABULARY_SIZE, build_twin

SEQUENCE = 16


@pytest.fixture(scope="module")
def four(two: WorkerPool) -> Iterator[WorkerPool]:
    two.stop()  # two cores: not six processes
    with WorkerPool(4) as pool:
        yield pool


def _twin(model_type: str, **fields):
    config = CONFIG_MAPPING[model_type](**fields)
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with different numbers of targets; every fourth has none."""
    generator = torch.Generator().manual_seed(11)
    input_ids = torch.randint(3, VOCABULARY_SIZE - 3, (count, SEQUENCE), generator=generator)
    labels = input_ids.clone()
    for row in range(count):
        labels[row, : SEQUENCE if row % 4 == 3 else 3 * (row % 4) + 1] = -100
    return input_ids, labels


def _reference(model_type: str, input_ids, labels, **fields) -> tuple[float, dict[str, torch.Tensor]]:
    plain = _twin(model_type, **fields)
    loss = plain(input_ids=input_ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def _assert_parity(
    model: HFTransformerModel, loss: float, reference: tuple[float, dict[str, torch.Tensor]], tolerance: float = 1e-5
) -> None:
    expected_loss, expected = reference
    assert abs(loss - expected_loss) <= tolerance * abs(expected_loss), (loss, expected_loss)
    gradients = model.full_gradients()
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.norm(), 1e-3 * largest * gradient.numel() ** 0.5)
        assert (gradients[name] - gradient).norm() <= 10 * tolerance * scale, name


def _train_and_compare(model_type: str, fields: dict, parallelism: dict, tolerance: float, options: dict) -> list[str]:
    """One global batch of two rows a rank in two micro-batches; returns what the wrapper warned of."""
    world_size = dist.get_world_size()
    input_ids, labels = _rows(2 * world_size)
    reference = _reference(model_type, input_ids, labels, **fields)
    torch._dynamo.reset()
    with Messages("transformers_backend") as messages:
        model = HFTransformerModel.wrap(_twin(model_type, **fields))
        model.parallelize(ParallelismConfig(**parallelism), **options)
    mine = slice(2 * model.data_rank, 2 * model.data_rank + 2)
    targets = model.count_targets(labels[mine])
    assert targets.item() == (labels[:, 1:] != -100).sum().item()
    for step in range(2):  # the second time parameters are resharded, and compiled code is there
        loss = sum(
            model.forward_backward(input_ids[mine][row : row + 1], labels[mine][row : row + 1],
                                   num_items_in_batch=targets)
            for row in range(2)
        )  # fmt: skip
        _assert_parity(model, loss.item(), reference, tolerance)
        if step == 0:
            model.hf_model.zero_grad()
    _assert_clipping(model, reference[1], tolerance)
    evaluated, count = model.evaluate(input_ids[mine], labels[mine])
    assert abs((evaluated / count).item() - reference[0]) <= tolerance * reference[0]
    return messages.texts


def _assert_clipping(model: HFTransformerModel, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    full = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in expected.values()]
    for parameter, gradient in zip(full, expected.values(), strict=True):
        parameter.grad = gradient.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(full, 0.05).item()
    norm = model.clip_grad_norm_(0.05).item()
    assert expected_norm > 0.05
    assert abs(norm - expected_norm) <= 10 * tolerance * expected_norm
    clipped = model.full_gradients()
    total = torch.stack([gradient.norm() for gradient in clipped.values()]).norm().item()
    assert abs(total - 0.05) <= 10 * tolerance * 0.05


def _many(cases: list[tuple]) -> None:
    for case in cases:
        try:
            warned = _train_and_compare(*case)
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        assert not [text for text in warned if "override" not in text], (case, warned)


FULL = {"activation_checkpoint": ActivationCheckpointConfig(mode="full")}
EVERY_SECOND = {"activation_checkpoint": ActivationCheckpointConfig(mode="selective", selective_ac_option="2")}
PER_OP = {"activation_checkpoint": ActivationCheckpointConfig(mode="selective", selective_ac_option="op")}
AOT_EAGER = {"compile": CompileConfig(enable=True, backend="aot_eager")}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            [("llama", {}, {}, 1e-5, {}), ("qwen3", {"tie_word_embeddings": True}, {}, 1e-5, {}),
             ("gpt2", {}, {"fsdp_reshard_after_forward": "never"}, 1e-5, {}),
             ("gemma2", {}, {"fsdp_reshard_after_forward": "always"}, 1e-5, {})], id="reshard"),
        pytest.param(
            [("qwen3", {"tie_word_embeddings": True}, {}, 1e-5, {"cpu_offload": True})], id="offload"),
        pytest.param(
            [("llama", {}, {}, 1e-5, FULL), ("gpt2", {}, {}, 1e-5, PER_OP), ("falcon", {}, {}, 1e-5, EVERY_SECOND),
             ("gemma3n_text", {}, {}, 1e-5, FULL)], id="recompute"),
        pytest.param([("llama", {}, {"data_parallel_replicate_degree": 2}, 1e-5, {})], id="replicas"),
    ],
)  # fmt: skip
def test_two_ranks_are_plain_transformers(two: WorkerPool, cases: list[tuple]):
    two.run(_many, cases)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "hrm_text"])
def test_compiled_layers_and_loss_are_plain_transformers(two: WorkerPool, model_type: str):
    """aot_eager traces forward and backward as inductor does, each layer as one graph, and generates no code."""
    cases = [(model_type, {}, {}, 1e-5, AOT_EAGER)]
    if model_type == "llama":
        cases += [(model_type, {}, {}, 1e-5, {**AOT_EAGER, **option}) for option in (FULL, PER_OP)]
    two.run(_many, cases)


def _exact_or_refused(model_type: str, options: dict) -> str:
    try:
        _train_and_compare(model_type, {}, {}, 1e-5, options)
    except ValueError as refusal:
        return str(refusal)
    return ""


def test_recomputation_inside_gemma3n_is_exact_or_refused(two: WorkerPool):
    """Its layers change the output of a matrix product in place, which the per-op recomputation keeps as it was."""
    for refusal in two.run(_exact_or_refused, "gemma3n_text", PER_OP):
        assert not refusal or "selective_ac_option" in refusal


def _sharded_after_evaluation() -> None:
    model = HFTransformerModel.wrap(_twin("llama")).parallelize(ParallelismConfig())
    before = {name: type(parameter) for name, parameter in model.hf_model.named_parameters()}
    model.evaluate(*_rows(2))
    assert {name: type(parameter) for name, parameter in model.hf_model.named_parameters()} == before


def test_an_evaluation_leaves_the_model_sharded(two: WorkerPool):
    """Else a checkpoint right after it holds gathered parameters that the optimizer does not know."""
    two.run(_sharded_after_evaluation)


def _compilations() -> tuple[int, list[str]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = HFTransformerModel.wrap(_twin("llama"))
    model.parallelize(
        ParallelismConfig(), compile=CompileConfig(enable=True, backend="aot_eager", components=["model"])
    )
    torch._dynamo.utils.counters.clear()
    input_ids, labels = _rows(2)
    for _ in range(3):
        model.forward_backward(input_ids, labels)
    names = list(model.full_state_dict())
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], names


def test_layers_of_a_kind_share_one_compilation_and_names_stay(two: WorkerPool):
    for graphs, names in two.run(_compilations):
        assert graphs <= 1, "two layers, three steps"
        assert names == list(_twin("llama").state_dict())


def _uneven_batches() -> None:
    """Ranks with other numbers of targets and other numbers of rows; one has no target at all."""
    rank, (input_ids, labels) = dist.get_rank(), _rows(6)
    labels[4:] = -100
    reference = _reference("gemma2", input_ids, labels)
    model = HFTransformerModel.wrap(_twin("gemma2")).parallelize(ParallelismConfig())
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    loss = model.forward_backward(input_ids[mine], labels[mine])
    _assert_parity(model, loss.item(), reference)
    model.hf_model.zero_grad()
    loss = model.forward_backward(input_ids[mine], torch.full_like(labels[mine], -100))
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in model.full_gradients().values())


def test_a_rank_without_targets(two: WorkerPool):
    two.run(_uneven_batches)


def _bfloat16(model_type: str) -> tuple[float, float]:
    input_ids, labels = _rows(4)
    expected_loss, expected = _reference(model_type, input_ids, labels)
    low = _twin(model_type).bfloat16()
    low(input_ids=input_ids, labels=labels, use_cache=False).loss.backward()
    model = HFTransformerModel.wrap(_twin(model_type)).parallelize(ParallelismConfig(), param_dtype=torch.bfloat16)
    mine = slice(2 * model.data_rank, 2 * model.data_rank + 2)
    loss = model.forward_backward(input_ids[mine], labels[mine])
    gradients = model.full_gradients()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}, "reduced and kept in fp32"
    assert {parameter.dtype for parameter in model.hf_model.parameters()} == {torch.float32}, "master weights"
    plain = {name: p.grad.float() for name, p in low.named_parameters() if p.grad is not None}

    def error(values: dict[str, torch.Tensor]) -> float:
        squares = [(values[name] - g).square().sum() for name, g in expected.items()]
        return (sum(squares) / sum(g.square().sum() for g in expected.values())).sqrt().item()

    # bf16 rounds to 8 bits, 0.4 % at each of some ten steps through a twin: about 1 %, as plain bf16 has it.
    assert abs(loss.item() - expected_loss) <= 0.01 * expected_loss
    return error(gradients), error(plain)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_bfloat16_computation_is_as_near_as_plain_bfloat16(two: WorkerPool, model_type: str):
    for ours, plain in two.run(_bfloat16, model_type):
        assert 1e-4 < ours < 0.03, "it did compute in bf16, and nothing worse happened than rounding"
        assert ours <= 1.25 * plain


def _different_weights() -> str:
    twin = _twin("llama")
    with torch.no_grad():
        twin.lm_head.weight[0, 0] += dist.get_rank()
    with pytest.raises(ValueError, match="different weights") as refused:
        HFTransformerModel.wrap(twin).parallelize(ParallelismConfig())
    return str(refused.value)


def test_models_that_differ_between_ranks_are_refused(two: WorkerPool):
    assert all("torch.manual_seed" in message for message in two.run(_different_weights))


def _both_ranks_see_the_same() -> tuple[list[float], dict[str, torch.Tensor], str]:
    input_ids, labels = _rows(4)
    model = HFTransformerModel.wrap(_twin("llama")).parallelize(ParallelismConfig())
    mine = slice(2 * model.data_rank, 2 * model.data_rank + 2)
    if model.data_rank == 1:
        input_ids[3] = input_ids[2]
    losses = [model.forward_backward(input_ids[mine], labels[mine]).item(), model.clip_grad_norm_(1.0).item()]
    sound = model.find_nonfinite()
    assert sound == "Finite loss on every rank; non-finite gradients of no parameter.", sound
    model._local_losses_are_finite = torch.tensor(dist.get_rank() != 1)
    return losses, model.full_gradients(), model.find_nonfinite()


def test_results_are_the_same_on_every_rank(two: WorkerPool):
    (losses, gradients, sentence), (others, other_gradients, other_sentence) = two.run(_both_ranks_see_the_same)
    assert losses == others
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())
    assert sentence == other_sentence
    assert sentence.startswith("Non-finite loss on rank 1;")


def _dropout_masks() -> float:
    """With full recomputation and dropout the gradients are those of the same masks without recomputation."""
    gradients = []
    for mode in ("none", "full"):
        twin = _twin("gpt2")
        for module in twin.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        model = HFTransformerModel.wrap(twin).parallelize(
            ParallelismConfig(), activation_checkpoint=ActivationCheckpointConfig(mode=mode)
        )
        torch.manual_seed(4 + dist.get_rank())
        model.forward_backward(*_rows(2))
        gradients.append(model.full_gradients())
    return max((gradients[0][name] - value).abs().max().item() for name, value in gradients[1].items())


def test_recomputation_draws_the_same_dropout(two: WorkerPool):
    assert max(two.run(_dropout_masks)) < 1e-6


def _wrong_world() -> str:
    with pytest.raises(ValueError, match="the job runs on 2 ranks") as caught:
        HFTransformerModel.wrap(_twin("llama")).parallelize(ParallelismConfig(data_parallel_shard_degree=3))
    with pytest.raises(ValueError, match="parallelize comes once"):
        HFTransformerModel.wrap(_twin("llama")).parallelize(ParallelismConfig()).parallelize(ParallelismConfig())
    return str(caught.value)


def test_a_mesh_that_does_not_fit(two: WorkerPool):
    assert all("data_parallel_shard_degree = -1 takes the rest" in message for message in two.run(_wrong_world))


def _units() -> tuple[list[str], list[int]]:
    from torch.distributed.fsdp import FSDPModule

    torch.manual_seed(0)
    model = HFTransformerModel.wrap(LlamaForCausalLM(_twin("llama").config)).parallelize(ParallelismConfig())
    units = [name for name, module in model.hf_model.named_modules() if isinstance(module, FSDPModule)]
    local = [parameter.to_local().numel() for parameter in model.hf_model.parameters()]
    return units, local


def test_every_rank_holds_its_half_of_every_parameter(two: WorkerPool):
    expected = [parameter.numel() // 2 for parameter in _twin("llama").parameters()]
    for units, local in two.run(_units):
        assert units == ["", "model.embed_tokens", "model.layers.0", "model.layers.1"]
        assert local == expected


@pytest.mark.parametrize("parallelism", [{"data_parallel_shard_degree": 4},
                                         {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
                                         {"data_parallel_replicate_degree": 4}])  # fmt: skip
def test_four_ranks_are_plain_transformers(four: WorkerPool, parallelism: dict):
    four.run(_many, [("gpt2", {}, parallelism, 1e-5, FULL)])
