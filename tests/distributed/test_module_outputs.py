"""A plan that is not exact is refused, and the message names the first module of the model that goes wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parallelize.tensor_parallel.plan import Segment, Split, TensorPlan
from tests.distributed.workers import WorkerPool
from transformers_backend import HFTransformerModel, ParallelismConfig
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.module_outputs import first_difference, record_outputs
from transformers_backend.twin import build_twin


def _refusal(model_type: str, plan: dict[str, str], dropout: float = 0.0) -> str | None:
    hf_config, model_class = HFTransformerModelArgs(model_type=model_type).resolve()
    twin = build_twin(hf_config, model_class)
    twin.config.attention_dropout = dropout
    model = HFTransformerModel.wrap(twin)
    try:
        with torch.no_grad():  # in which a user may be; the plan is proven by gradients all the same
            model.parallelize(ParallelismConfig(tensor_parallel_degree=2, tensor_parallel_plan=plan))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("model_type", "plan", "reason", "module"),
    [
        # [gate | up] cut straight through: on the first rank the gate is right, on the second it is of up.
        ("glm4", {"model.layers.*.mlp.gate_up_proj": "colwise"}, "loss", "model.layers.0.mlp.activation_fn"),
        ("gpt2", {"transformer.h.*.attn.c_attn": "colwise"}, "loss", "transformer.h.0.attn.c_proj"),
        # Without its region the attention views (batch, seq, half the heads) as (batch, half of seq, all heads), which
        # an odd length does not let pass.
        ("opt", {"model.decoder.layers.*.self_attn": "replicate"}, "RuntimeError", "model.decoder.layers.0.self_attn"),
        ("llama", {"model.layers.*.mlp.up_proj": "replicate"}, "RuntimeError", "model.layers.0.mlp"),
    ],
)  # fmt: skip
def test_a_users_plan_that_is_wrong_is_refused(two: WorkerPool, model_type: str, plan: dict, reason: str, module: str):
    messages = two.run(_refusal, model_type, plan)
    assert messages[0] == messages[1], "every rank says the same"
    assert f"parallelism.tensor_parallel_plan = {plan}: with it the model computes something else" in messages[0]
    assert f"({reason}" in messages[0]
    assert f"The first module whose output differs is {module}. Correct the plan" in messages[0]


def test_a_users_plan_that_is_right_is_taken(two: WorkerPool):
    assert two.run(_refusal, "glm4", {"model.layers.*.mlp.gate_up_proj": "packed_gate_up"}) == [None, None]
    # The first way to split this one is not exact, whatever the user says of its norm: a way is searched for.
    assert two.run(_refusal, "diffllama", {"model.norm": "replicate"}) == [None, None]


def test_dropout_among_joined_features_is_refused(two: WorkerPool):
    for message in two.run(_refusal, "gemma3n_text", {}, 0.1):
        assert "computes with all features of model.layers.0.mlp" in message
        assert "Set the dropout of the model's config to 0" in message


class _Returns(nn.Module):
    """A model of one child, which returns what it is told to."""

    def __init__(self, output: torch.Tensor | None) -> None:
        super().__init__()
        self.child = nn.Identity()
        self.output = output

    def forward(self) -> torch.Tensor:
        if self.output is None:
            raise RuntimeError("no output")
        return self.child(self.output)


def _named(parts_of_ranks: list[torch.Tensor | None], plan: TensorPlan) -> str | None:
    """What is named if the plain model returns 0, 1, 2 ... in two rows."""
    part = parts_of_ranks[torch.distributed.get_rank()]
    plain, split = _Returns(torch.arange(24.0).view(2, 12)), _Returns(part)
    outputs = [record_outputs(model, model) for model in (plain, split)]
    return first_difference(*outputs, plan, torch.distributed.group.WORLD)


def test_what_counts_as_a_part(two: WorkerPool):
    whole = torch.arange(24.0).view(2, 12)
    packed = Split("colwise", (Segment(4), Segment(4), Segment(4)))
    shared = Split("colwise", (Segment(4, 2), Segment(4, 1), Segment(4, 1)))
    halves = [whole[:, :6], whole[:, 6:]]

    def named(parts: list[torch.Tensor | None], *splits: Split) -> str | None:
        plan = TensorPlan(2, {str(number): split for number, split in enumerate(splits)}, {})
        first, second = two.run(_named, parts, plan)
        assert first == second
        return first

    assert named([whole, whole]) is None
    assert named(halves) is None
    assert named([whole[:, :6], whole]) is None, "ranks are looked at one by one"
    assert named([whole[:1], whole[1:]]) is None
    assert named(halves[::-1]) == "child"
    assert named([halves[0], halves[1] + 0.1]) == "child", "on one rank only"
    assert named([halves[0], halves[1][:1]]) == "child", "two dimensions differ"
    assert named([halves[0], halves[1] * float("nan")]) == "child"
    thirds = [whole.unflatten(1, (3, 2, 2))[:, :, rank].flatten(1) for rank in range(2)]
    assert named(thirds) == "child"
    assert named(thirds, packed) is None
    with_shared = [torch.cat([whole[:, 2 * rank : 2 * rank + 2], whole[:, 4:]], 1) for rank in range(2)]
    assert named(with_shared, packed) == "child"
    assert named(with_shared, shared) is None
    assert named([halves[0], None]) == "the whole model", "which raised on one rank"
