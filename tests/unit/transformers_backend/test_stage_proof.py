"""What is found out on the tall twin, and that the proof of a split sees what is wrong with it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from transformers_backend import stage_proof
from transformers_backend.stage_proof import TallTwin
from transformers_backend.stages import outer_parameters
from transformers_backend.twin import twin_config

LLAMA = LlamaConfig(num_hidden_layers=4)
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def tall_twin(model_type: str, layers: int = 4) -> TallTwin:
    """Of a config with at least so many layers, and every kind of the model's."""
    config = CONFIG_MAPPING[model_type]()
    return TallTwin(twin_config(config, minimum_layers=layers), MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], None)


def cut(twin: TallTwin, *begins: int) -> list[tuple[str, ...]]:
    return [twin.decoder.layers[a:b] for a, b in itertools.pairwise([0, *begins, len(twin.decoder.layers)])]


# --- the layers


@pytest.mark.parametrize(
    ("model_type", "container"),
    [("llama", None), ("gpt2", None), ("gptj", (tuple, 2)), ("openai-gpt", (list, 1)), ("xlstm", (tuple, 2))],
)
def test_what_layers_return_is_seen(model_type: str, container: tuple[type, int] | None):
    twin = tall_twin(model_type)
    assert twin.look_at_layers().containers == dict.fromkeys(twin.decoder.layers, container)


def test_the_tall_twin_has_the_models_layers():
    facts = TallTwin(LlamaConfig(num_hidden_layers=17), LlamaForCausalLM, None).look_at_layers()
    assert list(facts.containers) == [f"model.layers.{number}" for number in range(17)]
    assert facts.forbidden_cuts == frozenset()


def test_layers_that_share_keys_and_values_stay_together():
    """gemma3n's last 15 of 35 layers use the keys and values of the last two layers before them that compute some."""
    config = CONFIG_MAPPING["gemma3n_text"]()
    facts = TallTwin(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], None).look_at_layers()
    computing = config.num_hidden_layers - config.num_kv_shared_layers
    kinds = config.layer_types[:computing]
    first_used = min(computing - 1 - kinds[::-1].index(kind) for kind in set(kinds))
    assert facts.forbidden_cuts == frozenset(range(first_used + 1, config.num_hidden_layers))


class ReachesBack(LlamaForCausalLM):
    """A model whose fifth layer is given what its first two computed, inside of something."""

    def __init__(self, config):
        super().__init__(config)
        kept = []
        for layer in self.model.layers[:2]:
            layer.register_forward_hook(lambda layer, args, output: kept.append(output.mean()))
        self.model.layers[4].register_forward_pre_hook(
            lambda layer, args, kwargs: (args, {**kwargs, "given": ([kept.pop() + kept.pop()], 1)}), with_kwargs=True
        )


def test_all_cuts_between_a_layer_and_what_it_is_given_are_forbidden():
    facts = TallTwin(LlamaConfig(num_hidden_layers=6), ReachesBack, None).look_at_layers()
    assert facts.forbidden_cuts == {2, 3, 4}, "the first two may be apart: what was made of both is of the second"


def test_a_cut_between_layers_that_share_is_seen_by_the_proof_too():
    twin = tall_twin("gemma3n_text")
    facts = twin.look_at_layers()
    assert min(facts.forbidden_cuts) == 3
    with pytest.raises(ValueError, match="Gemma3nForCausalLM: cut into 2 pipeline stages it computes something else"):
        twin.prove_stages(cut(twin, 4), facts)


def test_layers_that_run_several_times_are_refused():
    with pytest.raises(ValueError, match="HrmTextForCausalLM does not run its layers once") as caught:
        tall_twin("hrm_text").look_at_layers()
    assert "it runs 32 for 8" in str(caught.value)
    assert "parallelism.pipeline_parallel_degree = 1" in str(caught.value)


def test_layers_out_of_order_are_refused():
    class Backwards(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            layers = self.model.layers
            self.model.layers = layers[::-1]
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.model.layers = layers

    with pytest.raises(ValueError, match="Backwards does not run its layers once, one after the other"):
        TallTwin(LLAMA, Backwards, None).look_at_layers()


# --- a twin that does not work


class CannotBeBuilt(LlamaForCausalLM):
    def __init__(self, config):
        raise KeyError("a part that no config has")


class CannotRun(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        raise RuntimeError("sizes do not fit\nand more lines")


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [(CannotBeBuilt, r"be built \(KeyError: 'a part that no config has'\)"),
     (CannotRun, r"run \(RuntimeError: sizes do not fit\)")],
)  # fmt: skip
def test_without_a_twin_a_pipeline_is_refused_in_words(model_class: type[LlamaForCausalLM], reason: str):
    with pytest.raises(ValueError, match=f"a small twin with all of its layers cannot {reason}, so nothing"):
        TallTwin(LLAMA, model_class, None).look_at_layers()


# --- what each stage holds


@pytest.mark.parametrize(
    ("model_type", "first", "last"),
    [
        ("llama", {EMBEDDING}, {NORM, HEAD}),
        ("qwen2", {EMBEDDING}, {NORM, HEAD}),
        ("gemma2", {EMBEDDING}, {NORM, EMBEDDING}),  # tied
        ("nanochat", {EMBEDDING}, {HEAD}),
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"},
         {"transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("openai-gpt", {"transformer.tokens_embed.weight", "transformer.positions_embed.weight"},
         {"transformer.tokens_embed.weight"}),
        ("bloom", {f"transformer.word_embeddings{name}" for name in
                   (".weight", "_layernorm.weight", "_layernorm.bias")},
         {"transformer.word_embeddings.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}),
    ],
)  # fmt: skip
def test_each_stage_holds_what_it_needs(model_type: str, first: set[str], last: set[str]):
    twin = tall_twin(model_type)
    split = twin.prove_stages(cut(twin, 1, 3), twin.look_at_layers())
    assert split.held == (first, frozenset(), last)
    assert split.stages == tuple(cut(twin, 1, 3))


def test_embeddings_of_every_layer_are_held_by_every_stage():
    """gemma4 gives each layer an embedding of the tokens of its own, made from two tables."""
    twin = tall_twin("gemma4_text")
    held = twin.prove_stages(cut(twin, 1, 3), twin.look_at_layers()).held
    per_layer = {f"model.{name}.weight" for name in
                 ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")}  # fmt: skip
    assert [stage & per_layer for stage in held] == [per_layer] * 3
    assert NORM not in held[1]


class SkipsTheLayers(LlamaForCausalLM):
    """A model whose head also sees the tokens' embeddings."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + self.lm_head(self.model.embed_tokens(input_ids))
        return output


def test_a_stage_that_needs_the_embedding_after_the_layers_holds_it():
    twin = TallTwin(LLAMA, SkipsTheLayers, None)
    assert twin.prove_stages(cut(twin, 2), twin.look_at_layers()).held == ({EMBEDDING}, {EMBEDDING, NORM, HEAD})


# --- what the proof sees


@pytest.mark.parametrize(
    ("model_type", "stage", "missing"),
    [("llama", 0, EMBEDDING), ("llama", 1, NORM), ("llama", 1, HEAD), ("gemma2", 1, EMBEDDING),
     ("gpt2", 0, "transformer.wpe.weight"), ("gemma4_text", 1, "model.embed_tokens_per_layer.weight")],
)  # fmt: skip
def test_a_weight_that_is_needed_and_not_held_is_missed(
    model_type: str, stage: int, missing: str, monkeypatch: pytest.MonkeyPatch
):
    """Such a split is not exact, and every stage then holds everything, which is always enough."""
    find = stage_proof._outer_parameters_with_gradient

    def without(run):
        held = find(run)
        assert missing in held[stage]
        held[stage] -= {missing}
        return held

    twin = tall_twin(model_type)
    facts, everything = twin.look_at_layers(), frozenset(outer_parameters(twin._plain, twin.decoder))
    split = twin.prove_stages(cut(twin, 2), facts)
    held = [names - {missing} if number == stage else names for number, names in enumerate(split.held)]
    assert twin._difference(dataclasses.replace(split, held=tuple(held))).startswith("loss nan instead of ")
    monkeypatch.setattr(stage_proof, "_outer_parameters_with_gradient", without)
    assert twin.prove_stages(cut(twin, 2), facts).held == (everything, everything)


@pytest.mark.parametrize("wrong", [(tuple, 2), (list, 1)])
def test_stand_ins_that_return_something_else_are_refused(wrong: tuple[type, int]):
    twin = tall_twin("llama")
    facts = dataclasses.replace(twin.look_at_layers(), containers=dict.fromkeys(twin.decoder.layers, wrong))
    with pytest.raises(ValueError, match=r"cut into 2 pipeline stages it computes something else \(\w+Error: "):
        twin.prove_stages(cut(twin, 2), facts)


class FlattensTokens(LlamaForCausalLM):
    """A model whose layers get (batch x seq, hidden)."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_forward_pre_hook(lambda layer, args: (args[0].flatten(0, 1),))
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states.view(2, -1, 64)


def test_hidden_states_of_a_shape_that_a_pipeline_does_not_send_are_refused():
    with pytest.raises(
        ValueError, match=r"are \(\d+, 64\) for tokens \(2, \d+\), where .* \(\.\.\., batch, seq, hidden\)"
    ):
        TallTwin(LLAMA, FlattensTokens, None).look_at_layers()


def test_stages_that_leave_out_a_layer_are_refused():
    twin = tall_twin("llama")
    parts = cut(twin, 2)
    with pytest.raises(ValueError, match=r"computes something else \(loss \d+\.\d+ instead of \d+\.\d+\)"):
        twin.prove_stages([parts[0][:1], parts[1]], twin.look_at_layers())


class PassesNotes(LlamaForCausalLM):
    """A model whose head uses what the first layer left in a place that every part of the model can see."""

    keeps_graph = True

    def __init__(self, config):
        super().__init__(config)
        self.notes = {}
        self.model.layers[0].register_forward_hook(self._write)

    def _write(self, layer, args, output):
        self.notes["note"] = output if self.keeps_graph else output.detach()

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + self.lm_head(self.notes["note"])
        return output


class PassesDetachedNotes(PassesNotes):
    keeps_graph = False


@pytest.mark.parametrize("model_class", [PassesNotes, PassesDetachedNotes])
def test_what_passes_between_stages_beside_the_hidden_states_is_refused(model_class: type[PassesNotes]):
    """The proof is in one process, where it is still there; ranks of a run would not have it."""
    twin = TallTwin(LLAMA, model_class, None)
    with pytest.raises(
        ValueError, match=f"{model_class.__name__}: cut into 2 pipeline stages it computes something else"
    ):
        twin.prove_stages(cut(twin, 2), twin.look_at_layers())


def test_the_proof_leaves_random_numbers_and_the_config_alone():
    before, state = LLAMA.to_dict(), torch.get_rng_state()
    twin = TallTwin(LLAMA, LlamaForCausalLM, None)
    with torch.no_grad():  # gradients are on in the proof, whatever the caller does
        twin.prove_stages(cut(twin, 2), twin.look_at_layers())
    assert LLAMA.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
