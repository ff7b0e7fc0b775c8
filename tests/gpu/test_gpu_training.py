"""Training on the device itself, against plain Transformers on the same device: one rank, NCCL on CUDA.

Written for unittest, so that scripts/gpu_check.sh can run it where pytest is missing
(`python -m unittest discover tests/gpu`). `tests/unit/test_gpu_tests_on_cpu.py` runs the same on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import unittest
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from parallelize.config import (
    FLOAT8_RECIPES,
    ActivationCheckpointConfig,
    CompileConfig,
    Float8Config,
    ParallelismConfig,
)
from parallelize.distributed import initialize, pick_device, shutdown
from parallelize.float8 import missing_for_float8, torchao_version
from parallelize.tensor_parallel.randomness import ForkedRandomness
from transformers_backend.job_config import JobConfig
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import find_model_class
from transformers_backend.optimizer import build_optimizer
from transformers_backend.proof import example_batch, gradients, relative_errors
from transformers_backend.tensor_proof import prove_tensor_plan
from transformers_backend.trainer import Trainer
from transformers_backend.twin import build_twin

GRADIENT_TOLERANCE = 1e-4  # root mean square, relative; fp32
LOSS_TOLERANCE = 1e-5


def make_twin(model_type: str = "llama") -> PreTrainedModel:
    """The seeded twin of a model type, the same at every call, on the device."""
    config = CONFIG_MAPPING[model_type]()
    return build_twin(config, find_model_class(config, model_type, False)).to(pick_device())


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels, (batch, seq) on the device; some labels are ignored."""
    input_ids, labels = example_batch()
    return input_ids.to(pick_device()), labels.to(pick_device())


def plain_step(model_type: str = "llama") -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients (on the CPU) of plain Transformers."""
    twin, (input_ids, labels) = make_twin(model_type), make_batch()
    loss = twin(input_ids=input_ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: gradient.cpu() for name, gradient in gradients(twin).items()}


def our_step(model_type: str = "llama", **options) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients (on the CPU) of the parallelised model."""
    model = parallelize(model_type, **options)
    loss = model.forward_backward(*make_batch())
    return loss.item(), model.full_gradients()


def parallelize(model_type: str = "llama", **options) -> HFTransformerModel:
    return HFTransformerModel.wrap(make_twin(model_type)).parallelize(ParallelismConfig(), **options)


def assert_equal_steps(ours: tuple[float, dict], plain: tuple[float, dict]) -> None:
    assert abs(ours[0] - plain[0]) <= LOSS_TOLERANCE * plain[0], f"loss {ours[0]} instead of {plain[0]}"
    assert set(ours[1]) == set(plain[1])
    errors = relative_errors(plain[1], ours[1])
    worst = max(errors, key=errors.get)
    assert errors[worst] <= GRADIENT_TOLERANCE, f"gradient of {worst} off by {errors[worst]:.1e} relative"


class TrainingOnTheDevice(unittest.TestCase):
    needs_cuda = True

    @classmethod
    def setUpClass(cls) -> None:
        if cls.needs_cuda and not torch.cuda.is_available():
            raise unittest.SkipTest("needs a CUDA device")
        if not dist.is_initialized():
            initialize(pick_device(), timeout_seconds=120)
            cls.addClassCleanup(shutdown)

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_loss_and_gradients_are_those_of_plain_transformers(self) -> None:
        for model_type in ("llama", "gpt2", "gemma2"):
            with self.subTest(model_type):
                assert_equal_steps(our_step(model_type), plain_step(model_type))

    def test_mixed_precision_is_close_to_fp32(self) -> None:
        loss, found = our_step(param_dtype=torch.bfloat16)
        plain_loss, plain = plain_step()
        assert abs(loss - plain_loss) <= 1e-2 * plain_loss, f"loss {loss} in bf16, {plain_loss} in fp32"
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        ours, theirs = (torch.cat([g[name].flatten() for name in plain]) for g in (found, plain))
        assert ours.isfinite().all()
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert 1e-6 < error < 5e-2, f"gradients {error:.1e} from fp32: neither the same computation nor another one"

    def test_float8_is_close_to_bf16(self) -> None:
        """Compiled, by the device's own products in float8; each recipe is tried on the twin first."""
        device = pick_device()
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if missing := missing_for_float8(device.type, capability, torch.bfloat16, torchao_version()):
            self.skipTest(missing[0])
        plain = plain_step()[1]
        for recipe in FLOAT8_RECIPES:
            with self.subTest(recipe), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as an error, a warning inside the compiler would stop it
                options = {"param_dtype": torch.bfloat16, "compile": CompileConfig(enable=True)}
                found = our_step(float8=Float8Config(enable=True, recipe=recipe), **options)[1]
            ours, theirs = (torch.cat([g[name].flatten() for name in plain]) for g in (found, plain))
            error = ((ours - theirs).norm() / theirs.norm()).item()
            assert 2e-2 < error < 0.2, f"gradients {error:.1e} from fp32: neither float8 nor the same computation"

    def test_mixed_precision_trains(self) -> None:
        model = parallelize(param_dtype=torch.bfloat16)
        losses = self._train(model, steps=10)
        assert losses[-1] < 0.9 * losses[0], f"losses {losses}"

    def test_compiled_equals_eager(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as an error, a warning inside the compiler would stop it
            with self.assertNoLogs("transformers_backend", "WARNING"):  # such as that layers are not compiled
                ours = our_step(compile=CompileConfig(enable=True))
        assert_equal_steps(ours, plain_step())

    def test_recomputed_equals_kept(self) -> None:
        plain = plain_step()
        for mode, option in (("full", "2"), ("selective", "2"), ("selective", "op")):
            with self.subTest(mode=mode, option=option):
                config = ActivationCheckpointConfig(mode=mode, selective_ac_option=option)
                assert_equal_steps(our_step(activation_checkpoint=config), plain)

    def test_offloaded_to_host_memory_trains_the_same(self) -> None:
        offloaded = parallelize(cpu_offload=True)
        assert {parameter.device.type for parameter in offloaded.hf_model.parameters()} == {"cpu"}
        torch.testing.assert_close(self._train(offloaded), self._train(parallelize()), rtol=1e-4, atol=0)

    def test_an_export_loads_bit_equal(self) -> None:
        model = parallelize("gemma2")
        self._train(model, steps=1)
        model.save_pretrained(self.folder / "export")
        loaded = AutoModelForCausalLM.from_pretrained(self.folder / "export").state_dict()
        state = model.full_state_dict()
        assert set(state) == set(loaded)
        assert [name for name in state if not torch.equal(state[name], loaded[name])] == []

    def test_a_resumed_run_continues_the_loss_curve(self) -> None:
        whole = self._run_job(self.folder / "whole", steps=4)
        self._run_job(self.folder / "parts", steps=2)
        parts = self._run_job(self.folder / "parts", steps=4)
        assert [line["step"] for line in parts] == [1, 2, 3, 4]
        for ours, theirs in zip(parts, whole, strict=True):
            assert abs(ours["loss"] - theirs["loss"]) < 1e-3, f"step {ours['step']}"

    def test_tensor_parallelism_computes_as_plain_transformers(self) -> None:
        """Over a group of one, all there is on one GPU: the exchanges run on the device, and nothing is split."""
        mesh = init_device_mesh(pick_device().type, (1,), mesh_dim_names=("tp",))
        for model_type in ("llama", "gpt2"):
            with self.subTest(model_type):
                twin = make_twin(model_type)
                proven = prove_tensor_plan(
                    twin.config, type(twin), None, mesh, sequence_parallel="always", user_recipe={}
                )
                assert {"colwise+region", "rowwise"} & set(proven.recipe.values()), proven.recipe

    def test_tensor_parallel_ranks_fork_the_random_state_of_the_device(self) -> None:
        device, drawn = pick_device(), []
        for rank in (0, 1):
            fork = ForkedRandomness(rank, device.type)
            torch.manual_seed(0)
            fork.enter()
            own = torch.rand(64, device=device)
            fork.leave()
            drawn.append((own, torch.rand(64, device=device)))
        (first, shared), (second, shared_too) = drawn
        assert torch.equal(shared, shared_too)
        assert not torch.isin(first, torch.cat([second, shared])).any()

    def test_the_host_waits_for_nothing_in_a_step(self) -> None:
        """But for one question of Transformers' masks, which is answered for it: are these packed documents?"""
        for compiled in (False, True):
            with self.subTest(compiled=compiled), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler
                config = self._job(self.folder / f"steps-{compiled}", steps=4)
                config.training.global_batch_size = 2 * config.training.local_batch_size
                config.compile.enable = compiled
                config.compile.backend = "inductor" if pick_device().type == "cuda" else "aot_eager"  # seconds
                trainer = Trainer(config)
                try:
                    for _ in range(2):  # with what is allocated and compiled once
                        trainer.train_step()
                    assert trainer._finite.is_late == (trainer.device.type == "cuda")
                    with self._no_waiting():
                        for _ in range(2):
                            result = trainer.train_step()
                    assert result.loss.isfinite()
                finally:
                    trainer.close()

    def test_a_nonfinite_step_is_left_out_on_the_device(self) -> None:
        trainer = Trainer(self._job(self.folder / "nonfinite", steps=4))
        try:
            trainer.train_step()
            before = [parameter.detach().clone() for parameter in trainer.model.hf_model.parameters()]
            forward_backward = trainer.model.forward_backward
            trainer.model.forward_backward = lambda *a, **k: forward_backward(*a, **k) * float("nan")
            with self.assertRaisesRegex(FloatingPointError, "step 2: loss nan"):  # noqa: PT027
                trainer.train_step()
                trainer.train_step()
            for parameter, value in zip(trainer.model.hf_model.parameters(), before, strict=True):
                assert torch.equal(parameter, value)
        finally:
            trainer.close()

    @contextlib.contextmanager
    def _no_waiting(self) -> Iterator[None]:
        """Within the block an operation that makes the host wait for a GPU is an error."""
        on_gpu = pick_device().type == "cuda"
        with unittest.mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None):
            try:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("error")
                yield
            finally:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("default")

    def _train(self, model: HFTransformerModel, steps: int = 3) -> list[float]:
        """Losses of a few AdamW steps on one batch."""
        [optimizer] = build_optimizer(
            model.hf_model.named_parameters(), name="AdamW", lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            implementation="fused",
        )  # fmt: skip
        losses = []
        for _ in range(steps):
            losses.append(model.forward_backward(*make_batch()).item())
            model.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def _run_job(self, dump_folder: Path, *, steps: int) -> list[dict]:
        """Train a job of four steps up to `steps`, resuming what is there; returns the lines of metrics.jsonl."""
        config = self._job(dump_folder, steps=steps)
        config.checkpoint.enable, config.checkpoint.interval = True, 2
        trainer = Trainer(copy.deepcopy(config))
        try:
            trainer.train()
        finally:
            trainer.close()
        return [json.loads(line) for line in (dump_folder / "metrics.jsonl").read_text().splitlines()]

    def _job(self, dump_folder: Path, *, steps: int) -> JobConfig:
        text = self.folder / "text.txt"
        text.write_text("".join(f"The square of {number} is {number * number}.\n" for number in range(2000)))
        config = JobConfig()
        config.job.dump_folder = str(dump_folder)
        config.model.hf_assets_path = "byt5"
        config.hf_transformers.model_type = "llama"
        config.hf_transformers.config_overrides = {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 384,
        }  # fmt: skip
        config.training.dataset_path = str(text)
        config.training.local_batch_size, config.training.seq_len, config.training.steps = 2, 64, steps
        config.lr_scheduler.warmup_steps, config.lr_scheduler.total_steps = 1, 4
        config.metrics.log_freq = 1
        return config


if __name__ == "__main__":
    unittest.main(verbosity=2)
