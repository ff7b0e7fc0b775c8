"""What a user can choose about parallelism, activation checkpointing, compilation and kernels.

These dataclasses are the `[parallelism]`, `[activation_checkpoint]`, `[compile]`, `[float8]` and `[kernels]` sections
of a job's TOML file and the arguments of `HFTransformerModel.parallelize`. Names and meanings follow torchtitan v0.2.2
wherever a field means the same. They are read at the top (`parallelize/model.py`); leaf functions take flat values.

`problems()` returns every violated rule as a sentence that names key, value, rule and remedy, so that a job can
report all of them at once; `check(...)` raises them as one `ValueError` (`checks.py`). Each section has a file of its
own, and `combinations.py` the rules that span them.
"""

from parallelize.config.activation_checkpoint import ActivationCheckpointConfig
from parallelize.config.checks import check, choice_problems
from parallelize.config.combinations import (
    async_tensor_parallel_problems,
    backward_in_halves,
    float8_problems,
    zero_bubble_problems,
)
from parallelize.config.compile import CompileConfig
from parallelize.config.float8 import FLOAT8_RECIPES, Float8Config
from parallelize.config.kernels import KERNELS, KernelConfig
from parallelize.config.parallelism import (
    CONTEXT_PARALLEL_METHODS,
    PIPELINE_SCHEDULES,
    TENSOR_PARALLEL_STYLES,
    ZERO_BUBBLE_SCHEDULES,
    ParallelismConfig,
)

__all__ = [
    "CONTEXT_PARALLEL_METHODS",
    "FLOAT8_RECIPES",
    "KERNELS",
    "PIPELINE_SCHEDULES",
    "TENSOR_PARALLEL_STYLES",
    "ZERO_BUBBLE_SCHEDULES",
    "ActivationCheckpointConfig",
    "CompileConfig",
    "Float8Config",
    "KernelConfig",
    "ParallelismConfig",
    "async_tensor_parallel_problems",
    "backward_in_halves",
    "check",
    "choice_problems",
    "float8_problems",
    "zero_bubble_problems",
]
