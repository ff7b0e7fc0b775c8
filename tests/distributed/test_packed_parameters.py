"""Fused parameters and uneven shards through loading, full tensors, exports and checkpoints.

Real models whose parameters are replaced by DTensors made by hand (slices and concatenation, no code of the packages'),
on meshes of four processes with and without FSDP2. No forward runs here.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import load as load_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config, PreTrainedModel

from parallelize.tensor_parallel.packing import Packing, set_packing
from tests.distributed.workers import Messages, WorkerPool
from transformers_backend.checkpoint import Checkpointer
from transformers_backend.checkpoint.local import LocalStorage
from transformers_backend.decoder import describe_decoder
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import HFTransformerModelArgs, build_on_meta
from transformers_backend.optimizer import ShardedMuon
from transformers_backend.weights import allocate, init_buffers, init_weights, load_hf_weights, save_hf_weights

# Vocabularies that no degree divides: 9 rows over 4 ranks are 3, 3, 3 and none.
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=9, n_embd=16, n_head=4, n_layer=1, n_positions=8, bos_token_id=0, eos_token_id=1),
    "phi3": Phi3Config(
        vocab_size=13, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=None,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
# End of a parameter's name -> the dimension that is sharded and, of a fused parameter, its segments along it.
PLANS: dict[str, dict[str, tuple[int, tuple[int, ...] | None]]] = {
    "gpt2": {
        "wte.weight": (0, None),
        "c_attn.weight": (1, (16, 16, 16)),
        "c_attn.bias": (0, (16, 16, 16)),
        "attn.c_proj.weight": (0, None),
        "c_fc.weight": (1, None),
    },
    "phi3": {
        "embed_tokens.weight": (0, None),
        "qkv_proj.weight": (0, (16, 8, 8)),
        "o_proj.weight": (1, None),
        "gate_up_proj.weight": (0, (12, 12)),
        "lm_head.weight": (0, None),
    },
}
MESHES = {  # dp_replicate, dp_shard, tp
    "fsdp 2 x tp 2": (1, 2, 2),
    "replicas 2 x tp 2": (2, 1, 2),
    "tp 4": (1, 1, 4),
    "fsdp 4": (1, 4, 1),
    "plain": (1, 1, 1),
}


def _build(model_type: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[model_type])
    with torch.no_grad():
        for parameter in model.parameters():  # no two numbers alike, biases and norms included
            parameter.copy_(torch.rand(parameter.shape))
    return model


def _meta(model_type: str) -> PreTrainedModel:
    return build_on_meta(CONFIGS[model_type], type(_build(model_type)), HFTransformerModelArgs(model_type=model_type))


@functools.cache  # in every process of the pool: making groups takes most of a test's time
def _mesh(mesh_name: str) -> DeviceMesh:
    return init_device_mesh("cpu", MESHES[mesh_name], mesh_dim_names=("dp_replicate", "dp_shard", "tp"))


def _shard(model: PreTrainedModel, mesh_name: str) -> PreTrainedModel:
    """Make the parameters of `model` (real, or on the meta device) what a mesh's ranks hold."""
    replicate, shard, degree = MESHES[mesh_name]
    plan = PLANS[model.config.model_type]
    if mesh_name == "plain":
        return model
    mesh = _mesh(mesh_name)
    sharded: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for prefix, module in model.named_modules() if degree > 1 else ():
        for name, parameter in [*module._parameters.items()]:
            if parameter is None:
                continue
            ending = next((ending for ending in plan if f"{prefix}.{name}".endswith(ending)), None)
            if id(parameter) not in sharded:
                sharded[id(parameter)] = _shard_parameter(parameter, mesh["tp"], *plan.get(ending, (None, None)))
            module._parameters[name] = sharded[id(parameter)]
            if ending is not None and plan[ending][1] is not None:
                set_packing(module, name, Packing(*plan[ending], degree))
    if shard > 1 or replicate > 1:
        fully_shard(model, mesh=mesh["dp_shard"] if replicate == 1 else mesh["dp_replicate", "dp_shard"])
    return model


def _shard_parameter(
    parameter: nn.Parameter, mesh: DeviceMesh, dim: int | None, segments: tuple[int, ...] | None
) -> nn.Parameter:
    full = parameter.detach()
    if dim is None:
        return nn.Parameter(DTensor.from_local(full, mesh, [Replicate()]))
    rank, degree = mesh.get_local_rank(), mesh.size()
    size = -(-full.shape[dim] // degree)  # as torch cuts: every rank the same, the last ones what is left
    start, end = (min(first * size, full.shape[dim]) for first in (rank, rank + 1))
    local = full.narrow(dim, start, end - start)
    if segments is not None:
        parts = [segment.chunk(degree, dim)[rank] for segment in full.split(list(segments), dim)]
        local = torch.cat(parts, dim)
    local = local.clone(memory_format=torch.contiguous_format)  # torch cannot stage a DTensor of a view
    return nn.Parameter(DTensor.from_local(local, mesh, [Shard(dim)], shape=full.shape, stride=full.stride()))


def _locals(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
        for name, parameter in model.named_parameters()
    }


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert different == []


# -- weights --------------------------------------------------------------------------------------------------------


def _weights_in_and_out(model_type: str, mesh_name: str, folder: str, export: str) -> None:
    reference = _build(model_type)
    expected = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    by_hand = HFTransformerModel.wrap(_build(model_type))
    _shard(by_hand.hf_model, mesh_name)
    _assert_equal(by_hand.full_state_dict(), expected)
    for parameter in by_hand.hf_model.parameters():
        parameter.grad = parameter.detach() * 2
    _assert_equal(by_hand.full_gradients(), {name: 2 * p.detach() for name, p in reference.named_parameters()})

    loaded = HFTransformerModel.wrap(_meta(model_type))
    _shard(loaded.hf_model, mesh_name)
    allocate(loaded.hf_model, torch.device("cpu"), buffer_device=torch.device("cpu"))
    init_buffers(loaded.hf_model, _meta(model_type), device=torch.device("cpu"))
    load_hf_weights(loaded.hf_model, _meta(model_type), folder)
    _assert_equal(_locals(loaded.hf_model), _locals(by_hand.hf_model))
    blueprint = _meta(model_type)
    save_hf_weights(loaded.hf_model, blueprint, describe_decoder(blueprint), export)

    drawn = []
    for name in (mesh_name, "plain"):
        model = HFTransformerModel.wrap(_meta(model_type))
        _shard(model.hf_model, name)
        allocate(model.hf_model, torch.device("cpu"), buffer_device=torch.device("cpu"))
        init_weights(model.hf_model, _meta(model_type), model.decoder, device=torch.device("cpu"), seed=3)
        drawn.append(model.full_state_dict())
    _assert_equal(*drawn)


@pytest.mark.parametrize("mesh_name", ["fsdp 2 x tp 2", "replicas 2 x tp 2", "tp 4"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_loading_initialising_and_exporting(four: WorkerPool, tmp_path: Path, model_type: str, mesh_name: str):
    """Loaded shards are those made by hand; full tensors, drawn weights and exports those of one device."""
    reference = _build(model_type)
    reference.save_pretrained(tmp_path / "in")
    four.run(_weights_in_and_out, model_type, mesh_name, str(tmp_path / "in"), str(tmp_path / "out"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _assert_equal(exported.state_dict(), reference.state_dict())


# -- checkpoints ----------------------------------------------------------------------------------------------------

_CONFIG_TEXT = "[training]\nlocal_batch_size = 1\nglobal_batch_size = 4\n"


class _NoData:
    """Stands for the batches of a run: a position that is always the same."""

    def state_dict(self) -> dict[str, int]:
        return {"position": 0}

    def load_state_dict(self, positions: list[dict[str, int]]) -> None:
        assert positions == [{"position": 0}]


class _Run:
    """A model on a mesh, AdamW and a checkpointer, and steps whose gradients follow from the parameters."""

    def __init__(self, model_type: str, mesh_name: str, folder: str, *, seed: int = 0, mode: str = "disabled") -> None:
        self.model = HFTransformerModel.wrap(_build(model_type, seed))
        self.parameters = dict(_shard(self.model.hf_model, mesh_name).named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.01, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.checkpointer = Checkpointer(
            LocalStorage(Path(folder)), model=self.model, optimizers=[self.optimizer], schedulers=[scheduler],
            data=_NoData(), data_rank=0, config_text=_CONFIG_TEXT, async_mode=mode,
        )  # fmt: skip

    def step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = parameter.detach() * 3 - 1
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Full weights and AdamW's means, in Transformers' order."""
        state = self.model.full_state_dict()
        for kind in ("exp_avg", "exp_avg_sq"):
            for parameter in self.parameters.values():
                parameter.grad = self.optimizer.state[parameter][kind]
            state |= {f"{name} {kind}": value for name, value in self.model.full_gradients().items()}
        return state

    def close(self) -> None:
        self.checkpointer.close(timeout_seconds=60)


def _save(model_type: str, mesh_name: str, folder: str, mode: str) -> dict[str, torch.Tensor]:
    run = _Run(model_type, mesh_name, folder, mode=mode)
    for step in (1, 2):
        run.step()
        state = run.state()
        run.checkpointer.save(step)
        run.checkpointer.wait_until_staged()
    run.step()  # what is being written is what was, beside training too
    run.checkpointer.wait()
    run.close()
    return state


def _resume(
    model_type: str, mesh_name: str, folder: str
) -> tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Step and state of another model after loading, and its state after one more step."""
    run = _Run(model_type, mesh_name, folder, seed=1)
    step = run.checkpointer.load(-1)
    loaded = run.state()
    run.step()
    following = run.state()
    run.close()
    return step, loaded, following


def _reference(model_type: str, steps: int) -> dict[str, torch.Tensor]:
    """The same steps on one device, without any of this."""
    model = _build(model_type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 3 - 1
        optimizer.step()
    state = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        state |= {f"{name} {kind}": optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq")}
    return state


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize(
    ("model_type", "saved_on", "mode", "resumed_on"),
    [
        ("gpt2", "fsdp 2 x tp 2", "disabled", ["tp 4", "plain", "fsdp 4"]),
        ("phi3", "fsdp 2 x tp 2", "async", ["fsdp 2 x tp 2", "tp 4", "plain"]),
        ("gpt2", "tp 4", "async", ["fsdp 2 x tp 2", "replicas 2 x tp 2"]),
        ("phi3", "replicas 2 x tp 2", "async", ["tp 4"]),
        ("phi3", "plain", "disabled", ["fsdp 2 x tp 2", "tp 4"]),
    ],
)
def test_any_degree_resumes_from_any_other(
    four: WorkerPool, tmp_path: Path, model_type: str, saved_on: str, mode: str, resumed_on: list[str]
):
    """Weights and AdamW's means, bit by bit, and the step after them; on disk are plain tensors of Transformers'."""
    folder = str(tmp_path / "checkpoint")
    expected = four.run(_save, model_type, saved_on, folder, mode)[0]
    after_two, after_three = _reference(model_type, 2), _reference(model_type, 3)
    torch.testing.assert_close(expected, after_two, rtol=1e-6, atol=1e-8)
    weights = {name: torch.zeros_like(parameter) for name, parameter in _build(model_type).named_parameters()}
    load_checkpoint({"model": weights}, checkpoint_id=f"{folder}/step-2", no_dist=True)
    _assert_equal(weights, {name: expected[name] for name in weights})
    for mesh_name in resumed_on:
        for step, loaded, following in four.run(_resume, model_type, mesh_name, folder):
            assert step == 2
            _assert_equal(loaded, expected)
            torch.testing.assert_close(following, after_three, rtol=1e-6, atol=1e-8)


def _resume_weights_only(model_type: str, mesh_name: str, folder: str) -> tuple[dict[str, torch.Tensor], bool]:
    run = _Run(model_type, mesh_name, folder, seed=1)
    run.checkpointer.load(-1, exclude={"optimizer"})
    run.close()
    return run.model.full_state_dict(), bool(run.optimizer.state)


def _resume_from_damaged(model_type: str, mesh_name: str, folder: str) -> tuple[int | None, list[str]]:
    run = _Run(model_type, mesh_name, folder, seed=1)
    with Messages("transformers_backend") as messages:
        step = run.checkpointer.load(-1)
    run.close()
    return step, messages.texts


def test_a_part_of_a_checkpoint_and_a_damaged_one(four: WorkerPool, tmp_path: Path):
    """Without the optimizer its state stays empty; a file that is zeros sends every rank to the step before."""
    folder = tmp_path / "checkpoint"
    expected = four.run(_save, "phi3", "fsdp 2 x tp 2", str(folder), "disabled")[0]
    for weights, has_state in four.run(_resume_weights_only, "phi3", "tp 4", str(folder)):
        _assert_equal(weights, {name: expected[name] for name in weights})
        assert not has_state
    file = folder / "step-2" / "__3_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    for step, messages in four.run(_resume_from_damaged, "phi3", "tp 4", str(folder)):
        assert step == 1
        assert any("step-2/__3_0.distcp" in message and "damaged" in message for message in messages), messages


# -- Muon -----------------------------------------------------------------------------------------------------------


def _muon_step(model_type: str, mesh_name: str) -> dict[str, torch.Tensor]:
    model = HFTransformerModel.wrap(_build(model_type))
    matrices = [parameter for parameter in _shard(model.hf_model, mesh_name).parameters() if parameter.dim() == 2]
    for parameter in matrices:
        parameter.grad = parameter.detach() - 0.5
    ShardedMuon(matrices, lr=1.0, weight_decay=0.0).step()
    return model.full_state_dict()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_muon_needs_no_translation(four: WorkerPool, model_type: str):
    """Updates have singular values near 1; their entries differ by bf16's rounding alone, in sums of another order."""
    expected = _muon_step(model_type, "plain")
    for found in four.run(_muon_step, model_type, "fsdp 2 x tp 2"):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
