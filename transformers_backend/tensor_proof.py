"""The tensor-parallel plan of a model, tried on the twin over the actual tensor-parallel group before it is trusted.

`prove_tensor_plan` runs at every start with tensor parallelism, on all ranks: the twin computes the loss and every
gradient once as plain Transformers does, and once split by the plan. Only a plan that gives the same is used. It costs
tenths of a second, and it is what allows plans to be derived for architectures that nobody wrote one for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.distributed import gather_objects
from parallelize.tensor_parallel import TensorPlan, apply_tensor_parallel
from parallelize.tensor_parallel.vocabulary import VocabularyShard
from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.loss import install_loss
from transformers_backend.module_outputs import first_difference, record_outputs
from transformers_backend.proof import MODEL_ERRORS, difference, example_batch, gradients, loss_and_gradients
from transformers_backend.tensor_plan import (
    DegreeError,
    Derived,
    Recipe,
    check_users_recipe,
    derive,
    make_plan,
    recipe_of_transformers,
    search,
)
from transformers_backend.twin import build_twin
from transformers_backend.weights import full_tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProvenRecipe:
    """Styles by pattern that the twin showed to be exact, see `tensor_plan/`."""

    recipe: Recipe
    sequence_parallel: bool
    no_sequence_parallel_because: str | None


@torch.enable_grad()
def prove_tensor_plan(
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    attn_implementation: str | None,
    mesh: DeviceMesh,
    *,
    sequence_parallel: Literal["auto", "always", "never"],
    user_recipe: Recipe,
) -> ProvenRecipe:
    """Find the recipe for this model and try it over `mesh`, the tensor-parallel one; every rank of it calls this.

    Raises a ValueError that names the first module whose output differs where a plan is not exact, and where
    sequence_parallel is "always" and not exact.
    """
    arguments = (hf_config, model_class, attn_implementation, mesh)
    trial = _Trial(*arguments, twin_degree=mesh.size())
    names = [name for name, _ in (*trial.plain.named_modules(), *trial.plain.named_parameters(remove_duplicate=False))]
    check_users_recipe(user_recipe, names)
    # Heads in a fixed number of groups (CodeGen's four) may need more of them than the twin has, so a second twin is
    # tried where the first has too few, or some block of it does not split.
    try:
        proven, unsplit = _prove(trial, sequence_parallel=sequence_parallel, user_recipe=user_recipe)
    except DegreeError:
        wide = _Trial(*arguments, twin_degree=2 * mesh.size())
        proven, unsplit = _prove(wide, sequence_parallel=sequence_parallel, user_recipe=user_recipe)
    else:
        if unsplit:
            proven, unsplit = _with_wider_twin(
                arguments, proven, unsplit, sequence_parallel=sequence_parallel, user_recipe=user_recipe
            )
    if unsplit:
        logger.warning(
            "No exact way was found to split %s over %d ranks; every rank has all of it.",
            " and ".join(unsplit), mesh.size(),
        )  # fmt: skip
    return proven


def _with_wider_twin(
    arguments: tuple,
    proven: ProvenRecipe,
    unsplit: list[str],
    *,
    sequence_parallel: Literal["auto", "always", "never"],
    user_recipe: Recipe,
) -> tuple[ProvenRecipe, list[str]]:
    """What a twin of twice the width shows, where that leaves fewer blocks whole; the given outcome elsewhere."""
    try:
        wide = _Trial(*arguments, twin_degree=2 * arguments[-1].size())
        other, still_unsplit = _prove(wide, sequence_parallel=sequence_parallel, user_recipe=user_recipe)
    except MODEL_ERRORS:  # no such twin can be built
        return proven, unsplit
    return (other, still_unsplit) if len(still_unsplit) < len(unsplit) else (proven, unsplit)


def _prove(
    trial: _Trial, *, sequence_parallel: Literal["auto", "always", "never"], user_recipe: Recipe
) -> tuple[ProvenRecipe, list[str]]:
    """The recipe for the trial's twin, and the blocks that it leaves whole although they have ways to be split."""
    of_structure = derive(trial.build(), trial.decoder, trial.batch[0])
    derived = of_structure.overridden(user_recipe)
    trial.check_degree(derived.first())
    preferred = of_structure.preferring(recipe_of_transformers(trial.plain, trial.decoder)).overridden(user_recipe)
    if preferred != derived:
        reason = trial.difference(preferred.first(), sequence_parallel=False)
        if reason is None:
            derived = preferred
        else:
            logger.info("Transformers' own tensor-parallel plan is not exact (%s); the derived one is used.", reason)
    # Where the model without it splits at once, the user's part is to blame; elsewhere a way is searched for both.
    first, of_users = of_structure.first(), derived.first()
    if (
        user_recipe
        and not trial.is_exact(of_users, sequence_parallel=False)
        and trial.is_exact(first, sequence_parallel=False)
    ):
        _refuse_users_plan(trial, of_users, user_recipe)
    proven = _search(trial, derived, sequence_parallel=sequence_parallel)
    return proven, derived.unsplit(proven.recipe)


def _search(
    trial: _Trial,
    derived: Derived,
    *,
    sequence_parallel: Literal["auto", "always", "never"],
) -> ProvenRecipe:
    wants_sequence = sequence_parallel != "never"
    if trial.is_exact(derived.first(), sequence_parallel=wants_sequence):
        return ProvenRecipe(derived.first(), wants_sequence, None)
    recipe = search(lambda recipe: trial.is_exact(recipe, sequence_parallel=False), derived)
    if not wants_sequence:
        return ProvenRecipe(recipe, False, None)
    reason = trial.difference(recipe, sequence_parallel=True)
    if reason is not None and sequence_parallel == "always":
        raise ValueError(
            f'parallelism.sequence_parallel = "always": with it {type(trial.plain).__name__} computes something else '
            f'({reason}). Set it to "auto".'
        )
    return ProvenRecipe(recipe, reason is None, None if reason is None else f"it is not exact ({reason})")


def _refuse_users_plan(trial: _Trial, recipe: Recipe, user_recipe: Recipe) -> None:
    reason, module = trial.difference(recipe, sequence_parallel=False), trial.first_difference(recipe)
    where = "" if module is None else f" The first module whose output differs is {module}."
    raise ValueError(
        f"parallelism.tensor_parallel_plan = {user_recipe}: with it the model computes something else ({reason})."
        f"{where} Correct the plan, or leave it out to have one derived."
    )


class _Trial:
    """Runs of one twin: plain once, then split by any recipe."""

    def __init__(
        self,
        hf_config: PreTrainedConfig,
        model_class: type[PreTrainedModel],
        attn_implementation: str | None,
        mesh: DeviceMesh,
        *,
        twin_degree: int,
    ) -> None:
        self._arguments = (hf_config, model_class)
        self._attention = attn_implementation
        self._mesh = mesh
        self._twin_degree = twin_degree
        # One token more than the usual length, which most degrees divide: what sequence parallelism pads is tried, too.
        self.batch = tuple(tensor.to(mesh.device_type) for tensor in example_batch(seq=25))
        self.plain = self.build()
        self.decoder = describe_decoder(self.plain)
        self._expected = loss_and_gradients(self.plain, *self.batch, chunked=False)
        self._tried: dict[tuple, str | None] = {}

    def build(self) -> PreTrainedModel:
        twin = build_twin(*self._arguments, attn_implementation=self._attention, degree=self._twin_degree)
        return twin.to(self._mesh.device_type)

    def check_degree(self, recipe: Recipe) -> None:
        """Raise the DegreeError of a recipe that the degree does not fit; trials show what else is wrong with it."""
        try:
            make_plan(self.plain, self.decoder, recipe, self._mesh.size())
        except DegreeError:
            raise
        except MODEL_ERRORS:
            pass

    def is_exact(self, recipe: Recipe, *, sequence_parallel: bool) -> bool:
        return self.difference(recipe, sequence_parallel=sequence_parallel) is None

    def difference(self, recipe: Recipe, *, sequence_parallel: bool) -> str | None:
        """How loss or gradients of the split twin differ from the plain one's; the same answer on every rank."""
        key = (frozenset(recipe.items()), sequence_parallel)
        if key not in self._tried:
            self._tried[key] = self._try(recipe, sequence_parallel)
        return self._tried[key]

    def _try(self, recipe: Recipe, sequence_parallel: bool) -> str | None:
        try:
            reason = difference(self._expected, self._split_loss_and_gradients(recipe, sequence_parallel))
        except MODEL_ERRORS as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        reasons = gather_objects(reason, self._mesh.get_group())
        return next((reason for reason in reasons if reason is not None), None)

    def first_difference(self, recipe: Recipe) -> str | None:
        """The first module, in order of execution, whose output in the split twin is no part of the plain one's.

        None where none is, so that only gradients differ, or where the plan cannot be carried out.
        """
        plain, twin = self.build(), self.build()
        input_ids, _ = self.batch
        try:
            plan = make_plan(twin, self.decoder, recipe, self._mesh.size())
            vocabulary = vocabulary_shard(twin, self.decoder, plan, self._mesh)
            install_loss(twin, self.decoder, chunked=False, vocabulary=vocabulary)
            apply_tensor_parallel(twin, plan, self._mesh, layers=self.decoder.layers, sequence_parallel=False)
        except MODEL_ERRORS:
            return None
        outputs = [
            record_outputs(model, lambda model=model: model(input_ids=input_ids, use_cache=False))
            for model in (plain, twin)
        ]
        return first_difference(*outputs, plan, self._mesh.get_group())

    def _split_loss_and_gradients(
        self, recipe: Recipe, sequence_parallel: bool
    ) -> tuple[float, dict[str, torch.Tensor]]:
        twin = self.build()
        plan = make_plan(twin, self.decoder, recipe, self._mesh.size())
        loss, _ = loss_and_gradients(
            twin,
            *self.batch,
            chunked=False,
            vocabulary=vocabulary_shard(twin, self.decoder, plan, self._mesh),
            before_run=lambda: apply_tensor_parallel(
                twin, plan, self._mesh, layers=self.decoder.layers, sequence_parallel=sequence_parallel
            ),
        )
        return loss, {name: full_tensor(twin, name, gradient) for name, gradient in gradients(twin).items()}


def vocabulary_shard(
    model: PreTrainedModel, decoder: Decoder, plan: TensorPlan, mesh: DeviceMesh
) -> VocabularyShard | None:
    """This rank's part of the vocabulary, or None where the plan leaves the head whole; before the model is split."""
    if plan.splits[decoder.head].style != "vocabulary":
        return None
    return VocabularyShard.of(model.get_submodule(decoder.head).weight.shape[0], mesh.get_group())
