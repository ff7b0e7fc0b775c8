"""Tensor parallelism in a user's hands, on 4 ranks: their own loop, frozen parameters, generation, and mistakes.

The reference is the same model of Transformers, in one process and not split.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.distributed.workers import WorkerPool
from tests.jobs import restored_process, tiny_job
from transformers_backend import HFTransformerModel, JobConfig, ParallelismConfig, Trainer

_SIZES = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip
_VOCABULARY = 98  # which 4 ranks do not share evenly
_ALONE, _SHARDED = ParallelismConfig(tensor_parallel_degree=4), ParallelismConfig(tensor_parallel_degree=2)


def _build(model_type: str, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = {**_SIZES[model_type], "vocab_size": _VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, _VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def _own_loop(model_type: str, parallelism: ParallelismConfig, frozen: tuple[str, ...]) -> None:
    """Transformers' loss where that suffices, and torch's optimizer, on the model and on its reference."""
    plain, split = _build(model_type), _build(model_type)
    for model in (plain, split):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
    model = HFTransformerModel.wrap(split).parallelize(parallelism)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (plain, split)]
    tokens = _tokens(4, 13)  # an odd length, for which sequence parallelism pads
    own = tokens.chunk(model.dims.data_parallel_size)[model.data_rank]
    plain.train()
    split.train()
    for _ in range(3):
        expected = plain(input_ids=tokens, labels=tokens).loss
        expected.backward()
        if model.dims.data_parallel_size == 1:
            split(input_ids=own, labels=own).loss.backward()
        else:  # gradients are summed over data ranks: the loss must be that of all of them
            model.forward_backward(own, labels=own)
        gradients = model.full_gradients()
        assert gradients.keys() == {name for name, p in plain.named_parameters() if p.grad is not None}
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        torch.testing.assert_close(model.clip_grad_norm_(0.5), norm, rtol=1e-5, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in model.full_state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=0, atol=2e-5)
    logits = split(input_ids=tokens).logits
    torch.testing.assert_close(logits, plain(input_ids=tokens).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("model_type", "parallelism", "frozen"),
    [
        ("llama", _SHARDED, ("nothing",)),
        ("llama", _ALONE, ("model.",)),
        ("gpt2", _SHARDED, ("transformer.wte", "transformer.wpe")),
        ("gpt2", _ALONE, ("transformer.h.0",)),
    ],
)
def test_a_loop_of_ones_own(four: WorkerPool, model_type: str, parallelism: ParallelismConfig, frozen: tuple[str, ...]):
    four.run(_own_loop, model_type, parallelism, frozen)


def _generate(model_type: str, parallelism: ParallelismConfig) -> bool:
    plain, split = _build(model_type).eval(), _build(model_type).eval()
    model = HFTransformerModel.wrap(split).parallelize(parallelism)
    tokens, mask = _tokens(2, 5), torch.ones(2, 5, dtype=torch.int64)
    mask[0, :2] = 0  # padded on the left, as prompts of different lengths are
    for use_cache in (True, False):  # with a cache the model sees one token at a time
        found, expected = (
            m.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=6, use_cache=use_cache, do_sample=False,
                output_scores=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
            )
            for m in (split, plain)
        )  # fmt: skip
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=0, atol=1e-5)
    return model.tensor_parallelism.sequence_parallel


@pytest.mark.parametrize(("model_type", "parallelism"), [("llama", _ALONE), ("gpt2", _SHARDED)])
def test_generation_is_that_of_the_whole_model(four: WorkerPool, model_type: str, parallelism: ParallelismConfig):
    assert all(four.run(_generate, model_type, parallelism)), "with sequence parallelism"


def _message(changes: dict, degree: int, times: int) -> str | None:
    model = HFTransformerModel.wrap(_build("llama", **changes))
    try:
        for _ in range(times):
            model.parallelize(ParallelismConfig(tensor_parallel_degree=degree))
    except ValueError as error:
        return str(error)
    return None


def test_mistakes_are_told_with_a_remedy(four: WorkerPool):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
    for changes, degree, times, expected in (
        (heads, 4, 1, "q_proj has 6 heads, which it does not divide. Use one of 1, 3, 6."),
        ({"num_attention_heads": 2}, 4, 1, "q_proj has 2 heads, which it does not divide. Use one of 1, 2."),
        # Degrees 5, 10, 25 and 50 would divide these features, but not the heads.
        ({"intermediate_size": 50}, 4, 1, "gate_proj has 50 features, which it does not divide. Use one of 1, 2."),
        ({}, 8, 1, "the degrees multiply to 8, but the job runs on 4 ranks"),
        ({}, 4, 2, "parallelize comes once"),
    ):
        for message in four.run(_message, changes, degree, times):
            assert expected in message


@torch.no_grad()
def _inner_outputs(sequence_parallel: str) -> list[str]:
    """Which of the outputs of layers the split model refuses, where it returns the others as the plain one does."""
    plain, split = (_build("llama", attn_implementation="eager").eval() for _ in range(2))
    HFTransformerModel.wrap(split).parallelize(
        ParallelismConfig(tensor_parallel_degree=2, sequence_parallel=sequence_parallel)
    )
    tokens, refused = _tokens(2, 5), []
    for name, field in (("output_attentions", "attentions"), ("output_hidden_states", "hidden_states")):
        split(input_ids=tokens, labels=tokens, **{name: False})
        for at_call in (True, False):
            setattr(split.config, name, not at_call)
            try:
                found = split(input_ids=tokens, **({name: True} if at_call else {}))[field]
            except ValueError as error:
                refused.append(str(error).partition(":")[0])
            else:
                expected = plain(input_ids=tokens, **{name: True})[field]
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        setattr(split.config, name, False)
    return refused


def test_parts_of_what_layers_compute_are_not_given_out_as_the_whole(four: WorkerPool):
    assert four.run(_inner_outputs, "never") == [["output_attentions = True"] * 2] * 4
    assert (
        four.run(_inner_outputs, "auto") == [["output_attentions = True"] * 2 + ["output_hidden_states = True"] * 2] * 4
    )


def _train(config: JobConfig) -> None:
    trainer = Trainer(config)
    trainer.train()
    trainer.close()


def _curve(config: JobConfig) -> list[float]:
    lines = (Path(config.job.dump_folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[figure] for line in lines for figure in ("loss", "grad_norm")]


@pytest.mark.parametrize(
    "changes",
    [
        {"hf_transformers__attn_implementation": "sdpa"},
        {"hf_transformers__attn_implementation": "eager"},
        {"optimizer__name": "Muon", "job__sample_prompt": "line", "job__sample_tokens": 5},
    ],
    ids=["sdpa", "eager", "Muon"],
)
def test_packed_documents_of_odd_length(four: WorkerPool, tmp_path: Path, changes: dict):
    """Masks and positions have the full sequence, while ranks hold padded parts of it between regions."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number}: some text\n" * (1 + number % 4))
    curves = []
    for name, degree in (("one", 1), ("four", 4)):
        config = tiny_job(
            tmp_path, name, training__packing="documents", training__seq_len=29, training__global_batch_size=4,
            training__steps=4, optimizer__lr=1e-3, **changes,
        )  # fmt: skip
        config.parallelism = ParallelismConfig(tensor_parallel_degree=degree)
        if degree == 1:
            with restored_process():
                _train(config)
        else:
            four.run(_train, config)
        curves.append(_curve(config))
    assert len(curves[0]) == 8
    assert curves[1] == pytest.approx(curves[0], rel=1e-5 if "optimizer__name" not in changes else 1e-4)
