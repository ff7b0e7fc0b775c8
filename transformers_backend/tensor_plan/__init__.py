"""The tensor-parallel plan of a model: the user's, else Transformers' own translated, else derived from the twin.

Flow: `derive.py` runs the twin once and sees which matrices read a block's input, which feed each other and which
comes last -> a recipe, {pattern: style word}, the form in which users write theirs, with alternatives where structure
leaves something open -> `search` (`recipe.py`) has them tried on the twin (`tensor_proof.py`) -> `make_plan`
(`sizes.py`) works out sizes and head counts for one model and one degree -> `parallelize/tensor_parallel`.
"""

from transformers_backend.tensor_plan.derive import derive
from transformers_backend.tensor_plan.recipe import Derived, Recipe, check_users_recipe, search
from transformers_backend.tensor_plan.sizes import DegreeError, make_plan
from transformers_backend.tensor_plan.transformers_plan import recipe_of_transformers

__all__ = [
    "DegreeError",
    "Derived",
    "Recipe",
    "check_users_recipe",
    "derive",
    "make_plan",
    "recipe_of_transformers",
    "search",
]
