"""The wrapper on one device: it changes nothing before it trains, and trains as plain Transformers would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from parallelize.config import CompileConfig, ParallelismConfig
from parallelize.distributed import initialize, shutdown
from parallelize.parallel_dims import ParallelDims
from transformers_backend.model import HFTransformerModel, HFTransformerModelArgs
from transformers_backend.twin import build_twin

LLAMA = LlamaConfig(
    vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def _llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LLAMA)


def _batch(rows: int = 4, seq: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(0, 120, (rows, seq), generator=generator)
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : 2 * row + 1] = -100
    return input_ids, labels


def _plain_step(model: PreTrainedModel, input_ids, labels, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model.train()(input_ids=input_ids, labels=labels, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_gradients(model: HFTransformerModel, expected: dict[str, torch.Tensor]) -> None:
    gradients = model.full_gradients()
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_wrap_changes_nothing(training: bool):
    hf_model = _llama().train(training)
    reference = _llama().train(training)
    hf_model.model.layers[0].requires_grad_(False)
    forward, config = hf_model.forward, hf_model.config.to_dict()
    names = [name for name, _ in hf_model.named_modules()]
    model = HFTransformerModel.wrap(hf_model)
    assert model.hf_model is hf_model
    assert (hf_model.forward, hf_model.training) == (forward, training)
    assert "forward" not in hf_model.__dict__
    assert [name for name, _ in hf_model.named_modules()] == names
    assert hf_model.config.to_dict() == config
    assert not any(p.requires_grad for p in hf_model.model.layers[0].parameters())
    state = hf_model.state_dict()
    assert state.keys() == reference.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in reference.state_dict().items())
    input_ids, labels = _batch()
    mine, theirs = (m(input_ids=input_ids, labels=labels) for m in (hf_model, reference))
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.loss, theirs.loss)


def test_a_step_is_plain_transformers_and_names_are_its_own():
    input_ids, labels = _batch()
    expected_loss, expected = _plain_step(_llama(), input_ids, labels)
    model = HFTransformerModel.wrap(_llama())
    loss = model.forward_backward(input_ids, labels)
    assert (loss.shape, loss.dtype, loss.requires_grad) == (torch.Size([]), torch.float32, False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    _assert_gradients(model, expected)
    state = model.full_state_dict()
    assert state.keys() == _llama().state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in _llama().state_dict().items())
    assert (model.data_rank, model.dims.data_parallel_size, model.vocabulary_size) == (0, 1, 120)


def test_full_tensors_are_copies():
    model = HFTransformerModel.wrap(_llama())
    model.forward_backward(*_batch())
    for tensors in (model.full_state_dict(), model.full_gradients()):
        for tensor in tensors.values():
            tensor.fill_(123.0)
    assert not any((tensor == 123.0).all() for tensor in model.full_state_dict().values())
    assert not any((tensor == 123.0).all() for tensor in model.full_gradients().values())


def test_outputs_after_training_has_begun_are_still_transformers():
    model, reference = HFTransformerModel.wrap(_llama()), _llama()
    input_ids, labels = _batch()
    model.forward_backward(input_ids, labels)
    assert torch.equal(model.hf_model(input_ids=input_ids).logits, reference(input_ids=input_ids).logits)


def test_accumulated_micro_batches_are_one_batch():
    """Micro-batches with different numbers of targets, one of them with none."""
    input_ids, labels = _batch()
    labels[3] = -100
    expected_loss, expected = _plain_step(_llama(), input_ids, labels)
    model = HFTransformerModel.wrap(_llama())
    total = model.count_targets(labels)
    assert total.item() == (labels[:, 1:] != -100).sum().item()
    losses = [
        model.forward_backward(input_ids[row : row + 1], labels[row : row + 1], num_items_in_batch=total)
        for row in range(4)
    ]
    assert losses[3].item() == 0.0
    torch.testing.assert_close(sum(losses), expected_loss, rtol=1e-6, atol=0)
    _assert_gradients(model, expected)


def test_num_items_in_batch_may_be_a_plain_number():
    input_ids, labels = _batch()
    model = HFTransformerModel.wrap(_llama())
    plain = _llama().train()
    expected = plain(input_ids=input_ids, labels=labels, num_items_in_batch=17).loss
    torch.testing.assert_close(
        model.forward_backward(input_ids, labels, num_items_in_batch=17), expected.detach(), rtol=1e-6, atol=0
    )


def test_gradients_add_up_over_calls():
    input_ids, labels = _batch()
    model = HFTransformerModel.wrap(_llama())
    model.forward_backward(input_ids, labels)
    once = model.full_gradients()
    model.forward_backward(input_ids, labels)
    for name, gradient in model.full_gradients().items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_position_ids_are_honoured(model_type: str):
    config = CONFIG_MAPPING[model_type]()
    build = [build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]) for _ in range(2)]
    input_ids, labels = _batch()
    # Uneven steps: rotary embeddings see differences of positions only.
    position_ids = torch.arange(12).square().div(4, rounding_mode="floor").expand(4, -1)
    expected_loss, expected = _plain_step(build[0], input_ids, labels, position_ids=position_ids)
    assert abs(expected_loss - build[0](input_ids=input_ids, labels=labels).loss) > 1e-5, "they matter"
    model = HFTransformerModel.wrap(build[1])
    loss = model.forward_backward(input_ids, labels, position_ids=position_ids)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    _assert_gradients(model, expected)


def test_position_ids_are_refused_where_there_is_no_place_for_them():
    config = CONFIG_MAPPING["bloom"]()
    model = HFTransformerModel.wrap(build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]))
    input_ids, labels = _batch()
    with pytest.raises(ValueError, match="position_ids: BloomForCausalLM has no notion of them") as caught:
        model.forward_backward(input_ids, labels, position_ids=torch.arange(12).expand(4, -1))
    assert "Leave them out" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda ids, labels: (ids, labels[:, :-1]), r"labels has shape \(4, 11\): .* input_ids is \(4, 12\)"),
        (lambda ids, labels: (ids, labels[:2]), r"labels has shape \(2, 12\): .* input_ids is \(4, 12\)"),
        (lambda ids, labels: (ids[0], labels[0]), r"input_ids has shape \(12,\): .* must all be \(batch, seq\)"),
    ],
)
def test_shapes_are_checked(change, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        HFTransformerModel.wrap(_llama()).forward_backward(*change(*_batch()), num_items_in_batch=5)


def test_shapes_are_checked_before_anything_is_counted():
    input_ids, labels = _batch()
    with pytest.raises(ValueError, match="input_ids has shape"):
        HFTransformerModel.wrap(_llama()).forward_backward(input_ids[0], labels[0])


def test_position_ids_of_another_shape():
    input_ids, labels = _batch()
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 12\)"):
        HFTransformerModel.wrap(_llama()).forward_backward(input_ids, labels, position_ids=torch.arange(12)[None])


def _gpt2(dropout: float) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=120, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout,
    ))  # fmt: skip


def test_a_model_in_evaluation_mode_is_trained_in_training_mode(tmp_path: Path):
    _gpt2(0.3).save_pretrained(tmp_path / "gpt2")
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert not hf_model.training
    model = HFTransformerModel.wrap(hf_model)
    assert not hf_model.training, "wrap changes nothing"
    input_ids, labels = _batch()
    reference = _gpt2(0.3).train()
    torch.manual_seed(9)
    expected_loss, expected = _plain_step(reference, input_ids, labels)
    model.forward_backward(input_ids, labels)  # the proof, once, before the random numbers are compared
    hf_model.zero_grad()
    torch.manual_seed(9)
    loss = model.forward_backward(input_ids, labels)
    assert hf_model.training
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    _assert_gradients(model, expected)
    without_dropout = model.evaluate(input_ids, labels)
    assert abs(without_dropout[0] / without_dropout[1] - expected_loss) > 1e-3, "dropout is really drawn"


def test_the_first_step_draws_the_same_dropout_as_plain_transformers():
    """The proof runs twins, and takes nothing from the run's random numbers."""
    input_ids, labels = _batch()
    plain = _gpt2(0.3)
    torch.manual_seed(9)
    expected_loss, _ = _plain_step(plain, input_ids, labels)
    model = HFTransformerModel.wrap(_gpt2(0.3))  # which seeds while it builds
    torch.manual_seed(9)
    torch.testing.assert_close(model.forward_backward(input_ids, labels), expected_loss, rtol=1e-6, atol=0)


def test_evaluate():
    input_ids, labels = _batch()
    hf_model = _gpt2(0.5)
    with torch.no_grad():
        expected = hf_model.eval()(input_ids=input_ids, labels=labels).loss
    model = HFTransformerModel.wrap(hf_model)
    loss, targets = model.evaluate(input_ids, labels)
    assert targets.item() == (labels[:, 1:] != -100).sum().item()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss / targets, expected, rtol=1e-6, atol=0)
    assert not hf_model.training, "the mode that it was in"
    assert model.full_gradients() == {}
    nothing, none = model.evaluate(input_ids, torch.full_like(labels, -100))
    assert (nothing.item(), none.item()) == (0.0, 0)


def test_evaluate_leaves_training_mode_behind_also_after_an_error():
    model = HFTransformerModel.wrap(_gpt2(0.5))
    input_ids, labels = _batch()
    model.forward_backward(input_ids, labels)
    with pytest.raises(ValueError, match="labels has shape"):
        model.evaluate(input_ids, labels[:1])
    assert model.hf_model.training, "else the next step silently trains without dropout"


def test_parts_that_the_user_froze_in_evaluation_mode_stay_so():
    hf_model = _gpt2(0.5).train()
    hf_model.transformer.h[0].eval()
    model = HFTransformerModel.wrap(hf_model)
    model.forward_backward(*_batch())
    assert not hf_model.transformer.h[0].training
    model.evaluate(*_batch())
    assert not hf_model.transformer.h[0].training


def test_looking_at_a_model_does_not_change_it():
    hf_model = _llama().eval()
    model = HFTransformerModel.wrap(hf_model)
    model.full_state_dict()
    assert not hf_model.training


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_a_batch_of_nothing_is_refused_with_what_to_do(shape: tuple[int, int]):
    model, nothing = HFTransformerModel.wrap(_llama()), torch.zeros(shape, dtype=torch.long)
    for call in (model.forward_backward, model.evaluate):
        with pytest.raises(ValueError, match=r"input_ids has shape \(\d, \d\): .* a sequence with all labels -100"):
            call(nothing, nothing)
    input_ids, labels = _batch()
    model.evaluate(input_ids, torch.full_like(labels, -100))


def test_clip_grad_norm():
    input_ids, labels = _batch()
    reference, hf_model = _llama(), _llama()
    _plain_step(reference, input_ids, labels)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    model = HFTransformerModel.wrap(hf_model)
    assert model.clip_grad_norm_(1.0).item() == 0.0, "no gradients yet"
    model.forward_backward(input_ids, labels)
    torch.testing.assert_close(model.clip_grad_norm_(0.1), expected, rtol=1e-5, atol=0)
    _assert_gradients(model, {name: p.grad for name, p in reference.named_parameters()})


def test_frozen_parameters_get_no_gradient():
    hf_model = _llama()
    hf_model.model.requires_grad_(False)
    model = HFTransformerModel.wrap(hf_model)
    model.forward_backward(*_batch())
    assert set(model.full_gradients()) == {"lm_head.weight"}


def test_from_pretrained_loads_with_the_first_step(tmp_path: Path):
    _llama(5).save_pretrained(tmp_path / "llama")
    model = HFTransformerModel.from_pretrained(str(tmp_path / "llama"))
    assert all(parameter.is_meta for parameter in model.hf_model.parameters())
    input_ids, labels = _batch()
    expected_loss, expected = _plain_step(_llama(5), input_ids, labels)
    loss = model.forward_backward(input_ids, labels)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    _assert_gradients(model, expected)


def test_from_pretrained_takes_further_arguments(tmp_path: Path):
    _llama(5).save_pretrained(tmp_path / "llama")
    model = HFTransformerModel.from_pretrained(
        str(tmp_path / "llama"), dtype=torch.bfloat16, config_overrides={"attention_dropout": 0.25}
    )
    assert model.hf_model.config.attention_dropout == 0.25
    assert {tensor.dtype for tensor in model.full_state_dict().values()} == {torch.bfloat16}


def test_from_scratch_without_a_process_group():
    overrides = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "intermediate_size": 48}  # fmt: skip
    model = HFTransformerModel(HFTransformerModelArgs(model_type="llama", config_overrides=overrides))
    loss = model.forward_backward(*_batch())
    assert abs(loss.item() - torch.tensor(120.0).log().item()) < 0.2, "untrained: about log(vocabulary)"


def test_an_encoder_is_refused_when_it_would_train():
    config = BertConfig(
        vocab_size=120, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = HFTransformerModel.wrap(BertLMHeadModel(config))
    with pytest.raises(ValueError, match="BertLMHeadModel: predictions depend on later tokens"):
        model.forward_backward(*_batch())
    with pytest.raises(ValueError, match="BertLMHeadModel: predictions depend on later tokens"):
        model.forward_backward(*_batch())  # and the refusal stays


def test_parallelize_needs_a_process_group_and_sound_values():
    model = HFTransformerModel.wrap(_llama())
    with pytest.raises(ValueError, match="needs an initialised process group"):
        model.parallelize(ParallelismConfig())
    with pytest.raises(ValueError, match="context_parallel_degree = 0"):
        model.parallelize(ParallelismConfig(context_parallel_degree=0))
    assert torch.isfinite(model.forward_backward(*_batch())), "a refused parallelize leaves the model as it was"


def test_find_nonfinite_names_parameters():
    hf_model = _llama()
    model = HFTransformerModel.wrap(hf_model)
    model.forward_backward(*_batch())
    assert model.find_nonfinite() == "Finite loss on every rank; non-finite gradients of no parameter."
    hf_model.lm_head.weight.grad[0, 0] = float("nan")
    assert "non-finite gradients of lm_head.weight." in model.find_nonfinite()
    with torch.no_grad():
        hf_model.model.norm.weight[0] = float("inf")
    model.forward_backward(*_batch())
    assert model.find_nonfinite().startswith("Non-finite loss on rank 0; non-finite gradients of ")
    assert " more." in model.find_nonfinite()


def test_find_nonfinite_looks_at_every_micro_batch():
    """A sequence that overflows in the first micro-batch of a step, and a sound second one."""
    hf_model = _llama()
    with torch.no_grad():
        hf_model.model.embed_tokens.weight[7] = float("nan")
    model = HFTransformerModel.wrap(hf_model)
    input_ids, labels = _batch()
    input_ids = torch.where(input_ids == 7, 8, input_ids)
    bad = input_ids.clone()
    bad[0, 3] = 7
    losses = [model.forward_backward(ids, labels, num_items_in_batch=60) for ids in (bad, input_ids)]
    assert [bool(loss.isfinite()) for loss in losses] == [False, True]
    assert model.find_nonfinite().startswith("Non-finite loss on rank 0;")


def test_the_generation_config_comes_along(tmp_path):
    hf_model = _llama()
    hf_model.generation_config.max_new_tokens = 77
    hf_model.generation_config.eos_token_id = [2, 3]
    HFTransformerModel.wrap(hf_model).save_pretrained(tmp_path / "wrapped")
    HFTransformerModel.from_pretrained(str(tmp_path / "wrapped")).save_pretrained(tmp_path / "loaded")
    for folder in ("wrapped", "loaded"):
        saved = GenerationConfig.from_pretrained(tmp_path / folder)
        assert (saved.max_new_tokens, saved.eos_token_id) == (77, [2, 3])


def test_an_attention_implementation_that_is_not_installed_is_refused_in_words():
    with pytest.raises(ValueError, match=r'attn_implementation = "flash_attention_2": it is not installed'):
        HFTransformerModel(HFTransformerModelArgs(model_type="llama", attn_implementation="flash_attention_2"))


# -- what cannot be wrapped -----------------------------------------------------------------------------------------


def _prepared() -> LlamaForCausalLM:
    """What `Accelerator(mixed_precision="bf16").prepare` leaves on a model of one process."""
    hf_model = _llama()
    hf_model._original_forward = hf_model.forward
    return hf_model


def _spread() -> LlamaForCausalLM:
    hf_model = _llama()
    hf_model.lm_head.to("meta")  # as a device_map with offloading does
    return hf_model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torch.nn.Sequential(_llama()), "Sequential: not a Transformers model .* before accelerator.prepare, "),
        (_prepared, "LlamaForCausalLM: already prepared by accelerate, or sharded. .* arguments of .parallelize."),
        (_spread, r"its parameters lie on several devices \(cpu, meta\); .* Load the model without device_map"),
    ],
)
def test_an_altered_model_is_refused(build, message: str):
    with pytest.raises(ValueError, match=message):
        HFTransformerModel.wrap(build())


def test_a_sharded_model_is_refused():
    hf_model = _llama()
    initialize(torch.device("cpu"), timeout_seconds=60)
    try:
        fully_shard(hf_model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="already prepared by accelerate, or sharded"):
            HFTransformerModel.wrap(hf_model)
    finally:
        shutdown()


# --- tensor parallelism


@pytest.fixture
def rank_five_of_eight() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("rank_five_of_eight")
@pytest.mark.parametrize(
    ("replicate", "shard", "tensor", "data_rank"),
    [(1, 8, 1, 5), (2, 2, 2, 2), (1, 4, 2, 2), (2, 1, 4, 1), (1, 1, 8, 0)],
)
def test_data_ranks_do_not_count_tensor_parallel_ones(replicate: int, shard: int, tensor: int, data_rank: int):
    model = HFTransformerModel.wrap(_llama())
    config = ParallelismConfig(
        data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard, tensor_parallel_degree=tensor
    )
    model.dims = ParallelDims.resolve(config, 8)
    model.mesh = model.dims.build_mesh("cpu")
    assert (model.data_rank, model.dims.data_parallel_size) == (data_rank, 8 // tensor)


@pytest.mark.usefixtures("rank_five_of_eight")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is what this refuses to be without")
def test_asynchronous_tensor_parallelism_is_refused_without_cuda():
    parallelism = ParallelismConfig(tensor_parallel_degree=2, enable_async_tensor_parallel=True)
    with pytest.raises(ValueError, match=r"enable_async_tensor_parallel = true: needs CUDA devices .* is on cpu\. Do"):
        HFTransformerModel.wrap(_llama()).parallelize(parallelism, compile=CompileConfig(enable=True))


@pytest.mark.usefixtures("rank_five_of_eight")
def test_what_is_refused_once_the_mesh_is_known_leaves_a_model_for_one_device():
    model = HFTransformerModel.wrap(_llama())
    with pytest.raises(ValueError, match=r"pipeline_parallel_degree = 4.* 2 layers"):
        model.parallelize(ParallelismConfig(pipeline_parallel_degree=4))
    assert (model.mesh, model.dims.world_size, model.data_rank) == (None, 1, 0)
    assert torch.isfinite(model.forward_backward(*_batch()))
