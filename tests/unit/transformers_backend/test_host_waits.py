"""What a GPU's host would wait for in a step: operators whose result the host needs, seen where they run on the CPU.

The same is asked of a GPU itself in tests/gpu. There the optimizers are told on the device whether a step is finite;
here `FiniteCheck` is made to do so.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.jobs import tiny_job
from transformers_backend import JobConfig, Trainer
from transformers_backend.nonfinite import FiniteCheck
from transformers_backend.optimizer import build_optimizer

pytestmark = pytest.mark.usefixtures("process")

aten = torch.ops.aten
# A number for Python, or a result whose size depends on numbers.
WAITED_FOR = {
    aten._local_scalar_dense.default, aten.equal.default, aten.masked_select.default, aten.nonzero.default,
    aten.repeat_interleave.Tensor, aten._unique2.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class WaitsOfTheHost(TorchDispatchMode):
    """Counts such operators by name while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        by_mask = operator in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if operator in WAITED_FOR or by_mask:
            self.found[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobConfig]:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.txt").write_text("".join(f"line {line} of some text\n" for line in range(40)))

    def make(folder: str = "run", **changes) -> JobConfig:
        return tiny_job(tmp_path, folder, **changes)

    return make


def _late(trainer: Trainer) -> Trainer:
    trainer._finite = FiniteCheck(trainer.optimizers, is_late=True)
    return trainer


def test_what_is_waited_for_is_seen():
    values, waits = torch.arange(4.0), WaitsOfTheHost()
    with waits:
        values.sum().item()
        bool((values > 1).any())
        values[values > 1]
        values.clone()[values > 1] = 0.0
        values[torch.tensor([0, 1])]
    assert waits.found == {
        "aten._local_scalar_dense.default": 2, "aten.index.Tensor": 1, "aten.index_put_.default": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__mixed_precision_param": "bfloat16", "training__global_batch_size": 4},
        {"activation_checkpoint__mode": "full"},
    ],
    ids=["plain", "bf16 in two micro-batches", "recomputed"],
)
def test_only_transformers_waits_in_a_step_for_what_its_mask_is_to_be(
    job, changes: dict, monkeypatch: pytest.MonkeyPatch
):
    """Its masks ask once a micro-batch whether positions are those of packed documents; that answered, nothing does."""
    trainer = _late(Trainer(job(**changes)))
    trainer.train_step()
    trainer.data = itertools.repeat(next(trainer.data))  # reading data is the host's own work
    waits = WaitsOfTheHost()
    with waits:
        trainer.train_step()
    assert waits.found == {"aten._local_scalar_dense.default": trainer.accumulation_steps}
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    waits.found.clear()
    with waits:
        for _ in range(2):
            result = trainer.train_step()
    trainer.close()
    assert not waits.found
    assert result.loss.isfinite()


# -- steps that are not finite ----------------------------------------------------------------------------------------


def test_the_host_hears_of_a_nonfinite_step_before_the_next_and_the_weights_stay(job):
    trainer = _late(Trainer(job()))
    trainer.train_step()
    trainer.train_step()
    before = trainer.model.full_state_dict()
    forward_backward = trainer.model.forward_backward
    trainer.model.forward_backward = lambda *a, **k: forward_backward(*a, **k) * float("inf")
    assert trainer.train_step().loss.isinf()
    with pytest.raises(FloatingPointError, match=r"(?s)step 3: loss inf.*The weights are those of step 2") as caught:
        trainer.train_step()
    assert "step 3" in str(caught.value)
    after = trainer.model.full_state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer.close()


def test_skipped_late_is_skipped_as_at_once(job, caplog: pytest.LogCaptureFixture):
    """Weights and the optimizer's state after a run with two steps in between that are not finite."""

    def run(*, is_late: bool) -> list[torch.Tensor]:
        trainer = Trainer(job(f"{is_late}", debug__skip_nonfinite_steps=True))
        trainer._finite = FiniteCheck(trainer.optimizers, is_late=is_late)
        forward_backward = trainer.model.forward_backward
        trainer.model.forward_backward = lambda *a, **k: forward_backward(*a, **k) * scale
        for scale in (1.0, float("nan"), 1.0, float("nan"), 1.0):  # noqa: B007
            trainer.train_step()
        state = trainer.optimizers[0].state
        trainer.close()
        return [*trainer.model.hf_model.parameters(), *(v for one in state.values() for v in one.values())]

    at_once, late = run(is_late=False), run(is_late=True)
    assert len(at_once) == len(late)
    assert all(torch.equal(a, b) for a, b in zip(at_once, late, strict=True))
    assert caplog.text.count("The step is skipped") == 4


def test_a_run_is_told_of_its_last_step_and_of_one_before_a_checkpoint(job):
    for changes in ({"metrics__log_freq": 100}, {"metrics__log_freq": 100, "checkpoint__enable": True}):
        trainer = _late(Trainer(job(str(len(changes)), checkpoint__interval=3, **changes)))
        forward_backward = trainer.model.forward_backward
        bad = 6 if len(changes) == 1 else 3
        trainer.model.forward_backward = lambda *a, t=trainer, b=bad, f=forward_backward, **k: (
            f(*a, **k) * (float("nan") if t.step + 1 == b else 1.0)
        )
        with pytest.raises(FloatingPointError, match=f"step {bad}: loss nan"):
            trainer.train()
        trainer.close()
        assert not (trainer.dump_folder / "checkpoint" / "step-3").exists()


@pytest.mark.usefixtures("process")
def test_sharded_parameters_take_the_flag(job):
    trainer = Trainer(job())  # which starts a process group
    mesh = init_device_mesh("cpu", (1,))
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    [optimizer] = build_optimizer(
        [("weight", parameter)], name="AdamW", lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
        implementation="fused",
    )  # fmt: skip
    check = FiniteCheck([optimizer], is_late=True)
    for loss, changes in ((float("nan"), False), (1.0, True)):
        parameter.grad = torch.ones_like(parameter)
        assert check.allows_update(torch.tensor(loss), torch.tensor(1.0))
        optimizer.step()
        assert (check.unseen() is None) == changes
        assert check.unseen() is None
        assert (parameter.full_tensor() != 1).any() == changes
    trainer.close()
