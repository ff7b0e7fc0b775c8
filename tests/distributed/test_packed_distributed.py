"""Packed documents on sharded models, with recomputed and compiled layers and in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from parallelize.config import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from tests.distributed.workers import WorkerPool
from transformers_backend.model import HFTransformerModel
from transformers_backend.twin import VOCABULARY_SIZE, build_twin

LENGTHS = ((4, 9, 1, 6), (20,), (7, 13), (2, 18))  # of the documents in each row, two rows a rank


def _twin(model_type: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type]()
    return build_twin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _alone(model_type: str, input_ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The global mean loss and its gradients, of plain Transformers with one document at a time."""
    plain = _twin(model_type)
    documents = [d[None] for row, n in zip(input_ids, LENGTHS, strict=True) for d in row.split(n) if len(d) > 1]
    targets = sum(document.shape[1] - 1 for document in documents)
    loss = sum(
        plain(input_ids=d, labels=d, use_cache=False, num_items_in_batch=targets).loss for d in documents
    )  # fmt: skip
    loss.backward()
    return loss.item(), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def _train_and_compare(model_type: str, tolerance: float, options: dict) -> str | None:
    input_ids = torch.randint(
        3, VOCABULARY_SIZE - 3, (len(LENGTHS), 20), generator=torch.Generator().manual_seed(3)
    )  # fmt: skip
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    labels = input_ids.masked_fill(position_ids == 0, -100)
    expected_loss, expected = _alone(model_type, input_ids)
    torch._dynamo.reset()
    model = HFTransformerModel.wrap(_twin(model_type))
    model.parallelize(ParallelismConfig(data_parallel_shard_degree=dist.get_world_size()), **options)
    way = model.isolate_documents().way
    mine = slice(2 * model.data_rank, 2 * model.data_rank + 2)
    loss = model.forward_backward(input_ids[mine], labels[mine], position_ids=position_ids[mine])
    assert abs(loss.item() - expected_loss) <= tolerance * expected_loss, (loss.item(), expected_loss)
    gradients = model.full_gradients()
    assert gradients.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 10 * tolerance * max(gradient.norm(), 1e-2 * largest), name
    loss, targets = model.evaluate(input_ids[mine], labels[mine], position_ids=position_ids[mine])
    assert abs((loss / targets).item() - expected_loss) <= tolerance * expected_loss
    return way


@pytest.mark.parametrize(
    ("model_type", "way", "tolerance", "options"),
    [
        pytest.param("llama", "positions", 1e-5, {}, id="llama"),
        pytest.param("falcon", "mask", 1e-5, {}, id="falcon"),
        pytest.param(
            "qwen3", "positions", 1e-5,
            {"activation_checkpoint": ActivationCheckpointConfig(mode="full"),
             "compile": CompileConfig(enable=True, backend="aot_eager")}, id="recomputed and compiled"),
        pytest.param("llama", "positions", 2e-2, {"param_dtype": torch.bfloat16}, id="bfloat16"),
        pytest.param("falcon", "mask", 2e-2, {"param_dtype": torch.bfloat16}, id="bfloat16 mask"),
    ],
)  # fmt: skip
def test_documents_train_as_alone_on_two_ranks(
    two: WorkerPool, model_type: str, way: str, tolerance: float, options: dict
):
    assert two.run(_train_and_compare, model_type, tolerance, options) == [way, way]
