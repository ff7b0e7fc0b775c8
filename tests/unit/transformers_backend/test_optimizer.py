"""Optimizers and schedules in one process: groups, fused or not, Muon against torch's, schedules against tables."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from transformers_backend.optimizer import ShardedMuon, build_optimizer, build_schedulers, warmup_stable_decay

OPTIONS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.5, "implementation": "fused"}


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("embedding", torch.nn.Embedding(10, 8))
    model.add_module("layer", torch.nn.Linear(8, 6))
    model.add_module("norm", torch.nn.LayerNorm(6))
    model.add_module("head", torch.nn.Linear(6, 10, bias=False))
    return model


def _step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    model(torch.arange(10)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _names(model: torch.nn.Module, group: dict) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


def test_weight_decay_is_kept_off_norms_and_biases():
    model = _model()
    (optimizer,) = build_optimizer(model.named_parameters(), name="AdamW", **OPTIONS)
    decay = {frozenset(_names(model, group)): group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {
        frozenset({"embedding.weight", "layer.weight", "head.weight"}): 0.5,
        frozenset({"layer.bias", "norm.weight", "norm.bias"}): 0.0,
    }
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def test_adamw_step_by_hand():
    # First step: m / (1 - beta1) = g, v / (1 - beta2) = g^2, so the update is lr * sign(g) (eps aside), after decay.
    weight, bias = torch.nn.Parameter(torch.tensor([[2.0, -1.0]])), torch.nn.Parameter(torch.tensor([3.0]))
    weight.grad, bias.grad = torch.tensor([[0.3, -0.7]]), torch.tensor([5.0])
    (optimizer,) = build_optimizer([("weight", weight), ("bias", bias)], name="AdamW", **OPTIONS)
    optimizer.step()
    # 2 * (1 - 0.1 * 0.5) - 0.1 = 1.8; -1 * 0.95 + 0.1 = -0.85; the bias is not decayed: 3 - 0.1.
    torch.testing.assert_close(weight.detach(), torch.tensor([[1.8, -0.85]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([2.9]))


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_implementations_agree(implementation):
    expected, model = _model(), _model()
    options = {**OPTIONS, "implementation": implementation}
    optimizers = build_optimizer(model.named_parameters(), name="AdamW", **options)
    decayed = [parameter for parameter in expected.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in expected.parameters() if parameter.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5,
    )  # fmt: skip
    for _ in range(3):
        _step(model, optimizers)
        _step(expected, [reference])
    assert optimizers[0].param_groups[0]["fused"] == (implementation == "fused")
    assert optimizers[0].param_groups[0]["foreach"] == (implementation == "foreach")
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_fused_falls_back_where_the_device_has_no_such_kernel():
    parameter = torch.nn.Parameter(torch.zeros(2, 2, device="meta"))
    (optimizer,) = build_optimizer([("weight", parameter)], name="AdamW", **OPTIONS)
    assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["foreach"]) == (False, True)


def test_frozen_and_tied_parameters():
    model = _model()
    model.layer.weight.requires_grad_(False)
    named = [*model.named_parameters(), ("tied", model.head.weight)]
    (optimizer,) = build_optimizer(named, name="AdamW", **OPTIONS)
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(listed) == 5
    assert not any(parameter is model.layer.weight for parameter in listed)


def test_bad_values_name_the_rule():
    model = _model()
    with pytest.raises(ValueError, match=r'optimizer.name = "SGD": must be "AdamW" or "Muon"'):
        build_optimizer(model.named_parameters(), name="SGD", **OPTIONS)
    with pytest.raises(
        ValueError, match=r'optimizer.implementation = "fast": must be "for-loop", "foreach" or "fused"'
    ):
        build_optimizer(model.named_parameters(), name="AdamW", **{**OPTIONS, "implementation": "fast"})
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        build_optimizer([], name="AdamW", **OPTIONS)
    optimizers = build_optimizer(model.named_parameters(), name="AdamW", **OPTIONS)
    with pytest.raises(ValueError, match=r'lr_scheduler.decay_type = "exp": must be "linear", "sqrt" or "cosine"'):
        build_schedulers(optimizers, warmup_steps=1, total_steps=2, decay_ratio=None, decay_type="exp", min_lr_factor=0)


def test_muon_takes_the_hidden_matrices_only():
    model = _model()
    names = {"layer.weight", "layer.bias"}  # a bias among the names is not a matrix
    muon, adamw = build_optimizer(model.named_parameters(), name="Muon", matrix_names=names, **OPTIONS)
    assert [_names(model, group) for group in muon.param_groups] == [{"layer.weight"}]
    assert muon.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
    assert (muon.param_groups[0]["lr"], muon.param_groups[0]["weight_decay"]) == (0.1, 0.5)
    rest = set().union(*(_names(model, group) for group in adamw.param_groups))
    assert rest == {name for name, _ in model.named_parameters()} - {"layer.weight"}


def test_muon_with_matrices_only_needs_no_adamw():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    (muon,) = build_optimizer([("w", parameter)], name="Muon", matrix_names={"w"}, **OPTIONS)
    assert isinstance(muon, ShardedMuon)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7)])
def test_unsharded_muon_is_torch_muon(shape, nesterov, adjust_lr_fn):
    torch.manual_seed(0)
    mine = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(mine.detach().clone())
    options = {"lr": 0.1, "weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    ours, reference = ShardedMuon([mine], **options), torch.optim.Muon([theirs], **options)
    for _ in range(3):
        mine.grad = torch.randn(shape)
        theirs.grad = mine.grad.clone()
        ours.step()
        reference.step()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert ours.state_dict()["state"].keys() == reference.state_dict()["state"].keys()


def test_muon_step_has_the_size_of_an_adamw_step():
    # AdamW moves an entry by about 0.2 lr in the long run; the rule scales Muon's update to that root mean square.
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.randn(64, 128)
    ShardedMuon([parameter], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def _factors(steps: int, **options) -> list[float]:
    return [warmup_stable_decay(step, **options) for step in range(steps)]


# By hand for 10 steps. The last 0.4 * 10 = 4 steps decay, with progress 1/4, 2/4, 3/4 at steps 7, 8, 9, and 1 at
# step 10, which is never taken: step 6 is the decay's starting point and still has factor 1.
@pytest.mark.parametrize(
    ("decay_type", "minimum", "decay"),
    [
        ("linear", 0.0, [0.75, 0.5, 0.25, 0.0]),
        ("linear", 0.2, [0.8, 0.6, 0.4, 0.2]),  # 0.2 + 0.8 * linear
        ("sqrt", 0.0, [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]),
        ("cosine", 0.0, [(1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]),
    ],
)
def test_warmup_stable_decay(decay_type, minimum, decay):
    factors = _factors(
        11, warmup_steps=4, total_steps=10, decay_ratio=0.4, decay_type=decay_type, min_lr_factor=minimum
    )
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, *decay])


def test_without_decay_ratio_the_decay_follows_the_warmup():
    # 2 warm-up steps, then all 4 that are left decay: progress 0 at step 2, 1/4, 2/4, 3/4, and 1 after the last.
    options = {"warmup_steps": 2, "total_steps": 6, "decay_ratio": None, "decay_type": "linear", "min_lr_factor": 0}
    assert _factors(7, **options) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert warmup_stable_decay(100, **options) == 0.0, "beyond the end it stays"


def test_edges_of_the_schedule():
    constant = {"warmup_steps": 0, "total_steps": 3, "decay_ratio": 0.0, "decay_type": "linear", "min_lr_factor": 0.0}
    assert _factors(5, **constant) == [1.0] * 5
    only_warmup = {**constant, "warmup_steps": 9, "decay_ratio": None}  # cut to 3
    assert _factors(4, **only_warmup) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    decay_too_long = {**constant, "warmup_steps": 1, "decay_ratio": 1.0}  # cut to 2
    assert _factors(4, **decay_too_long) == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_schedulers_scale_every_group_of_every_optimizer():
    model = _model()
    optimizers = build_optimizer(model.named_parameters(), name="Muon", matrix_names={"layer.weight"}, **OPTIONS)
    schedulers = build_schedulers(
        optimizers, warmup_steps=2, total_steps=4, decay_ratio=None, decay_type="linear", min_lr_factor=0.1
    )
    seen = []
    for _ in range(4):
        seen.append({group["lr"] for optimizer in optimizers for group in optimizer.param_groups})
        _step(model, optimizers)
        for scheduler in schedulers:
            scheduler.step()
    assert [len(rates) for rates in seen] == [1] * 4
    assert [rates.pop() for rates in seen] == pytest.approx([0.05, 0.1, 0.1, 0.055])


def test_schedule_resumes_from_its_state():
    def build():
        optimizers = build_optimizer(_model().named_parameters(), name="AdamW", **OPTIONS)
        (scheduler,) = build_schedulers(
            optimizers, warmup_steps=2, total_steps=8, decay_ratio=0.5, decay_type="cosine", min_lr_factor=0.0
        )
        return optimizers[0], scheduler

    optimizer, scheduler = build()
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    resumed_optimizer, resumed = build()
    resumed.load_state_dict(scheduler.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed_optimizer.step()
    resumed.step()
    optimizer.step()
    scheduler.step()
    assert resumed_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1464466)


def test_phases_that_do_not_fit_are_said_to_be_cut(caplog):
    optimizers = build_optimizer(_model().named_parameters(), name="AdamW", **OPTIONS)
    with caplog.at_level(logging.INFO, logger="transformers_backend"):
        build_schedulers(
            optimizers, warmup_steps=9, total_steps=4, decay_ratio=None, decay_type="linear", min_lr_factor=0.0
        )
        build_schedulers(
            optimizers, warmup_steps=3, total_steps=4, decay_ratio=0.5, decay_type="linear", min_lr_factor=0.0
        )
    assert [record.getMessage() for record in caplog.records] == [
        "lr_scheduler.warmup_steps = 9: cut to the 4 steps of the run.",
        "lr_scheduler.decay_ratio = 0.5: cut to the 1 steps that 3 warm-up steps leave of 4.",
    ]
