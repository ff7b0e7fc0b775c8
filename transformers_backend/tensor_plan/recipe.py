"""Recipes: how the modules of an architecture are split, as {pattern: style word}, whatever the sizes and the degree.

Patterns are names of modules or parameters with "*" for layer numbers. Words are those of `tensor_parallel_plan` in
the configuration; "colwise+region" is a matrix that is a region of its own. What structure leaves open is an ordered
list of ways to split a block, and `search` finds the first that are exact.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from parallelize.config import TENSOR_PARALLEL_STYLES
from parallelize.tensor_parallel.plan import NUMBER, pattern_of

Recipe = dict[str, str]


def starred(name: str) -> str:
    """The name with "*" for every number."""
    return NUMBER.sub(".*", name)


@dataclass(frozen=True)
class Derived:
    """What the structure of a model says about how it may be split."""

    fixed: Recipe
    """Everything outside blocks: embedding, head, norms of layers."""
    blocks: dict[str, list[Recipe]]
    """For each block, e.g. "model.layers.*.mlp", the ways to split it, best first. The last is "replicate" for all of
    it, without a region: every rank computes the whole block, which is always exact."""

    def preferring(self, recipe: Recipe) -> Derived:
        """The same with the first way of every block as `recipe` has it, where that differs, before the derived ones.

        Only styles are replaced: what belongs to a style here (where a region is) stays as derived.
        """
        blocks = dict(self.blocks)
        for block, (first, *others) in self.blocks.items():
            way = {pattern: _with_style(words, recipe.get(pattern)) for pattern, words in first.items()}
            if others and way != first:  # a block without a derived way has no region to be split in
                blocks[block] = [way, first, *others]
        return Derived(self.fixed, blocks)

    def unsplit(self, recipe: Recipe) -> list[str]:
        """Blocks that `recipe` leaves whole although they have ways to be split."""
        return [
            block
            for block, ways in self.blocks.items()
            if len(ways) > 1 and ways[-1].items() <= recipe.items() and not ways[0].items() <= recipe.items()
        ]

    def overridden(self, user_recipe: Recipe) -> Derived:
        """The same with the user's words for the patterns that they name, in every way."""
        blocks = {
            block: [{**way, **{key: word for key, word in user_recipe.items() if key in way}} for way in ways]
            for block, ways in self.blocks.items()
        }
        rest = {key: word for key, word in user_recipe.items() if not any(key in way[0] for way in blocks.values())}
        return Derived({**self.fixed, **rest}, blocks)

    def first(self) -> Recipe:
        """The best way of every block."""
        return self.with_ways(0 for _ in self.blocks)

    def with_ways(self, numbers: Iterable[int]) -> Recipe:
        """The recipe with the numbered way of each block; -1 is the replicated one."""
        ways = [self.blocks[block][number] for block, number in zip(self.blocks, numbers, strict=True)]
        return {**self.fixed, **{pattern: words for way in ways for pattern, words in way.items()}}


def _with_style(words: str, style: str | None) -> str:
    own, *modifiers = words.split("+")
    if style is None or style == own or {own, style} <= {"replicate", "whole", "outside", "split"}:
        return words
    return "+".join([style, *modifiers])


def check_users_recipe(user_recipe: Recipe, names: Iterable[str]) -> None:
    """Raise a ValueError for patterns that none of `names`, of modules and parameters, fits, and for unknown words."""
    known = sorted({*names, *map(pattern_of, names)})
    for pattern, words in user_recipe.items():
        if pattern not in known:
            raise ValueError(
                f'parallelism.tensor_parallel_plan names "{pattern}": the model has no such module or parameter. Write '
                f"its name with * for the number of the layer; near ones: {_near(pattern, known)}."
            )
        if unknown := [word for word in words.split("+") if word not in TENSOR_PARALLEL_STYLES]:
            raise ValueError(
                f'parallelism.tensor_parallel_plan."{pattern}" = "{words}": there is no style "{unknown[0]}"; near '
                f"ones: {_near(unknown[0], TENSOR_PARALLEL_STYLES)}."
            )


def _near(word: str, known: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(word, [name for name in known if name], n=3, cutoff=0.0))


def search(try_recipe: Callable[[Recipe], bool], derived: Derived) -> Recipe:
    """The best recipe that `try_recipe` finds exact: True for one that gives the plain model's loss and gradients.

    First the best ways of all blocks together, which is what nearly every model needs. Else each block on its own with
    the others replicated, and then all the found ways together. A ValueError where not even replicated blocks are
    exact.
    """
    if try_recipe(derived.first()):
        return derived.first()
    numbers = [-1] * len(derived.blocks)
    if not try_recipe(derived.with_ways(numbers)):
        raise ValueError("not even with every block of the layers replicated does the model compute the same")
    found = list(numbers)
    for index, ways in enumerate(derived.blocks.values()):
        for way in range(len(ways) - 1):
            numbers[index] = way
            if try_recipe(derived.with_ways(numbers)):
                found[index] = way
                break
        numbers[index] = -1
    if try_recipe(derived.with_ways(found)):
        return derived.with_ways(found)
    for index, way in enumerate(found):  # as many of them as are exact together
        numbers[index] = way
        if not try_recipe(derived.with_ways(numbers)):
            numbers[index] = -1
    return derived.with_ways(numbers)
