"""Every rule of the parallelism, activation checkpointing and compile sections, and the sentence it is told in."""

from __future__ import annotations

import pytest

from parallelize.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    KernelConfig,
    ParallelismConfig,
    check,
    choice_problems,
)


def test_defaults_are_sound():
    for config in (ParallelismConfig(), ActivationCheckpointConfig(), CompileConfig()):
        assert config.problems() == []
    assert KernelConfig() == KernelConfig()


def test_defaults_are_the_documented_ones():
    assert ParallelismConfig() == ParallelismConfig(
        data_parallel_replicate_degree=1,
        data_parallel_shard_degree=-1,
        fsdp_reshard_after_forward="default",
        tensor_parallel_degree=1,
        pipeline_parallel_degree=1,
        context_parallel_degree=1,
    )
    assert (ActivationCheckpointConfig().mode, CompileConfig().enable) == ("none", False)
    assert CompileConfig().components == ["model", "loss"]
    assert CompileConfig().components is not CompileConfig().components, "no shared default list"


@pytest.mark.parametrize("name", ["data_parallel_replicate_degree", "tensor_parallel_degree",
                                  "pipeline_parallel_degree", "context_parallel_degree"])  # fmt: skip
@pytest.mark.parametrize("value", [0, -1])
def test_degrees_are_at_least_one(name: str, value: int):
    (problem,) = ParallelismConfig(**{name: value}).problems()
    assert problem == f"parallelism.{name} = {value}: must be at least 1 (1 means disabled)."


@pytest.mark.parametrize("value", [0, -2])
def test_shard_degree_is_positive_or_the_rest(value: int):
    (problem,) = ParallelismConfig(data_parallel_shard_degree=value).problems()
    assert problem.startswith(f"parallelism.data_parallel_shard_degree = {value}: must be at least 1, or -1")


@pytest.mark.parametrize("name", ["tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree"])
def test_what_is_not_there_yet_is_refused_with_the_remedy(name: str):
    (problem,) = ParallelismConfig(**{name: 2}).problems()
    assert f"parallelism.{name} = 2" in problem
    assert "set it to 1 and use data_parallel_shard_degree" in problem


def test_choices_are_listed():
    (problem,) = ParallelismConfig(fsdp_reshard_after_forward="sometimes").problems()
    assert problem == (
        'parallelism.fsdp_reshard_after_forward = "sometimes": must be one of "default", "always", "never".'
    )
    (problem,) = ActivationCheckpointConfig(mode="some").problems()
    assert problem == 'activation_checkpoint.mode = "some": must be one of "none", "full", "selective".'
    assert choice_problems("compile", CompileConfig(), "backend", ("inductor",)) == []


@pytest.mark.parametrize("option", ["op", "1", "2", "17", 2])
def test_selective_options(option: str | int):
    assert ActivationCheckpointConfig(mode="selective", selective_ac_option=option).problems() == []


@pytest.mark.parametrize("option", ["0", "-1", "ops", "", "1.5"])
def test_wrong_selective_options(option: str):
    (problem,) = ActivationCheckpointConfig(selective_ac_option=option).problems()
    assert problem.startswith(f'activation_checkpoint.selective_ac_option = "{option}": must be "op" or a positive')


def test_unknown_components_are_named_one_by_one():
    problems = CompileConfig(components=["model", "head", "optimizer"]).problems()
    assert [problem.split(":")[0] for problem in problems] == [
        'compile.components has "head"', 'compile.components has "optimizer"',
    ]  # fmt: skip


def test_all_problems_are_told_at_once():
    config = ParallelismConfig(
        data_parallel_replicate_degree=0,
        data_parallel_shard_degree=0,
        tensor_parallel_degree=2,
        fsdp_reshard_after_forward="x",
    )
    assert len(config.problems()) == 4
    with pytest.raises(ValueError, match="Invalid configuration") as caught:
        check([*config.problems(), *CompileConfig(components=["x"]).problems()])
    lines = str(caught.value).splitlines()
    assert lines[0] == "Invalid configuration:"
    assert len(lines) == 6
    assert all(line.startswith("  - ") for line in lines[1:])


def test_check_of_nothing_passes():
    assert check([]) is None
    assert check(problem for problem in ()) is None
