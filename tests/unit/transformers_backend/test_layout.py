"""The plan of an export: tensors converted in small groups come out as converted all at once, and fill the files."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from transformers_backend.decoder import describe_decoder
from transformers_backend.twin import build_twin
from transformers_backend.verify import DENSE_MODEL_TYPES
from transformers_backend.weights import named_tensors
from transformers_backend.weights.layout import convert_group, plan_layout

MIXTURES_OF_EXPERTS = ["mixtral", "qwen3_moe", "olmoe"]


def _twin(model_type: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type]()
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], seed=1)


def _plan(twin: PreTrainedModel, max_file_size: int):
    tensors = named_tensors(twin)
    return plan_layout(twin, describe_decoder(twin), lambda name: tensors[name].detach().to("meta"), max_file_size)


@pytest.mark.parametrize("model_type", [*DENSE_MODEL_TYPES, *MIXTURES_OF_EXPERTS])
def test_groups_come_out_as_the_whole_does(model_type: str):
    twin = _twin(model_type)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(twin).items()}
    layout = _plan(twin, 10**9)
    groups = layout.sources["model.safetensors"]
    whole = revert_weight_conversion(twin, {name: tensors[name] for group in groups for name in group})
    assert whole.keys() == layout.file_of.keys()
    for group in groups:
        for name, tensor in convert_group(twin, {name: tensors[name] for name in group}).items():
            assert torch.equal(tensor, whole.pop(name)), name
    assert not whole


def test_what_belongs_together_stays_together():
    sizes = {len(group) for group in _plan(_twin("hrm_text"), 10**9).sources["model.safetensors"]}
    assert max(sizes) > 1, "queries, keys and values make one matrix on disk"
    for model_type in ("llama", "gpt_neox", "mixtral"):
        assert {len(group) for group in _plan(_twin(model_type), 10**9).sources["model.safetensors"]} == {1}, model_type


@pytest.mark.parametrize("model_type", ["llama", "hrm_text", "mixtral"])
def test_a_group_stands_under_every_file_that_needs_it(model_type: str):
    twin = _twin(model_type)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(twin).items()}
    layout = _plan(twin, 30_000)
    assert len(layout.sources) > 5
    assert list(dict.fromkeys(layout.file_of.values())) == list(layout.sources), "files are filled in order"
    for file, groups in layout.sources.items():
        outputs = {}
        for group in groups:
            outputs |= convert_group(twin, {name: tensors[name] for name in group})
        mine = {name for name, place in layout.file_of.items() if place == file}
        assert mine <= outputs.keys(), file
        assert sum(outputs[name].numel() * 4 for name in mine) <= 30_000 or len(mine) == 1
    assert layout.total_size == sum(
        tensor.numel() * 4 for groups in _plan(twin, 10**9).sources.values() for group in groups
        for tensor in convert_group(twin, {name: tensors[name] for name in group}).values()
    )  # fmt: skip
