"""Weights on one device: initialised as Transformers does, loaded from any safetensors folder, exported bit-equal."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from parallelize.config import ParallelismConfig
from transformers_backend.decoder import describe_decoder
from transformers_backend.model_args import HFTransformerModelArgs, build_on_meta
from transformers_backend.pipeline_plan import plan_pipeline
from transformers_backend.stages import LocalStages
from transformers_backend.twin import build_twin, twin_config
from transformers_backend.verify import DENSE_MODEL_TYPES
from transformers_backend.weights import (
    allocate,
    init_buffers,
    init_weights,
    initialize,
    load,
    load_hf_weights,
    named_tensors,
    save_hf_weights,
)

CPU = torch.device("cpu")


def _twin(model_type: str, seed: int = 0, **fields) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type](**fields)
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], seed=seed)


def _on_meta(config, model_class=None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model_class = model_class or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return build_on_meta(config, model_class, HFTransformerModelArgs(model_type="unused", dtype=dtype))


def _initialise(config, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = _on_meta(config, dtype=dtype)
    allocate(model, CPU, buffer_device=CPU)
    for tensor in [*model.parameters(), *model.buffers()]:  # what nobody fills must show
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)
    init_weights(model, _on_meta(config, dtype=dtype), describe_decoder(model), device=CPU, seed=seed)
    return model


def _load(folder: Path, *, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    config, model_class = HFTransformerModelArgs(model=str(folder), config_overrides=overrides).resolve()
    model = _on_meta(config, model_class, dtype)
    blueprint = _on_meta(config, model_class, dtype)
    allocate(model, CPU, buffer_device=CPU)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)
    init_buffers(model, blueprint, device=CPU)
    load_hf_weights(model, blueprint, str(folder))
    return model


def _assert_equal(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    state, expected = model.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


# -- initialising ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_initial_weights_are_distributed_as_transformers_draws_them(model_type: str):
    config = twin_config(CONFIG_MAPPING[model_type]())
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    torch.manual_seed(0)
    plain, again = (model_class._from_config(config, dtype=torch.float32) for _ in range(2))
    ours = _initialise(config)
    draws = dict(ours.named_parameters())
    assert draws.keys() == dict(plain.named_parameters()).keys(), "ties are the same"
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        mine = draws[name].detach()
        assert mine.isfinite().all(), f"{name} was filled"
        assert torch.equal(mine == 0, one == 0), f"{name}: zeros, such as a padding row, are the same"
        if torch.equal(one, other):  # not random: ones, zeros, a slope
            torch.testing.assert_close(mine, one.detach(), rtol=1e-6, atol=0, msg=name)
        elif one.numel() >= 32:
            # Two draws of n numbers: standard deviations differ by 1 / sqrt(n) relative, means by std * sqrt(2 / n).
            standard, count = one.std().item(), one.numel()
            assert abs(mine.std().item() / standard - 1) < 6 / math.sqrt(count), name
            assert abs(mine.mean().item() - one.mean().item()) < 6 * standard * math.sqrt(2 / count), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_buffers_are_exactly_transformers(model_type: str, dtype: torch.dtype, tmp_path: Path):
    config = twin_config(CONFIG_MAPPING[model_type]())
    plain = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, dtype=dtype)
    if dtype == torch.bfloat16:  # gptj and codegen built in bf16 have coarse positions, loaded in bf16 exact ones
        plain.save_pretrained(tmp_path)
        plain = type(plain).from_pretrained(tmp_path, dtype=dtype)
    expected = dict(plain.named_buffers())
    buffers = dict(_initialise(config, dtype=dtype).named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name


def test_scaled_rotary_frequencies_are_those_of_the_config():
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        rope_parameters=rope,
    )  # fmt: skip
    expected = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    plain = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    assert not torch.allclose(expected, plain)
    assert torch.equal(_initialise(config).model.rotary_emb.inv_freq, expected)


def test_the_seed_decides_and_the_callers_random_numbers_stay():
    config = twin_config(LlamaConfig())
    state = torch.get_rng_state()
    one, same, other = _initialise(config), _initialise(config), _initialise(config, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    _assert_equal(one, same)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    layers = [layer.self_attn.q_proj.weight for layer in one.model.layers]
    assert not torch.equal(*layers), "layers differ"


def test_neighbouring_seeds_share_no_tensor():
    """Runs with seeds 0, 1, 2 are meant to be independent."""
    config = twin_config(LlamaConfig())
    draws = [
        [p.detach().flatten()[:16] for p in _initialise(config, seed=seed).parameters() if p.ndim == 2]
        for seed in (0, 1)
    ]
    shared = sum(torch.equal(a, b) or torch.allclose(a, b) for a in draws[0] for b in draws[1])
    assert shared == 0


def test_initializer_range_is_used():
    config = twin_config(LlamaConfig(initializer_range=0.5))
    assert _initialise(config).lm_head.weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_allocate_keeps_ties():
    model = _on_meta(twin_config(CONFIG_MAPPING["gpt2"]()))
    allocate(model, CPU, buffer_device=CPU)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.lm_head.weight.is_meta


def test_named_tensors_have_tied_names_and_persistent_buffers():
    twin = _twin("gemma4_text")
    names = named_tensors(twin)
    assert names.keys() == twin.state_dict().keys()
    assert "model.layers.0.layer_scalar" in names
    assert names["lm_head.weight"] is names["model.embed_tokens.weight"]
    assert not any("inv_freq" in name for name in names)


# -- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_single_and_sharded_folders(tmp_path: Path, shard: str):
    twin = _twin("llama")
    twin.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "60KB")
    model = _load(tmp_path)
    _assert_equal(model, twin)
    assert torch.equal(model.model.rotary_emb.inv_freq, twin.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("on_disk", "in_memory"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
                                                    (torch.float16, torch.float32)])  # fmt: skip
def test_dtypes_on_disk_and_in_memory(tmp_path: Path, on_disk: torch.dtype, in_memory: torch.dtype):
    twin = _twin("llama").to(on_disk)
    twin.save_pretrained(tmp_path)
    _assert_equal(_load(tmp_path, dtype=in_memory), twin.to(in_memory))


def test_tied_pairs_on_disk_once_and_twice(tmp_path: Path):
    twin = _twin("gpt2")
    twin.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    assert "lm_head.weight" not in stored
    _assert_equal(_load(tmp_path), twin)
    (embedding,) = (name for name in stored if name.endswith("wte.weight"))
    save_file({**stored, "lm_head.weight": stored[embedding].clone()}, file, metadata={"format": "pt"})
    model = _load(tmp_path)
    _assert_equal(model, twin)
    assert model.lm_head.weight is model.transformer.wte.weight
    head_only = {name: value for name, value in stored.items() if name != embedding}
    save_file({**head_only, "lm_head.weight": stored[embedding].clone()}, file, metadata={"format": "pt"})
    _assert_equal(_load(tmp_path), twin)
    save_file({**stored, "lm_head.weight": stored[embedding] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="different values for them") as caught:
        _load(tmp_path)
    assert "lm_head.weight" in str(caught.value)
    assert "tie_word_embeddings = false" in str(caught.value)
    untied = _load(tmp_path, tie_word_embeddings=False)
    assert torch.equal(untied.lm_head.weight, twin.lm_head.weight + 1)
    assert torch.equal(untied.transformer.wte.weight, twin.lm_head.weight)


def test_checkpoints_without_the_base_prefix(tmp_path: Path):
    """GPT-2 as it is published: the body's names, and causal masks that are no parameters."""
    twin = _twin("gpt2")
    twin.save_pretrained(tmp_path)
    body = {name.removeprefix("transformer."): value.clone() for name, value in twin.transformer.state_dict().items()}
    masks = {f"h.{index}.attn.bias": torch.ones(1, 1, 64, 64) for index in range(2)}
    save_file({**body, **masks}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _assert_equal(_load(tmp_path), twin)


def test_a_body_without_a_head_lacks_the_untied_head(tmp_path: Path):
    _twin("llama").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 missing in the files: lm_head.weight"):
        _load(tmp_path)


def test_gpt_neox_head_is_embed_out_on_disk(tmp_path: Path):
    twin = _twin("gpt_neox")
    twin.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("lm_head", "embed_out"): value for name, value in stored.items()}
    assert "embed_out.weight" in renamed
    masks = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4),
             "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}  # fmt: skip
    save_file({**renamed, **masks}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _assert_equal(_load(tmp_path), twin)


def _fuse_hrm_text(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published layout: gate and up in one matrix, gate, queries, keys and values in another."""
    fused = {}
    for name, value in state.items():
        prefix = name.rsplit(".", 2)[0]
        if name.endswith("mlp.gate_proj.weight"):
            fused[f"{prefix}.gate_up_proj.weight"] = torch.cat([value, state[f"{prefix}.up_proj.weight"]])
        elif name.endswith("self_attn.gate_proj.weight"):
            parts = [state[f"{prefix}.{part}_proj.weight"] for part in ("gate", "q", "k", "v")]
            fused[f"{prefix.replace('self_attn', 'attn')}.gqkv_proj.weight"] = torch.cat(parts)
        elif not name.endswith(("up_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")):
            fused[name.replace(".self_attn.", ".attn.")] = value
    return fused


def test_hrm_text_is_fused_on_disk(tmp_path: Path):
    twin = _twin("hrm_text")
    twin.save_pretrained(tmp_path)
    fused = _fuse_hrm_text(twin.state_dict())
    save_file(fused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path), twin)  # the layout above is Transformers' own
    _assert_equal(_load(tmp_path), twin)


def test_shapes_of_fused_tensors_are_checked_too(tmp_path: Path):
    """A config that asks for smaller layers than the files hold must not load the first rows in silence."""
    twin = _twin("hrm_text")
    twin.save_pretrained(tmp_path)
    save_file(_fuse_hrm_text(twin.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="of another shape"):
        _load(tmp_path, intermediate_size=64)


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path):
    twin = _twin("llama")
    twin.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.norm.weight"]
    stored["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    stored["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    stored["model.rotary_emb.inv_freq"] = torch.zeros(8)  # old checkpoints have it; it is computed
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit LlamaForCausalLM as configured") as caught:
        _load(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path))
    assert "1 missing in the files: model.norm.weight" in message
    assert "1 unexpected in the files: model.layers.0.self_attn.q_proj.bias" in message
    assert "1 of another shape: model.layers.1.mlp.up_proj.weight (model (96, 64), file (95, 64))" in message
    assert "config_overrides" in message


def test_a_long_list_is_cut(tmp_path: Path):
    _twin("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"9 unexpected in the files: model.layers.1.input_layernorm.weight"):
        _load(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"18 missing in the files: .* \.\.\.") as caught:
        _load(tmp_path, num_hidden_layers=4)
    assert str(caught.value).count("model.layers.") == 10
    assert 'or set hf_transformers.init = "scratch" to draw all weights anew' in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 1000, -10])
def test_truncated_files(tmp_path: Path, kept: int):
    _twin("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated or damaged safetensors") as caught:
        _load(tmp_path)
    assert "Download or write it again" in str(caught.value)


def test_a_file_of_the_index_is_absent(tmp_path: Path):
    _twin("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    files[1].unlink()
    with pytest.raises(ValueError, match=r"index.json names files that are not there") as caught:
        _load(tmp_path)
    assert files[1].name in str(caught.value)
    assert files[0].name not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}'])
def test_a_damaged_index(tmp_path: Path, text: str):
    _twin("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json|missing in the files"):
        _load(tmp_path)


def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path):
    twin = _twin("llama")
    twin.config.save_pretrained(tmp_path)
    torch.save(twin.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled .bin weights") as caught:
        _load(tmp_path)
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path}').save_pretrained('NEW_FOLDER')" in str(caught.value)


def test_a_folder_without_weights(tmp_path: Path):
    _twin("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        _load(tmp_path)


def test_nothing_is_loaded_where_something_does_not_fit(tmp_path: Path):
    twin = _twin("llama")
    twin.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["surplus"] = torch.zeros(1)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, blueprint = (_on_meta(twin.config) for _ in range(2))
    allocate(model, CPU, buffer_device=CPU)
    for parameter in model.parameters():
        parameter.data.fill_(5.0)
    with pytest.raises(ValueError, match="1 unexpected in the files: surplus"):
        load_hf_weights(model, blueprint, str(tmp_path))
    assert all((parameter == 5.0).all() for parameter in model.parameters())


# -- exporting ------------------------------------------------------------------------------------------------------


def _export(model: PreTrainedModel, folder: Path, **options) -> None:
    blueprint = _on_meta(model.config, type(model))
    save_hf_weights(model, blueprint, describe_decoder(model), folder, **options)


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_export_is_what_save_pretrained_writes(tmp_path: Path):
    twin = _twin("qwen2", tie_word_embeddings=True, initializer_range=0.04)
    _export(twin, tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    assert _files(tmp_path / "ours") == _files(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((tmp_path / folder / name).read_text()) for folder in ("ours", "theirs"))
        assert ours == theirs, name
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), twin)


def test_files_are_bounded_and_indexed(tmp_path: Path):
    twin = _twin("llama")
    limit = 80_000
    _export(twin, tmp_path / "out", max_file_size=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert _files(tmp_path / "out") == {*files, "model.safetensors.index.json", "config.json", "generation_config.json"}
    total = 0
    for name in files:
        stored = load_file(tmp_path / "out" / name)
        assert all(index["weight_map"][key] == name for key in stored)
        size = sum(tensor.numel() * 4 for tensor in stored.values())
        assert size <= limit or len(stored) == 1, "a larger tensor has a file of its own"
        total += size
    assert index["metadata"]["total_size"] == total == sum(p.numel() * 4 for p in twin.parameters())
    assert index["weight_map"].keys() == twin.state_dict().keys()
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), twin)


def test_a_tensor_larger_than_a_file_stands_alone(tmp_path: Path):
    twin = _twin("llama")
    _export(twin, tmp_path / "out", max_file_size=10_000)
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored = load_file(file)
        assert sum(t.numel() * 4 for t in stored.values()) <= 10_000 or len(stored) == 1
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), twin)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "modernbert-decoder", "gemma4_text", "xlstm", "opt"])
def test_other_layouts_load_bit_equal(tmp_path: Path, model_type: str):
    twin = _twin(model_type)
    _export(twin, tmp_path / "out", max_file_size=100_000)
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), twin)


def test_a_loaded_layout_is_exported_as_it_was(tmp_path: Path):
    """hrm_text from fused files goes back into fused files, which other tools expect."""
    twin = _twin("hrm_text")
    twin.save_pretrained(tmp_path / "in")
    save_file(_fuse_hrm_text(twin.state_dict()), tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    config, model_class = HFTransformerModelArgs(model=str(tmp_path / "in")).resolve()
    model, blueprint = (_on_meta(config, model_class) for _ in range(2))
    allocate(model, CPU, buffer_device=CPU)
    load_hf_weights(model, blueprint, str(tmp_path / "in"))
    save_hf_weights(model, blueprint, describe_decoder(model), tmp_path / "out")
    original, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_export_dtype(tmp_path: Path, dtype: torch.dtype):
    twin = _twin("llama")
    _export(twin, tmp_path / "out", dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert {p.dtype for p in twin.parameters()} == {torch.float32}, "the model itself is not cast"
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), twin.to(dtype))


def test_the_config_is_only_told_its_class_and_dtype(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=12,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, initializer_range=0.037,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 12345.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    before = config.to_dict()
    _export(model, tmp_path / "out")
    assert config.to_dict() == before
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("architectures") == ["LlamaForCausalLM"]
    assert written.pop("dtype") == "float32"
    assert {key: before[key] for key in written} == written


def test_tokenizer_and_generation_config_are_written(tmp_path: Path):
    twin = _twin("llama")
    blueprint = _on_meta(twin.config)
    blueprint.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
    save_hf_weights(twin, blueprint, describe_decoder(twin), tmp_path / "out", tokenizer=ByT5Tokenizer())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids == ByT5Tokenizer()("abc").input_ids


def test_an_export_replaces_the_older_one(tmp_path: Path):
    _export(_twin("llama", seed=1), tmp_path / "out", max_file_size=80_000)
    twin = _twin("llama", seed=2)
    _export(twin, tmp_path / "out")
    assert _files(tmp_path / "out") == {"model.safetensors", "config.json", "generation_config.json"}
    assert _files(tmp_path) == {"out"}, "no temporary folder is left"
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), twin)


class _FailingTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        raise OSError("No space left on device")


def test_a_failing_export_leaves_the_older_one(tmp_path: Path):
    twin = _twin("llama", seed=1)
    _export(twin, tmp_path / "out")
    with pytest.raises(OSError, match="No space left"):
        _export(_twin("llama", seed=2), tmp_path / "out", tokenizer=_FailingTokenizer())
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), twin)
    _export(_twin("llama", seed=3), tmp_path / "out")
    assert _files(tmp_path) == {"out"}, "what the failed one left is cleared by the next"


def test_a_file_in_the_way(tmp_path: Path):
    (tmp_path / "out").write_text("notes")
    with pytest.raises(ValueError, match=f"{tmp_path / 'out'} is a file"):
        _export(_twin("llama"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "notes"


def test_a_folder_that_is_no_export_is_not_deleted(tmp_path: Path):
    """`save_pretrained("~")` must not empty the home folder."""
    (tmp_path / "home" / "thesis").mkdir(parents=True)
    (tmp_path / "home" / "thesis" / "main.tex").write_text("three years of work")
    try:
        _export(_twin("llama"), tmp_path / "home")
    except ValueError as error:
        assert "home" in str(error)  # noqa: PT017 - either refused in words, or kept beside the export
    assert (tmp_path / "home" / "thesis" / "main.tex").read_text() == "three years of work"


def test_a_new_folder_below_new_folders(tmp_path: Path):
    _export(_twin("llama"), tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "config.json").exists()


def test_the_written_files_are_marked_for_torch(tmp_path: Path):
    _export(_twin("llama"), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    shutil.rmtree(tmp_path / "out")


def test_a_pipeline_stage_draws_and_reads_its_own_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
    )  # fmt: skip
    whole = _initialise(config)
    expected = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    whole.save_pretrained(tmp_path, max_shard_size="6KB")
    stored_in = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]

    stage, blueprint = _on_meta(config), _on_meta(config)
    decoder = describe_decoder(stage)
    plan = plan_pipeline(stage, decoder, None, ParallelismConfig(pipeline_parallel_degree=2), seq_len=8)
    LocalStages(stage, decoder, plan.split, [1]).drop_the_rest()
    allocate(stage, CPU, buffer_device=CPU)
    own = {name for name, _ in stage.named_parameters()}
    assert "model.layers.3.mlp.up_proj.weight" in own
    assert "model.layers.0.mlp.up_proj.weight" not in own

    drawn, draw = [], initialize._initialised

    def noted(blueprint: PreTrainedModel, names: list[str], *arguments, **keywords) -> dict[str, torch.Tensor]:
        drawn.extend(names)
        return draw(blueprint, names, *arguments, **keywords)

    monkeypatch.setattr(initialize, "_initialised", noted)
    init_weights(stage, blueprint, decoder, device=CPU, seed=0)
    assert {name for name in drawn if name in expected} == own
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stage.named_parameters())

    for parameter in stage.parameters():
        parameter.data.fill_(float("nan"))
    opened, open_file = [], load._open
    monkeypatch.setattr(load, "_open", lambda file: opened.append(file.name) or open_file(file))
    load_hf_weights(stage, blueprint, str(tmp_path))
    again = {name for name in opened if opened.count(name) > 1}  # every header is read once
    assert again == {stored_in[name] for name in own} < set(opened)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stage.named_parameters())
