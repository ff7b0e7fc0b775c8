"""What the compiler makes of layers and loss: one graph for each kind of layer, none after the first step.

Twins of two layers or more of each kind are trained by a backend that counts the graphs, the runs of each, and the
sizes in them that it takes for changing ones.
"""

from __future__ import annotations

import time

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from parallelize.compile import CompileTimer, apply_compile
from parallelize.config import KERNELS, KernelConfig
from parallelize.kernels.replace import apply_kernels
from transformers_backend.decoder import describe_decoder
from transformers_backend.kernel_plan import choose_kernels
from transformers_backend.loss import install_loss, shift_labels
from transformers_backend.model_args import find_model_class
from transformers_backend.proof import example_batch
from transformers_backend.twin import VOCABULARY_SIZE, build_twin

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# How many of a twin's layers run by each of the graphs. Kinds of layer have other code: attention in a window or in all
# of the sequence, with positions or without; ModernBERT's first layer has no norm before its attention.
LAYERS_BY_GRAPH = {
    **dict.fromkeys(
        (
            "bloom", "falcon", "gemma", "gpt2", "gpt_neox", "gptj", "granite", "llama", "mpt", "nemotron", "olmo2",
            "opt", "phi", "phi3", "qwen2", "qwen3", "stablelm",
        ),
        (2,),
    ),
    **dict.fromkeys(("cohere2", "gemma3_text", "smollm3"), (2, 2)),
    "gemma2": (4,),
    "modernbert-decoder": (1, 1, 2),
}  # fmt: skip
WITH_KERNELS = ("llama", "phi3")


class CountingBackend:
    """Runs graphs as they are."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        """How often each graph has run since `count_anew`."""
        self.changing_sizes = 0
        """Sizes that graphs get as arguments, because they were seen to change."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list):
        number = len(self.runs)
        self.runs.append(0)
        self.changing_sizes += sum(isinstance(value, torch.SymInt) for value in inputs)

        def run(*arguments):
            self.runs[number] += 1
            return graph.forward(*arguments)

        return run

    def count_anew(self) -> None:
        self.runs = [0] * len(self.runs)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def _twin(model_type: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type]()
    return build_twin(config, find_model_class(config, model_type, False), repeat=2).train()


def _batch() -> dict[str, torch.Tensor]:
    input_ids, labels = example_batch()
    return {"input_ids": input_ids, "targets": shift_labels(labels)}


def _step(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """One step of gradient descent."""
    model(**batch).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None


@torch.no_grad()
def _evaluate(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    model.eval()
    model(**batch)
    model.train()


@pytest.mark.parametrize(
    ("model_type", "kernels"),
    [*((name, "none") for name in LAYERS_BY_GRAPH), *((name, "all") for name in WITH_KERNELS)],
)
def test_layers_of_a_kind_share_one_graph_that_the_first_step_makes(
    model_type: str, kernels: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("parallelize.kernels.language._interpreted", False)  # of kernels the plain-torch references run
    model, batch, backend, expected = _twin(model_type), _batch(), CountingBackend(), list(LAYERS_BY_GRAPH[model_type])
    decoder = describe_decoder(model)
    install_loss(model, decoder, chunked=False)
    if kernels == "all":
        plan = choose_kernels(model, KernelConfig(list(KERNELS)), torch.device("cpu"), torch.float32, is_compiled=True)
        torch.compiler.reset()
        assert len({kernel.kernel for kernel in plan.kernels.values()}) > 1
        apply_kernels(model, plan.kernels)
    apply_compile([model.get_submodule(name) for name in decoder.layers], backend=backend)
    assert len(decoder.layers) == sum(expected)
    none = [0] * len(expected)

    _step(model, batch)
    assert sorted(backend.runs) == expected
    for _ in range(2):
        backend.count_anew()
        _step(model, batch)
        assert sorted(backend.runs) == expected, "compiled again"
    for _ in range(2):  # without gradients it is other code
        backend.count_anew()
        _evaluate(model, batch)
        assert backend.runs[: len(none)] == none
        assert sorted(backend.runs[len(none) :]) == expected
    backend.count_anew()
    _step(model, batch)
    assert sorted(backend.runs[: len(none)]) == expected
    assert backend.runs[len(none) :] == none, "an evaluation has changed what training runs"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert backend.changing_sizes == 0


def test_the_loss_has_one_graph():
    model, backend = _twin("llama"), CountingBackend()
    decoder = describe_decoder(model)
    batch = _batch()  # 48 tokens
    install_loss(model, decoder, chunked=True, compile_backend=backend, chunk_elements=10 * VOCABULARY_SIZE)
    for _ in range(2):
        backend.count_anew()
        _step(model, batch)
        assert backend.runs == [6], "five chunks were of two sizes"
    for _ in range(2):
        _evaluate(model, batch)
    backend.count_anew()
    _step(model, batch)
    assert backend.runs[0] == 6
    assert not any(backend.runs[1:])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert backend.changing_sizes == 0


def test_time_of_compiling_is_that_of_first_steps():
    compiling_seconds = 0.2

    def slow_backend(graph: torch.fx.GraphModule, inputs: list):
        time.sleep(compiling_seconds)
        return graph.forward

    model, batch = _twin("llama"), _batch()
    decoder = describe_decoder(model)
    install_loss(model, decoder, chunked=False)
    apply_compile([model.get_submodule(name) for name in decoder.layers], backend=slow_backend)
    with CompileTimer() as timer:
        for run in (_step, _evaluate):  # without gradients layers are compiled once more
            start = time.perf_counter()
            run(model, batch)
            assert compiling_seconds <= timer.take() <= time.perf_counter() - start
            run(model, batch)
            assert timer.take() == 0
    torch.compiler.reset()
    _step(model, batch)
    assert timer.take() == 0, "after the block"
