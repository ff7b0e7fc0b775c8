"""Batches and models with which shared sequences could go wrong in silence, each against plain Transformers.

Frequencies that depend on the length, parts without a target, positions that begin late, weights that are not trained,
and batches of one length after another; then what is told and set of such a model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from parallelize.config import ParallelismConfig
from parallelize.distributed import set_timeout
from parallelize.parallel_dims import ParallelDims, data_parallel_mesh
from tests.distributed.workers import WorkerPool
from transformers_backend import HFTransformerModel, JobConfig
from transformers_backend.proof import gradients, relative_errors
from transformers_backend.run_summary import estimate_run_memory

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 48, "vocab_size": 98, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40,
             "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}  # fmt: skip
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
_MODELS = {
    "llama": {"model_type": "llama"},
    "gpt2": {"model_type": "gpt2", "n_positions": 96, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gptj": {"model_type": "gptj", "rotary_dim": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    # Sequences of the twin are shorter than 40 tokens, so that the proof at the start does not see that it matters.
    "longrope": {"model_type": "phi3", "rope_parameters": _LONGROPE, "original_max_position_embeddings": 40},
    "dynamic": {"model_type": "llama", "rope_parameters": _DYNAMIC, "max_position_embeddings": 40},
}


@dataclass(frozen=True)
class Case:
    model: str = "llama"
    lengths: tuple[int, ...] = (16,)
    """Of sequences, one batch of each."""
    first_position: int | None = None
    documents: tuple[int, ...] | None = None
    """Their lengths in every row."""
    targets: tuple[int, int] = (0, 1000)
    """The only tokens that are targets: the first, and the one after the last."""
    trained: str = ""
    """What names of the parameters that are trained have in common."""
    layout: str = "zigzag"

    @property
    def positions(self) -> torch.Tensor | None:
        if self.documents is not None:
            return torch.cat([torch.arange(size) for size in self.documents]).expand(2, -1)
        return None if self.first_position is None else self.first_position + torch.arange(*self.lengths).expand(2, -1)


def _build(case: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**_SIZES | _MODELS[case.model]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = case.trained in name
    return model


@functools.cache
def _mesh(degree: int) -> DeviceMesh:
    """In a worker, once: process groups take a while to start."""
    return ParallelDims(pp=1, dp_replicate=1, dp_shard=1, cp=degree, tp=1).build_mesh("cpu")


def _compare(case: Case) -> tuple[float, dict[str, float]]:
    """How far the sum of the losses is off, and every gradient, relatively."""
    plain = _build(case).train()
    parallelism = ParallelismConfig(context_parallel_degree=2, context_parallel_layout=case.layout)
    model = HFTransformerModel.wrap(_build(case)).parallelize(parallelism, mesh=_mesh(2))
    assert model.context.takes_whole_sequences == (case.model == "gptj")
    difference = 0.0
    for length in case.lengths:
        tokens = torch.randint(2, 98, (2, length), generator=torch.Generator().manual_seed(length))
        labels = torch.full_like(tokens, -100)
        only = slice(*case.targets)
        labels[:, only] = tokens[:, only]
        expected = plain(input_ids=tokens, labels=labels, position_ids=case.positions, use_cache=False).loss
        expected.backward()
        difference += abs(model.forward_backward(tokens, labels, position_ids=case.positions) - expected.detach())
    return difference.item(), relative_errors(gradients(plain), model.full_gradients())


@pytest.mark.parametrize(
    "case",
    [
        Case("longrope", (44, 40, 48)),
        Case("longrope", (60,), layout="contiguous"),
        Case("longrope", (60,), documents=(18, 42)),
        Case("dynamic", (44, 48, 40), layout="contiguous"),
        Case(targets=(5, 6)),
        Case("gpt2", targets=(4, 12)),
        Case(first_position=7),
        Case("gpt2", first_position=30),
        Case(trained="layers.1.self_attn.q_proj"),
        Case(trained="layers.0.self_attn.k_proj"),
        Case("gpt2", trained="ln_f"),
        Case("gptj", targets=(4, 12), trained="h.1.attn.k_proj"),
        Case(lengths=(16, 8, 24, 16)),
    ],
    ids=str,
)
def test_two_ranks_compute_what_one_does(two: WorkerPool, case: Case):
    for difference, errors in two.run(_compare, case):
        assert difference <= 1e-5
        assert max(errors.values()) <= 1e-5, errors


def _late_position_refused() -> None:
    model = HFTransformerModel.wrap(_build(Case("gpt2")))
    model.parallelize(ParallelismConfig(context_parallel_degree=2), mesh=_mesh(2))
    tokens, positions = torch.full((1, 16), 5), torch.arange(16)[None].clone()
    positions[0, 7] = 96  # which only rank 1 has
    with pytest.raises(ValueError, match=r"position_ids must be from 0 to 95: the model has learned"):
        model.forward_backward(tokens, tokens, position_ids=positions)


def test_a_position_beyond_the_table_of_one_rank_is_refused_on_both(two: WorkerPool):
    two.run(_late_position_refused)


def _groups_with_timeout(mesh: DeviceMesh) -> set[str]:
    groups = []
    with mock.patch.object(dist.distributed_c10d, "_set_pg_timeout", lambda timeout, group: groups.append(group)):
        set_timeout(60, mesh)
    return {group.group_name for group in groups}


def _has_timeout() -> bool:
    mesh = _mesh(2)
    return data_parallel_mesh(mesh).get_group().group_name in _groups_with_timeout(mesh)


def test_the_group_that_shards_weights_has_a_timeout_like_the_others(two: WorkerPool):
    assert all(two.run(_has_timeout))


def _activations(name: str, degree: int) -> float:
    """As they are estimated for sequences of 64 tokens on so many ranks, relative to those on one."""
    config, found = JobConfig(), {}
    config.training.seq_len, config.training.local_batch_size = 64, 1
    for ranks in (1, degree):
        model = HFTransformerModel.wrap(_build(Case(name)))
        if ranks > 1:
            model.parallelize(ParallelismConfig(context_parallel_degree=ranks), mesh=_mesh(ranks))
        estimate = estimate_run_memory(config, model, optimizers=[], computes_in=torch.float32, accumulates=False)
        found[ranks] = estimate.activations
    return found[degree] / found[1]


@pytest.mark.parametrize(("name", "share"), [("llama", 0.5), ("gptj", 1)])
def test_estimated_activations_are_those_of_what_a_rank_computes(two: WorkerPool, name: str, share: float):
    """GPT-J's attention runs on the whole sequence on every rank."""
    assert two.run(_activations, name, 2) == [pytest.approx(share, rel=1e-3)] * 2
