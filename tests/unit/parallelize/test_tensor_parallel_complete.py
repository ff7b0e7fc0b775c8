"""A plan that leaves something open, contradicts itself or names what is not there is refused, by name."""

from __future__ import annotations

import pytest
from torch import nn

from parallelize.tensor_parallel import Split, TensorPlan
from parallelize.tensor_parallel.apply import check_complete


def _model(*, tied: bool = False) -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    if tied:
        model["head"].weight = model["embedding"].weight
    return model


def _check(model: nn.Module, **styles: str) -> None:
    check_complete(model, TensorPlan(2, {name: Split(style) for name, style in styles.items()}, {}))


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_that_says_all_is_taken(tied: bool):
    _check(_model(tied=tied), embedding="vocabulary", head="vocabulary")


def test_untied_parameters_may_differ():
    _check(_model(), embedding="vocabulary", head="replicate")


def test_a_parameter_without_a_decision_is_named():
    with pytest.raises(ValueError, match=r'nothing is said about head\.weight\. .*add "head" = "replicate"'):
        _check(_model(), embedding="vocabulary")


def test_tied_parameters_have_one_style():
    with pytest.raises(ValueError, match=r"embedding\.weight is vocabulary and head\.weight is replicate, but they"):
        _check(_model(tied=True), embedding="vocabulary", head="replicate")


def test_a_name_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="the model has no tail"):
        _check(_model(), embedding="vocabulary", head="vocabulary", tail="replicate")
