"""Dropout on two tensor-parallel ranks: the same numbers are dropped where both compute the same, others elsewhere.

The reference is plain Transformers with masks put together from those that the ranks drew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from parallelize.config import ActivationCheckpointConfig, CompileConfig
from parallelize.model import parallelize_model
from parallelize.parallel_dims import ParallelDims
from parallelize.tensor_parallel import Region, TensorPlan
from parallelize.tensor_parallel.randomness import ForkedRandomness
from tests.distributed.workers import Messages, WorkerPool
from transformers_backend import HFTransformerModel, ParallelismConfig
from transformers_backend.decisions import why_not_random_shards
from transformers_backend.decoder import describe_decoder, has_dropout
from transformers_backend.loss import count_targets, install_loss, shift_labels
from transformers_backend.proof import gradients, relative_errors
from transformers_backend.tensor_plan import derive, make_plan
from transformers_backend.tensor_proof import vocabulary_shard
from transformers_backend.weights import full_tensor

PROBABILITY = 0.1
SEQUENCE = 31  # which two does not divide
_plain_dropout = F.dropout


def _build(model_type: str, probability: float = PROBABILITY) -> PreTrainedModel:
    """GPT-2's attention and mlp end with a dropout behind the exit of their region; OPT's mlp is no module."""
    torch.manual_seed(0)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    if model_type == "gpt2":
        dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), probability)
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64, **dropout, **tokens)
        return GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    dropout = dict.fromkeys(("dropout", "attention_dropout"), probability)
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        vocab_size=64, word_embed_proj_dim=32, **dropout, **tokens,
    )  # fmt: skip
    return OPTForCausalLM._from_config(config, attn_implementation="eager")


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(2, 64, (4, SEQUENCE), generator=torch.Generator().manual_seed(5))
    return input_ids, input_ids


def _split(hf_model: PreTrainedModel, *, shares_sequence: bool, **options: Any) -> PreTrainedModel:
    """The model over two ranks, without the proofs of the wrapper, which would take most of the time."""
    mesh = ParallelDims(pp=1, dp_replicate=1, dp_shard=1, cp=1, tp=2).build_mesh("cpu")
    decoder = describe_decoder(hf_model)
    recipe = derive(_build(hf_model.config.model_type, probability=0.0), decoder, _batch()[0]).first()
    plan = make_plan(hf_model, decoder, recipe, 2)
    vocabulary = vocabulary_shard(hf_model, decoder, plan, mesh["tp"])
    install_loss(hf_model, decoder, chunked=True, vocabulary=vocabulary)
    options = {"activation_checkpoint": ActivationCheckpointConfig(), "compile": CompileConfig(), **options}
    parallelize_model(
        hf_model, layers=decoder.layers, separate_units=[], mesh=mesh, float8=None, kernels={}, tensor_plan=plan,
        sequence_parallel=shares_sequence, has_dropout=has_dropout(hf_model), parallelism=ParallelismConfig(),
        param_dtype=None, cpu_offload=False, **options,
    )  # fmt: skip
    return hf_model.train()


def _loss(model: PreTrainedModel) -> torch.Tensor:
    input_ids, labels = _batch()
    return model(input_ids=input_ids, targets=shift_labels(labels)) / count_targets(labels)


def _step(model: PreTrainedModel) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step that begins with the same random state each time."""
    model.zero_grad()
    torch.manual_seed(11)
    loss = _loss(model)
    loss.backward()
    return loss.item(), {name: full_tensor(model, name, gradient) for name, gradient in gradients(model).items()}


@contextlib.contextmanager
def _dropout_by(replacement: Callable[[torch.Tensor, float], torch.Tensor]) -> Iterator[None]:
    def dropout(value: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return replacement(value, p) if training and p > 0 else value

    F.dropout = dropout
    try:
        yield
    finally:
        F.dropout = _plain_dropout


def _step_with_masks(model: PreTrainedModel) -> tuple[list[torch.Tensor], float, dict[str, torch.Tensor]]:
    masks = []

    def recorded(value: torch.Tensor, p: float) -> torch.Tensor:
        mask = _plain_dropout(torch.ones_like(value, requires_grad=False), p)
        masks.append(mask.detach())
        return value * mask

    with _dropout_by(recorded):
        loss, found = _step(model)
    return masks, loss, found


def _masks_and_recomputation(model_type: str, shares_sequence: bool) -> dict[str, Any]:
    model = _split(_build(model_type), shares_sequence=shares_sequence)
    masks, loss, found = _step_with_masks(model)
    state = torch.get_rng_state()
    model.eval()
    _loss(model)
    assert torch.equal(torch.get_rng_state(), state), "an evaluation drew random numbers"
    model.train()
    others = []
    with _dropout_by(lambda value, p: others.append(_plain_dropout(torch.ones_like(value), p)) or value):
        _loss(model)
    assert not any(map(torch.equal, masks, others)), "a mask came twice"
    for mode, option in (("full", "2"), ("selective", "op")):
        checkpoint = ActivationCheckpointConfig(mode=mode, selective_ac_option=option)
        again = _step(_split(_build(model_type), shares_sequence=shares_sequence, activation_checkpoint=checkpoint))
        assert again[0] == pytest.approx(loss, rel=1e-6), mode
        assert max(relative_errors(found, again[1]).values()) < 1e-5, mode
        assert torch.equal(torch.get_rng_state(), state), "the recomputation left another state"
    return {"masks": masks, "loss": loss, "gradients": found, "state": state}


def _whole(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """One mask from those of the ranks: of their heads, of their parts of the sequence, or the same one of both."""
    if first.dim() == 2:  # OPT's mlp sees (batch x sequence, hidden)
        return _whole(first.unflatten(0, (4, -1)), second.unflatten(0, (4, -1))).flatten(0, 1)
    if first.shape == (4, SEQUENCE, 32):
        assert torch.equal(first, second)
        return first
    assert not torch.equal(first, second), "one mask for two parts"
    whole = torch.cat([first, second], 1)
    return whole if whole.dim() == 4 else whole[:, :SEQUENCE]


def _expected(model_type: str, masks: list[torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    plain, left = _build(model_type), iter(masks)
    plain.train()
    input_ids, labels = _batch()
    with _dropout_by(lambda value, p: value * next(left)):
        loss = plain(input_ids=input_ids, labels=labels, use_cache=False).loss
    assert next(left, None) is None
    loss.backward()
    return loss.item(), gradients(plain)


@pytest.mark.parametrize("shares_sequence", [False, True])
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_step_is_that_of_plain_transformers_with_the_masks_of_all_ranks(
    two: WorkerPool, model_type: str, shares_sequence: bool
):
    ranks = two.run(_masks_and_recomputation, model_type, shares_sequence)
    assert torch.equal(ranks[0]["state"], ranks[1]["state"])
    masks = list(map(_whole, *(rank["masks"] for rank in ranks)))
    assert len(masks) == 2 * 3 + (model_type == "gpt2")  # GPT-2 also drops numbers of the embedding
    of_heads = [mask for mask in masks if mask.dim() == 4]
    assert len(of_heads) == 2
    assert {mask.shape[1] for mask in of_heads} == {4}
    kept = torch.cat([mask.flatten() for mask in masks]) > 0
    deviation = (PROBABILITY * (1 - PROBABILITY) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - PROBABILITY)) < 5 * deviation
    loss, expected = _expected(model_type, masks)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(loss, rel=1e-5)
        errors = relative_errors(expected, rank["gradients"])
        assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


def _compiled() -> None:
    compile = CompileConfig(enable=True, components=["model"], backend="aot_eager")
    checkpoint = ActivationCheckpointConfig(mode="full")
    loss, found = _step(_split(_build("gpt2"), shares_sequence=True))
    compiled = _split(_build("gpt2"), shares_sequence=True, compile=compile, activation_checkpoint=checkpoint)
    again = _step(compiled)
    assert again[0] == pytest.approx(loss, rel=1e-5)
    assert max(relative_errors(found, again[1]).values()) < 1e-4


def test_compiled_and_recomputed_layers_drop_as_eager_ones(two: WorkerPool):
    two.run(_compiled)


def _failing(shares_sequence: bool) -> None:
    model = _split(_build("gpt2"), shares_sequence=shares_sequence)
    expected, _ = _step(model)

    def fail(*args) -> None:
        raise OSError("a broken cable")

    layer = model.transformer.h[1]
    for name, place in (("inside a region", layer.mlp.act), ("between regions", layer.ln_2)):
        handle = place.register_forward_hook(fail)
        with pytest.raises(OSError, match="cable"):
            _step(model)
        handle.remove()
        states = [torch.empty_like(torch.get_rng_state()) for _ in range(2)]
        torch.distributed.all_gather(states, torch.get_rng_state())
        assert torch.equal(*states), f"an error {name} left the state forked"
        assert _step(model)[0] == expected


@pytest.mark.parametrize("shares_sequence", [False, True])
def test_an_error_in_a_layer_leaves_nothing_forked(two: WorkerPool, shares_sequence: bool):
    two.run(_failing, shares_sequence)


def _without_dropout() -> None:
    for shares_sequence in (False, True):
        model = _split(_build("gpt2", probability=0.0), shares_sequence=shares_sequence)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        _loss(model).backward()
        assert torch.equal(torch.get_rng_state(), before)


def test_models_without_dropout_draw_nothing(two: WorkerPool):
    two.run(_without_dropout)


def _wrapped(hf_model: PreTrainedModel, sequence: str, **options: Any) -> tuple[HFTransformerModel, list[str]]:
    parallelism = ParallelismConfig(tensor_parallel_degree=2, sequence_parallel=sequence)
    with Messages("transformers_backend") as messages:
        return HFTransformerModel.wrap(hf_model).parallelize(parallelism, **options), messages.texts


def _by_the_wrapper() -> None:
    compile = CompileConfig(enable=True, components=["model"], backend="aot_eager")
    model, messages = _wrapped(_build("gpt2"), "never", compile=compile)
    assert any("not compiled" in text and "dropout" in text for text in messages), messages
    before = torch.get_rng_state()
    model.evaluate(*_batch())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.forward_backward(*_batch()).isfinite()


def test_layers_that_fork_are_not_compiled_and_evaluation_draws_nothing(two: WorkerPool):
    two.run(_by_the_wrapper)


def test_numbers_of_a_rank_of_its_own_come_and_go():
    drawn = []
    for rank in (0, 1, 0):
        torch.manual_seed(0)
        fork = ForkedRandomness(rank, "cpu")
        fork.leave()  # without an entry
        fork.enter()
        own = [torch.rand(4)]
        fork.enter()
        own.append(torch.rand(4))
        fork.leave()
        shared = torch.rand(4)
        fork.enter()
        own.append(torch.rand(4))
        fork.leave()
        drawn.append((torch.stack(own), shared))
    assert torch.equal(drawn[0][0], drawn[2][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert len({round(number, 5) for own, _ in drawn[:2] for number in own.flatten().tolist()}) == 24


def test_a_module_that_stays_whole_keeps_the_sequence_whole_where_there_is_dropout():
    whole = TensorPlan(2, {}, {"layer.attn": Region(is_whole=True), "layer.mlp": Region()})
    split = TensorPlan(2, {}, {"layer.attn": Region(), "layer.mlp": Region()})
    assert "layer.attn, with dropout" in why_not_random_shards(_build("gpt2"), whole)
    assert why_not_random_shards(_build("gpt2"), split) is None
    assert why_not_random_shards(_build("gpt2", probability=0.0), whole) is None


def _drops_layers() -> str | None:
    hf_model = _build("opt")
    hf_model.config.layerdrop = 0.1
    try:
        HFTransformerModel.wrap(hf_model).parallelize(ParallelismConfig(tensor_parallel_degree=2))
    except ValueError as error:
        return str(error)
    return None


def test_layers_that_are_skipped_at_random_are_refused(two: WorkerPool):
    for message in two.run(_drops_layers):
        assert "config.layerdrop = 0.1 skips layers at random" in message
        assert "Set layerdrop to 0." in message
