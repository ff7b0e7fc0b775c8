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
from parallelize.tensor_parallel.randomness import ForkedRandomness
from tests.distributed.workers import Messages, WorkerPool
from transformers_backend import HFTransformerModel, ParallelismConfig
from transformers_backend.decoder import has_dropout
from transformers_backend.proof import gradients, relative_errors

PROBABILITY = 0.1
SEQUENCE = 31  # which two does not divide
_plain_dropout = F.dropout


def _build(model_type: str, probability: float = PROBABILITY, **changes: Any) -> PreTrainedModel:
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
        vocab_size=64, word_embed_proj_dim=32, **dropout, **tokens, **changes,
    )  # fmt: skip
    return OPTForCausalLM._from_config(config, attn_implementation="eager")


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(2, 64, (4, SEQUENCE), generator=torch.Generator().manual_seed(5))
    return input_ids, input_ids


def _split(hf_model: PreTrainedModel, sequence: str, **options: Any) -> HFTransformerModel:
    parallelism = ParallelismConfig(tensor_parallel_degree=2, sequence_parallel=sequence)
    return HFTransformerModel.wrap(hf_model).parallelize(parallelism, **options)


def _step(model: HFTransformerModel) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step that begins with the same random state each time."""
    model.hf_model.zero_grad()
    torch.manual_seed(11)
    return model.forward_backward(*_batch()).item(), model.full_gradients()


@contextlib.contextmanager
def _dropout_by(replacement: Callable[[torch.Tensor, float], torch.Tensor]) -> Iterator[None]:
    def dropout(value: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return replacement(value, p) if training and p > 0 else value

    F.dropout = dropout
    try:
        yield
    finally:
        F.dropout = _plain_dropout


def _step_with_masks(model: HFTransformerModel) -> tuple[list[torch.Tensor], float, dict[str, torch.Tensor]]:
    masks = []

    def recorded(value: torch.Tensor, p: float) -> torch.Tensor:
        mask = _plain_dropout(torch.ones_like(value, requires_grad=False), p)
        masks.append(mask.detach())
        return value * mask

    with _dropout_by(recorded):
        loss, found = _step(model)
    return masks, loss, found


def _masks_and_recomputation(model_type: str, sequence: str) -> dict[str, Any]:
    model = _split(_build(model_type), sequence)
    assert model.sequence_parallel == (sequence == "always")
    masks, loss, found = _step_with_masks(model)
    state = torch.get_rng_state()
    model.evaluate(*_batch())
    assert torch.equal(torch.get_rng_state(), state), "an evaluation drew random numbers"
    with _dropout_by(lambda value, p: masks.append(_plain_dropout(torch.ones_like(value), p)) or value):
        model.forward_backward(*_batch())
    assert not any(map(torch.equal, masks[: len(masks) // 2], masks[len(masks) // 2 :])), "a mask came twice"
    for mode, option in (("full", "2"), ("selective", "op")):
        checkpoint = ActivationCheckpointConfig(mode=mode, selective_ac_option=option)
        again = _step(_split(_build(model_type), sequence, activation_checkpoint=checkpoint))
        assert again[0] == loss, mode
        assert max(relative_errors(found, again[1]).values()) < 1e-5, (mode, option)
        assert torch.equal(torch.get_rng_state(), state), "the recomputation left another state"
    return {"masks": masks[: len(masks) // 2], "loss": loss, "gradients": found, "state": state}


def _whole(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """One mask from those of the ranks: of their heads, of their parts of the sequence, or the same one of both."""
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


@pytest.mark.parametrize("sequence", ["never", "always"])
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_step_is_that_of_plain_transformers_with_the_masks_of_all_ranks(
    two: WorkerPool, model_type: str, sequence: str
):
    ranks = two.run(_masks_and_recomputation, model_type, sequence)
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
    with Messages("transformers_backend") as messages:
        shared = _split(_build("gpt2"), "always", compile=compile, activation_checkpoint=checkpoint)
    assert not any("not compiled" in text for text in messages.texts)
    expected = _step(_split(_build("gpt2"), "always"))
    found = _step(shared)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert max(relative_errors(expected[1], found[1]).values()) < 1e-4
    with Messages("transformers_backend") as messages:
        alone = _split(_build("gpt2"), "never", compile=compile)
    assert any("not compiled" in text and "dropout" in text for text in messages.texts), messages.texts
    assert _step(alone)[0] == _step(_split(_build("gpt2"), "never"))[0]


def test_compiled_layers_drop_as_eager_ones_or_say_that_they_are_not_compiled(two: WorkerPool):
    two.run(_compiled)


def _failing(sequence: str) -> None:
    model = _split(_build("gpt2"), sequence)
    expected = _step(model)

    def fail(*args) -> None:
        raise OSError("a broken cable")

    inside = model.hf_model.transformer.h[1].mlp.act
    for name, place in (("inside a region", inside), ("between regions", model.hf_model.transformer.h[1].ln_2)):
        handle = place.register_forward_hook(fail)
        with pytest.raises(OSError, match="cable"):
            _step(model)
        handle.remove()
        states = [torch.empty_like(torch.get_rng_state()) for _ in range(2)]
        torch.distributed.all_gather(states, torch.get_rng_state())
        assert torch.equal(*states), f"an error {name} left the state forked"
        assert _step(model)[0] == expected[0]


@pytest.mark.parametrize("sequence", ["never", "always"])
def test_an_error_in_a_layer_leaves_nothing_forked(two: WorkerPool, sequence: str):
    two.run(_failing, sequence)


def _without_dropout() -> None:
    for sequence in ("never", "always"):
        model = _split(_build("gpt2", probability=0.0), sequence)
        assert not has_dropout(model.hf_model)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        model.forward_backward(*_batch())
        assert torch.equal(torch.get_rng_state(), before)
    skipping = _build("opt", probability=0.0, layerdrop=0.5)
    model = _split(skipping, "auto")
    assert "layerdrop" in model.sequence_parallel_because
    torch.manual_seed(4)
    losses = {model.forward_backward(*_batch()).item() for _ in range(6)}
    assert len(losses) > 1, "no layer was left out"
    with pytest.raises(ValueError, match="always.*layerdrop"):
        _split(_build("opt", probability=0.0, layerdrop=0.5), "always")


def test_models_without_dropout_draw_nothing_and_layers_are_left_out_together(two: WorkerPool):
    two.run(_without_dropout)


def test_numbers_of_a_rank_of_its_own_come_and_go():
    torch.manual_seed(0)
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
