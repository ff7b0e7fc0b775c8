"""Models whose token-mixing modules run on the whole sequence, on real ranks: loss, every gradient, evaluation."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from parallelize.config import ActivationCheckpointConfig, ParallelismConfig
from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.whole import gather_sequence, own_part, spread
from transformers_backend.isolation import packed_inputs
from transformers_backend.loss import count_targets, shift_labels, sum_cross_entropy
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.proof import example_batch, gradients, relative_errors
from transformers_backend.twin import build_twin

_LENGTH = 24  # several windows of a twin; divides by 2 x 4 ranks


def _gather(is_zigzag: bool) -> list[float]:
    rank, degree = dist.get_rank(), dist.get_world_size()
    layout = SequenceLayout(16, degree, is_zigzag)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 16, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(degree, 2, 16, 3, generator=generator, dtype=torch.float64)
    (own_part((whole.cumsum(1) ** 2) * weights.sum(0), layout, rank)).sum().backward()
    part = own_part(whole.detach(), layout, rank).requires_grad_()
    gathered = gather_sequence(part, layout, dist.group.WORLD)
    ((gathered.cumsum(1) ** 2) * weights[rank]).sum().backward()
    reference = whole.detach().clone().requires_grad_()
    ((reference.cumsum(1) ** 2) * weights.sum(0)).sum().backward()
    spread_out = spread(part, layout, rank).detach()
    dist.all_reduce(spread_out)
    return [
        (gathered - whole).abs().max().item(),
        (part.grad - own_part(reference.grad, layout, rank)).abs().max().item(),
        (spread_out - whole).abs().max().item(),
    ]


@pytest.mark.parametrize("is_zigzag", [True, False])
def test_gathering_sums_the_terms_of_all_ranks_in_the_backward(two, is_zigzag):
    for errors in two.run(_gather, is_zigzag):
        assert max(errors) < 1e-12


def _compare(model_type: str, mesh: dict, options: dict) -> dict:
    overrides = options.get("overrides", {})
    resolved = HFTransformerModelArgs(model_type=model_type, config_overrides=overrides).resolve()
    plain, model = build_twin(*resolved), HFTransformerModel.wrap(build_twin(*resolved))
    checkpoint = ActivationCheckpointConfig(mode=options.get("recompute", "none"))
    model.parallelize(ParallelismConfig(**mesh), activation_checkpoint=checkpoint)
    rows = 2 * model.dims.data_parallel_size
    input_ids, labels = example_batch(rows, _LENGTH)
    inputs, positions, way = {"input_ids": input_ids}, None, None
    if options.get("packed"):
        positions = torch.cat([torch.arange(9), torch.arange(_LENGTH - 9)]).expand(rows, -1)
        way = model.isolate_documents().way
        accepts = model.decoder.accepts_position_ids
        inputs = packed_inputs(way, input_ids, positions, accepts_position_ids=accepts, dtype=torch.float32)
    loss = sum_cross_entropy(plain(**inputs, use_cache=False).logits.flatten(0, 1), shift_labels(labels).flatten())
    loss = loss / count_targets(labels)
    loss.backward()
    if "warns" in options:
        warnings.filterwarnings("ignore", message=f".*{options['warns']}")
    mine = slice(2 * model.data_rank, 2 * model.data_rank + 2)
    positions = None if positions is None else positions[mine]
    found = model.forward_backward(input_ids[mine], labels[mine], position_ids=positions)
    total, count = model.evaluate(input_ids[mine], labels[mine], position_ids=positions)
    errors = relative_errors(gradients(plain), model.full_gradients())
    return {
        "way": model.context.way,
        "isolation": way,
        "loss": abs(found.item() - loss.item()),
        "evaluation": abs((total / count).item() - loss.item()),
        "gradient": max(errors.values()),
    }


def _check(results: list[dict], mixer: str) -> dict:
    for result in results:
        assert mixer in result["way"]
        assert result["loss"] < 1e-5
        assert result["evaluation"] < 1e-5
        assert result["gradient"] < 1e-4
    return results[0]


@pytest.mark.parametrize(
    ("model_type", "mixer", "options"),
    [
        ("bloom", "transformer.h.*.self_attention (2)", {}),  # alibi, and a residual within the mixer
        ("gptj", "attn", {"recompute": "full"}),  # reshapes what leaves the layers
        ("doge", "self_attn", {}),  # masks as tensors
        ("xlstm", "mlstm_layer", {"warns": "returned a view tensor"}),  # a recurrence, whose states are views
        ("lfm2", "conv", {"overrides": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}}),
    ],
)
def test_two_ranks_compute_what_one_does(two, model_type, mixer, options):
    _check(two.run(_compare, model_type, {"context_parallel_degree": 2}, options), mixer)


def test_packed_documents_stay_apart_as_transformers_keeps_them(two):
    result = _check(two.run(_compare, "gptj", {"context_parallel_degree": 2}, {"packed": True}), "attn")
    assert result["isolation"] == "positions"


@pytest.mark.parametrize("mesh", [{"context_parallel_degree": 4}, {"context_parallel_degree": 2}])
def test_four_ranks_compute_what_one_does(four, mesh):
    _check(four.run(_compare, "bloom", mesh, {}), "self_attention")


def _refused(mesh: dict) -> str:
    resolved = HFTransformerModelArgs(model_type="bloom").resolve()
    with pytest.raises(ValueError, match="needs attention over the ranks") as error:
        HFTransformerModel.wrap(build_twin(*resolved)).parallelize(ParallelismConfig(**mesh))
    return str(error.value)


@pytest.mark.parametrize("other", ["pipeline_parallel_degree", "tensor_parallel_degree"])
def test_other_ways_to_split_the_layers_are_refused_in_words(four, other):
    for message in four.run(_refused, {"context_parallel_degree": 2, other: 2}):
        assert f"parallelism.{other} > 1" in message
        assert "self_attention" in message
