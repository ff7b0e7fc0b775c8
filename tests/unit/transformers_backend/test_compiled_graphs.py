"""What the compiler makes of layers and loss: one graph for each kind of layer, none after the first step.

Twins of two layers or more of each kind are trained by a backend that counts the graphs, the runs of each, and the
sizes in them that it takes for changing ones.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from parallelize.compile import CompileTimer, apply_compile
from parallelize.config import KernelConfig
from parallelize.kernels.replace import apply_kernels
from transformers_backend.decoder import describe_decoder
from transformers_backend.kernel_plan import choose_kernels
from transformers_backend.loss import install_loss, shift_labels
from transformers_backend.model_args import find_model_class
from transformers_backend.proof import example_batch
from transformers_backend.twin import VOCABULARY_SIZE, build_twin

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# Model types by the number of kinds of layer that compute by different code: attention in a window or in all of the
# sequence with another mask, with or without positions.
KINDS = {
    **dict.fromkeys(
        (
            "arcee", "bloom", "falcon", "gemma", "gemma2", "glm4", "gpt2", "gpt_neox", "gptj", "granite", "llama",
            "mistral", "mpt", "nemotron", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2",
        ),
        1,
    ),
    **dict.fromkeys(("cohere2", "exaone4", "gemma3_text", "modernbert-decoder", "olmo3", "smollm3"), 2),
}  # fmt: skip
WITH_KERNELS = ("gemma3_text", "llama", "olmo2")


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
    ("model_type", "kernels"), [*((name, ["none"]) for name in KINDS), *((name, ["rms_norm"]) for name in WITH_KERNELS)]
)
def test_layers_of_a_kind_share_one_graph_that_the_first_step_makes(model_type: str, kernels: list[str]):
    model, batch, backend, kinds = _twin(model_type), _batch(), CountingBackend(), KINDS[model_type]
    decoder = describe_decoder(model)
    plan = choose_kernels(model, KernelConfig(kernels), torch.device("cpu"), is_compiled=True)
    assert bool(plan.kernels) == (kernels != ["none"])
    install_loss(model, decoder, chunked=False)
    apply_kernels(model, plan.kernels)
    apply_compile([model.get_submodule(name) for name in decoder.layers], backend=backend)
    layers = len(decoder.layers)
    assert layers >= 2 * kinds

    _step(model, batch)
    assert sorted(backend.runs) == [layers // kinds] * kinds
    for _ in range(2):
        backend.count_anew()
        _step(model, batch)
        assert sorted(backend.runs) == [layers // kinds] * kinds, "compiled again"
    for _ in range(2):  # without gradients it is other code
        backend.count_anew()
        _evaluate(model, batch)
        assert backend.runs == [0] * kinds + [layers // kinds] * kinds
    backend.count_anew()
    _step(model, batch)
    assert backend.runs == [layers // kinds] * kinds + [0] * kinds, "an evaluation has changed what training runs"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert backend.changing_sizes == 0
