"""The order of torch's attention kernels: measured on a model's own sizes, and holding while that model computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from transformers import CONFIG_MAPPING, AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from parallelize.attention_backend import AttentionChoice
from parallelize.config import ActivationCheckpointConfig, ParallelismConfig
from parallelize.distributed import initialize, shutdown
from tests.jobs import tiny_job
from transformers_backend import decisions, plan
from transformers_backend.decoder import describe_decoder
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import find_model_class
from transformers_backend.run_summary import describe_run
from transformers_backend.trainer import Trainer

CUDA = torch.device("cuda")
ORDER = tuple(
    getattr(SDPBackend, name)
    for name in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "OVERRIDEABLE", "CUDNN_ATTENTION")
)
CHOICE = AttentionChoice(ORDER, "math; measured, forward and backward: math 1.00 ms")


@pytest.fixture
def group() -> Iterator[None]:
    initialize(torch.device("cpu"), timeout_seconds=60)
    yield
    shutdown()


def _asked(monkeypatch: pytest.MonkeyPatch, model_type: str, degree: int = 1, device=CUDA, **fields) -> tuple | None:
    """What is to be measured for a model, on a device that is said to be a GPU."""
    implementation = fields.pop("attn_implementation", "sdpa")
    config = CONFIG_MAPPING[model_type](num_hidden_layers=2, **fields)
    with torch.device("meta"):
        model = find_model_class(config, model_type, False)._from_config(config, attn_implementation=implementation)
    asked = []
    monkeypatch.setattr(decisions, "choose_attention", lambda *arguments: asked.append(arguments) or CHOICE)
    choice = decisions.choose_attention_order(
        model, describe_decoder(model), device, torch.bfloat16, seq_len=4096, degree=degree
    )
    assert choice == (CHOICE if asked else AttentionChoice())
    return asked[0][:4] if asked else None


def test_a_models_own_sizes_are_measured(monkeypatch: pytest.MonkeyPatch):
    assert _asked(monkeypatch, "llama", num_key_value_heads=8) == (32, 8, 4096, 128)
    assert _asked(monkeypatch, "llama", 4, num_key_value_heads=8) == (8, 2, 4096, 128)
    assert _asked(monkeypatch, "llama", 16, num_key_value_heads=8) == (32, 8, 4096, 128)
    assert _asked(monkeypatch, "gpt2") == (12, 12, 4096, 64)
    assert _asked(monkeypatch, "qwen3", num_key_value_heads=8, head_dim=64) == (32, 8, 4096, 64)


def test_nothing_is_measured_for_other_attention(monkeypatch: pytest.MonkeyPatch):
    assert _asked(monkeypatch, "llama", attn_implementation="eager") is None
    assert _asked(monkeypatch, "llama", device=torch.device("cpu")) is None
    assert _asked(monkeypatch, "minicpm3") is None  # values of another width than keys


def test_the_order_holds_while_the_model_computes_and_a_users_wins(monkeypatch: pytest.MonkeyPatch, group: None):
    seen = []

    def attention(*arguments, **options):
        seen.append(_cur_sdpa_kernel_backends(with_priority=True))
        return sdpa_attention_forward(*arguments, **options)

    monkeypatch.setattr(plan, "choose_attention_order", lambda *_, **__: CHOICE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = HFTransformerModel.wrap(LlamaForCausalLM(config)).parallelize(
        ParallelismConfig(), activation_checkpoint=ActivationCheckpointConfig(mode="full")
    )
    assert model.attention == CHOICE
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attention)
    batch = torch.randint(0, 120, (2, 2, 12))
    before = _cur_sdpa_kernel_backends(with_priority=True)
    model.forward_backward(*batch)
    assert seen == [list(ORDER)] * 2  # once more in the backward, which recomputes it
    seen.clear()
    model.evaluate(*batch)
    assert seen == [list(ORDER)]
    seen.clear()
    with sdpa_kernel([SDPBackend.MATH]):
        model.forward_backward(*batch)
    assert seen == [[SDPBackend.MATH]] * 2
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_the_summary_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, process: None):
    said = []
    monkeypatch.setattr(plan, "choose_attention_order", lambda *_, **options: said.append(options) or CHOICE)
    monkeypatch.setattr("transformers_backend.trainer.describe_run", lambda *a, **k: said.append(describe_run(*a, **k)))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("A line of text.\n" * 200)
    Trainer(tiny_job(tmp_path, "run")).close()
    assert said[0] == {"seq_len": 32, "degree": 1}
    assert f"\nattention   {CHOICE.because}\n" in said[1]


def test_shared_sequences_have_blocks_of_their_own(monkeypatch: pytest.MonkeyPatch, group: None):
    asked = []
    monkeypatch.setattr(plan, "choose_attention_order", lambda *_, **__: asked.append(True) or CHOICE)
    monkeypatch.setattr(plan, "choose_context", lambda *_: SimpleNamespace(check_others=lambda **__: None))
    monkeypatch.setattr(plan, "ParallelPlan", lambda **fields: fields)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    fields = plan.plan_parallelism(
        model, describe_decoder(model), "sdpa", parallelism=ParallelismConfig(),
        activation_checkpoint=ActivationCheckpointConfig(), compile=plan.CompileConfig(), kernels=plan.KernelConfig(),
        float8=plan.Float8Config(), param_dtype=None, seq_len=64, mesh=None,
    )  # fmt: skip
    assert fields["attention"] == AttentionChoice()
    assert not asked
