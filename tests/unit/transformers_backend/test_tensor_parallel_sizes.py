"""What each rank keeps of Llama 3.1 70B, without a machine that could hold it: meta tensors and a pretended group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from parallelize.tensor_parallel import apply_tensor_parallel
from transformers_backend.decoder import describe_decoder
from transformers_backend.model_args import HFTransformerModelArgs, build_on_meta
from transformers_backend.proof import example_batch
from transformers_backend.tensor_plan import derive, make_plan
from transformers_backend.twin import build_twin

LLAMA_3_1_70B = LlamaConfig(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    intermediate_size=28672, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
PARAMETERS = 70_553_706_496


@pytest.fixture(params=[8, 16], ids=["8 ranks", "16 ranks, two a key-value head"])
def degree(request: pytest.FixtureRequest) -> Iterator[int]:
    """The tensor-parallel degree, of a group in which this process plays every rank's first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def test_each_rank_keeps_its_share_of_llama_70b(degree: int):
    twin = build_twin(LLAMA_3_1_70B, LlamaForCausalLM, degree=degree)
    recipe = derive(twin, describe_decoder(twin), example_batch()[0]).first()
    model = build_on_meta(LLAMA_3_1_70B, LlamaForCausalLM, HFTransformerModelArgs(dtype="bfloat16"))
    decoder = describe_decoder(model)
    plan = make_plan(model, decoder, recipe, degree)

    apply_tensor_parallel(
        model, plan, init_device_mesh("cpu", (degree,)), layers=decoder.layers, sequence_parallel=True
    )

    parameters = list(model.parameters())
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS
    local = sum(parameter.to_local().nbytes for parameter in parameters)
    assert local == pytest.approx(2 * PARAMETERS / degree, rel=0.03)
    keys = model.model.layers[0].self_attn.k_proj.weight.to_local()
    assert keys.shape == (8 * 128 // degree, 8192), "every number of a shared head is stored once"
