"""The memory estimate against what autograd keeps and what a step allocates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim import AdamW, Muon
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from parallelize.costs import LayerWidths, MemoryEstimate, activation_bytes_per_token
from tests.jobs import restored_process, tiny_job
from transformers_backend import Trainer
from transformers_backend.decoder import describe_decoder
from transformers_backend.memory import estimate_memory, layer_widths
from transformers_backend.run_summary import estimate_run_memory

SEQ_LEN = 128
_GATED = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 384, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_FOUR_WIDE = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 128, "vocab_size": 384}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
MODELS = {
    "llama": _GATED,
    "qwen3": {**_GATED, "head_dim": 32},
    "olmo2": _GATED,
    "phi3": _GATED,
    "gemma2": {**_GATED, "head_dim": 32},
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 384, **_TOKENS},
    "gpt_neox": {**_FOUR_WIDE, "intermediate_size": 512, **_TOKENS},
    "opt": {**_FOUR_WIDE, "ffn_dim": 512, "word_embed_proj_dim": 128, "dropout": 0.0, **_TOKENS},
}


def _build(model_type: str, attention: str | None = None, dtype: torch.dtype = torch.float32):
    config = CONFIG_MAPPING[model_type](**MODELS[model_type])
    for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):  # masks of dropout are left out of the formula
        if key in config.to_dict():
            setattr(config, key, 0.0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).train()


def _kept_bytes(hf_model, body: torch.nn.Module, input_ids: torch.Tensor) -> int:
    """Bytes of all storages that autograd keeps for the backward of `body`, without the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*hf_model.parameters(), *hf_model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # holds on to them, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        body(input_ids=input_ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model_type", "attention", "lowest", "highest"),
    [
        # estimate / measured. Close where a layer is what Llama's is, else within a factor of two.
        ("llama", "sdpa", 0.9, 1.1),
        ("llama", "eager", 0.9, 1.1),
        ("qwen3", "sdpa", 0.85, 1.1),
        ("olmo2", "sdpa", 0.75, 1.1),
        ("phi3", "sdpa", 0.7, 1.1),
        ("gemma2", "eager", 0.7, 1.1),
        ("gpt_neox", "sdpa", 0.9, 1.2),
        ("gpt2", "sdpa", 0.5, 1.1),
        ("opt", "sdpa", 0.9, 2.0),
    ],
)
def test_activations_are_what_autograd_keeps(model_type, attention, lowest, highest, dtype):
    hf_model = _build(model_type, attention, dtype)
    decoder = describe_decoder(hf_model)
    input_ids = torch.randint(0, 384, (2, SEQ_LEN))
    measured = _kept_bytes(hf_model, hf_model.get_submodule(decoder.base), input_ids)
    per_token = activation_bytes_per_token(
        layer_widths(hf_model, decoder), itemsize=dtype.itemsize, seq_len=SEQ_LEN, recompute="none"
    )
    assert lowest < input_ids.numel() * per_token.together / measured < highest


def test_widths_of_queries_that_are_normalised_a_head():
    """Qwen3's norm of queries has the 32 weights of one head and normalises all 4 heads; that of keys 2."""
    hf_model = _build("qwen3", "sdpa")
    (first, *_) = layer_widths(hf_model, describe_decoder(hf_model))
    assert sorted(first.norms) == [64, 128, 128, 128]
    assert first.score_heads == 0


def test_activations_by_hand():
    # Matrices (3, 2) and (2, 3): inputs and outputs are 10 numbers of 2 bytes; a norm over 2 in fp32: 8 bytes.
    layer = LayerWidths(hidden=2, matrices=((3, 2), (2, 3)), norms=(2,), score_heads=0)

    def estimate(recompute: str, score_heads: int = 0) -> float:
        layers = [LayerWidths(layer.hidden, layer.matrices, layer.norms, score_heads)] * 3
        return activation_bytes_per_token(layers, itemsize=2, seq_len=5, recompute=recompute).together

    assert estimate("none") == 3 * 28
    assert estimate("none", score_heads=2) == 3 * (28 + 2 * 5 * (4 + 2))
    assert estimate("full") == 3 * 4 + 28, "the input of every layer, and one whole layer"
    assert estimate("2") == 4 + 28 + 4 + 28, "the second layer is not recomputed"
    assert estimate("op") == 3 * (2 * (4 + 3)) + 28


def test_the_peak_has_the_larger_of_what_takes_turns():
    parts = {"parameters": 1, "optimizer": 2, "working": 4, "activations": 100, "logits": 10}
    assert MemoryEstimate(**parts, gradients=50, accumulates=False).peak == 7 + 110
    assert MemoryEstimate(**parts, gradients=500, accumulates=False).peak == 7 + 500
    assert MemoryEstimate(**parts, gradients=50, accumulates=True).peak == 7 + 160
    assert MemoryEstimate(**parts, gradients=500, accumulates=True, offloaded=True).peak == 4 + 110


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_peak_is_what_a_step_allocates(tmp_path: Path, recompute: str):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text of a few tokens. " * 200)
    config = tiny_job(tmp_path, "run", training__seq_len=SEQ_LEN, activation_checkpoint__mode=recompute)
    config.hf_transformers.config_overrides |= {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3}
    with restored_process(), contextlib.closing(Trainer(config)) as trainer:
        trainer.train_step()  # which makes the optimizer's state
        tracker = MemTracker()
        tracker.track_external(trainer.model.hf_model, *trainer.optimizers)
        with tracker:
            trainer.train_step()
        measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        estimate = estimate_run_memory(
            config, trainer.model, optimizers=trainer.optimizers, computes_in=torch.float32, accumulates=False
        )
    assert estimate.peak == pytest.approx(measured, rel=0.15)


def test_state_gradients_and_casts_by_hand():
    hf_model = _build("llama", "sdpa")
    decoder = describe_decoder(hf_model)
    for parameter in hf_model.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    total, frozen = sum(p.numel() for p in hf_model.parameters()), 384 * 128
    matrices = [p for p in hf_model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in hf_model.parameters() if p.requires_grad and all(p is not matrix for matrix in matrices)]
    options = {
        "computes_in": torch.bfloat16, "is_sharded": False, "reshards": True, "recompute": "none", "batch_size": 2,
        "seq_len": SEQ_LEN, "loss_is_chunked": True, "accumulates": True, "offloaded": False,
        "device_type": "cpu",
    }  # fmt: skip
    estimate = estimate_memory(hf_model, decoder, optimizers=[Muon(matrices), AdamW(others)], **options)
    assert (estimate.parameters, estimate.gradients) == (4 * total, 4 * (total - frozen))
    in_matrices = sum(p.numel() for p in matrices)
    assert estimate.optimizer == 4 * in_matrices + 8 * (total - frozen - in_matrices)
    assert estimate.working == 2 * total, "a bf16 copy of everything"
    assert estimate.logits == 2 * SEQ_LEN * 384 * (2 + 8)
    sharded = estimate_memory(hf_model, decoder, optimizers=[], **(options | {"is_sharded": True}))
    layer = sum(p.numel() for p in hf_model.model.layers[0].parameters())
    root = 384 * 128 + 128  # the head and the final norm; the embedding is a unit of its own
    assert sharded.working == 2 * (root + 2 * layer) + (2 + 4) * layer


# --- stages of a pipeline


def test_a_rank_of_a_pipeline_keeps_several_micro_batches_of_its_layers():
    hf_model = _build("llama", "sdpa")
    decoder = describe_decoder(hf_model)
    options = {
        "optimizers": [], "computes_in": torch.bfloat16, "is_sharded": False, "reshards": False, "recompute": "none",
        "batch_size": 1, "seq_len": SEQ_LEN, "loss_is_chunked": True, "accumulates": True, "offloaded": False,
        "device_type": "cpu",
    }  # fmt: skip
    whole = estimate_memory(hf_model, decoder, **options)
    first, middle, last = decoder.layers
    options |= {"stages": [[first], [middle]], "most_at_once": lambda sizes: 4 * sizes[0] + 2 * sizes[1]}
    estimate = estimate_memory(hf_model, decoder, **options)
    assert estimate.activations == pytest.approx((4 + 2) / 3 * whole.activations)
    assert estimate.logits == 0, "of the last stage only"
    recomputing = estimate_memory(hf_model, decoder, **(options | {"recompute": "full"}))
    inputs = SEQ_LEN * 2 * 128  # bytes of what enters a layer
    assert recomputing.activations == pytest.approx(6 * inputs + whole.activations / 3), "one layer at a time is whole"
    with_last = estimate_memory(hf_model, decoder, **(options | {"stages": [[last]], "most_at_once": sum}))
    assert with_last.logits == whole.logits
    # Sharded, all layers stay gathered in bf16, and their gradients add up in fp32; the embedding may be elsewhere.
    options |= {"is_sharded": True}
    held = sum(p.numel() for p in hf_model.parameters()) - 384 * 128
    layer = sum(p.numel() for p in hf_model.model.layers[0].parameters())
    hf_model.model.embed_tokens._parameters.clear()
    hf_model.model.embed_tokens.weight = torch.zeros(()).expand(384, 128)
    sharded = estimate_memory(hf_model, decoder, **(options | {"stages": [decoder.layers], "most_at_once": sum}))
    assert sharded.working == 2 * held + 4 * held + (2 + 4) * layer


# --- tensor parallelism


@pytest.fixture
def tensor_parallel() -> Iterator[DeviceMesh]:
    """A mesh (dp_shard 2, tp 2) of four ranks, of which only this one is there."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    torch.distributed.destroy_process_group()


def _split(hf_model, mesh: DeviceMesh) -> None:
    """As a plan of tensor parallelism lays a Llama out."""
    dimensions = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1,
                  "embed_tokens": 0, "lm_head": 0}  # fmt: skip
    for name, module in hf_model.named_modules():
        dimension = dimensions.get(name.rpartition(".")[2])
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = Replicate() if dimension is None else Shard(dimension)
            value = distribute_tensor(parameter.detach(), mesh["tp"], [placement], src_data_rank=None)
            setattr(module, key, torch.nn.Parameter(value))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("is_sharded", [False, True], ids=["tp", "fsdp and tp"])
def test_widths_of_a_tensor_parallel_rank(tensor_parallel: DeviceMesh, sequence_parallel: bool, is_sharded: bool):
    hf_model = _build("qwen3", "eager")
    decoder = describe_decoder(hf_model)
    _split(hf_model, tensor_parallel)
    if is_sharded:
        for layer in hf_model.model.layers:
            fully_shard(layer, mesh=tensor_parallel["dp_shard"])
    (first, *_) = layer_widths(hf_model, decoder, sequence_parallel)
    between = 64 if sequence_parallel else 128
    assert first.hidden == between
    assert first.matrices == (
        # q, k, v (128, 64 and 64 outputs): the input of 128 is kept whole once; o gives back what is between regions.
        (64, 128), (32, 64), (32, 64), (between, 64),
        (176, 128), (176, 64), (between, 176),
    )  # fmt: skip
    assert sorted(first.norms) == sorted([between, between, 64, 32]), "norms of queries and keys are of local heads"
    assert first.score_heads == 2


@pytest.mark.parametrize("is_sharded", [False, True], ids=["tp", "fsdp and tp"])
def test_parts_of_a_tensor_parallel_rank(tensor_parallel: DeviceMesh, is_sharded: bool):
    hf_model = _build("llama", "sdpa")
    decoder = describe_decoder(hf_model)
    norms = 7 * 128
    layer = (sum(p.numel() for p in hf_model.model.layers[0].parameters()) - 2 * 128) // 2 + 2 * 128
    total, table = (sum(p.numel() for p in hf_model.parameters()) - norms) // 2 + norms, 192 * 128
    _split(hf_model, tensor_parallel)
    if is_sharded:
        for unit in [*hf_model.model.layers, hf_model.model.embed_tokens, hf_model]:
            fully_shard(unit, mesh=tensor_parallel["dp_shard"])
    estimate = estimate_memory(
        hf_model, decoder, optimizers=[AdamW(hf_model.parameters())], computes_in=torch.bfloat16,
        is_sharded=is_sharded, reshards=True, recompute="none", batch_size=2, seq_len=SEQ_LEN, loss_is_chunked=True,
        accumulates=True, offloaded=False, device_type="cpu", sequence_parallel=True,
    )  # fmt: skip
    kept = total // 2 if is_sharded else total
    assert (estimate.parameters, estimate.gradients, estimate.optimizer) == (4 * kept, 4 * kept, 8 * kept)
    gathered = 2 * (table + 128 + 2 * layer) + (2 + 4) * layer
    assert estimate.working == (gathered if is_sharded else 2 * total)
    assert estimate.logits == 2 * SEQ_LEN * 192 * (2 + 8), "of half the vocabulary"
