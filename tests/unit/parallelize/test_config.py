"""Every rule of the parallelism, activation checkpointing and compile sections, and the sentence it is told in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import accelerate
import pytest
from accelerate.utils import TorchContextParallelConfig, TorchTensorParallelConfig

from parallelize.config import (
    PIPELINE_SCHEDULES,
    TENSOR_PARALLEL_STYLES,
    ZERO_BUBBLE_SCHEDULES,
    ActivationCheckpointConfig,
    CompileConfig,
    KernelConfig,
    ParallelismConfig,
    async_tensor_parallel_problems,
    check,
    choice_problems,
    zero_bubble_problems,
)


def test_defaults_are_sound():
    for config in (ParallelismConfig(), ActivationCheckpointConfig(), CompileConfig(), KernelConfig()):
        assert config.problems() == []


def test_kernels_may_be_one_name():
    assert KernelConfig("auto") == KernelConfig()
    assert KernelConfig("rms_norm") == KernelConfig(["rms_norm"])
    assert KernelConfig("rms_norm").problems() == []
    assert 'kernels.enable has "fast"' in KernelConfig("fast").problems()[0]


def test_defaults_are_the_documented_ones():
    assert ParallelismConfig() == ParallelismConfig(
        data_parallel_replicate_degree=1,
        data_parallel_shard_degree=-1,
        fsdp_reshard_after_forward="default",
        tensor_parallel_degree=1,
        sequence_parallel="auto",
        enable_async_tensor_parallel=False,
        tensor_parallel_plan={},
        pipeline_parallel_degree=1,
        pipeline_parallel_schedule="1F1B",
        pipeline_parallel_schedule_csv="",
        pipeline_parallel_microbatch_size=1,
        pipeline_parallel_layers_per_stage=0,
        pipeline_parallel_first_stage_less_layers=-1,
        pipeline_parallel_last_stage_less_layers=-1,
        module_fqns_per_model_part=[],
        context_parallel_degree=1,
        context_parallel_method="ring",
        context_parallel_ulysses_degree=1,
        context_parallel_layout="zigzag",
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


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("context_parallel_method", ("ring", "allgather", "ulysses")),
        ("context_parallel_layout", ("zigzag", "contiguous")),
    ],
)
def test_choices_of_context_parallelism(name: str, choices: tuple[str, ...]):
    for choice in choices:
        assert ParallelismConfig(context_parallel_degree=2, **{name: choice}).problems() == []
    (problem,) = ParallelismConfig(**{name: "spiral"}).problems()
    allowed = ", ".join(f'"{choice}"' for choice in choices)
    assert problem == f'parallelism.{name} = "spiral": must be one of {allowed}.'


def test_tokens_for_heads_are_exchanged_among_ranks_that_divide_the_degree():
    def problems(ulysses: int, **others) -> list[str]:
        config = {"context_parallel_degree": 8, "context_parallel_ulysses_degree": ulysses, **others}
        return ParallelismConfig(**config).problems()

    assert problems(1) == problems(4) == problems(8) == problems(3, context_parallel_degree=1) == []
    assert problems(0) == [
        "parallelism.context_parallel_ulysses_degree = 0: must be at least 1 (1 means the ring alone)."
    ]
    assert problems(7, context_parallel_method="ulysses") == [
        "parallelism.context_parallel_ulysses_degree = 7: must divide context_parallel_degree = 8; the nearest that "
        "does is 8.",
        'parallelism.context_parallel_ulysses_degree = 7 with context_parallel_method = "ulysses": only around a ring '
        'are tokens exchanged for heads by some of the ranks. Set the method to "ring", or this to 1.',
    ]


# --- pipeline parallelism


@pytest.mark.parametrize("name", [*PIPELINE_SCHEDULES, "1f1b", "GPIPE", "dualpipev"])
def test_a_schedule_is_named_in_any_case(name: str):
    assert ParallelismConfig(pipeline_parallel_degree=4, pipeline_parallel_schedule=name).problems() == []


def test_a_schedule_that_there_is_not_is_told_the_nearest_and_all():
    (problem,) = ParallelismConfig(pipeline_parallel_schedule="zero_bubble").problems()
    assert problem == (
        'parallelism.pipeline_parallel_schedule = "zero_bubble": must be one of GPipe, 1F1B, Interleaved1F1B, '
        'LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV; the nearest is "ZBVZeroBubble".'
    )


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("microbatch_size", 0, "at least 1 (sequences)"),
        ("layers_per_stage", -1, "at least 0 (layers; 0 means by the schedule)"),
        ("first_stage_less_layers", -2, "at least -1 (layers; -1 means by cost)"),
        ("last_stage_less_layers", -2, "at least -1 (layers; -1 means by cost)"),
    ],
)
def test_numbers_of_a_pipeline_have_a_minimum(name: str, value: int, rule: str):
    (problem,) = ParallelismConfig(**{f"pipeline_parallel_{name}": value}).problems()
    assert problem == f"parallelism.pipeline_parallel_{name} = {value}: must be {rule}."
    assert ParallelismConfig(**{f"pipeline_parallel_{name}": value + 1}).problems() == []


def test_a_file_with_a_schedule_must_be_there_where_it_is_used(tmp_path: Path):
    missing = str(tmp_path / "schedule.csv")
    (problem,) = ParallelismConfig(pipeline_parallel_degree=2, pipeline_parallel_schedule_csv=missing).problems()
    assert problem.startswith(f'parallelism.pipeline_parallel_schedule_csv = "{missing}": no such file from ')
    assert ParallelismConfig(pipeline_parallel_schedule_csv=missing).problems() == []
    Path(missing).touch()
    assert ParallelismConfig(pipeline_parallel_degree=2, pipeline_parallel_schedule_csv=missing).problems() == []


def test_a_module_belongs_to_one_part():
    assert ParallelismConfig(module_fqns_per_model_part=[["model.layers.0"], ["lm_head"]]).problems() == []
    problems = ParallelismConfig(module_fqns_per_model_part=[["a", "b"], ["b"], [], ["c", "b"]]).problems()
    assert problems == [
        'parallelism.module_fqns_per_model_part names "b" 3 times: a module belongs to one stage; leave it in one of '
        "them.",
        "parallelism.module_fqns_per_model_part: part 2 has no modules; name some, or leave the part out.",
    ]


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
def test_a_backward_in_halves_and_compiled_layers_are_refused(name: str):
    compiled = CompileConfig(enable=True)
    config = ParallelismConfig(pipeline_parallel_degree=2, pipeline_parallel_schedule=name.lower())
    eager, kept = CompileConfig(), ActivationCheckpointConfig()
    problems = zero_bubble_problems(config, compiled, kept)
    assert bool(problems) == (name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"))
    for problem in problems:
        assert problem.startswith(f'parallelism.pipeline_parallel_schedule = "{name.lower()}": computes the gradients')
        assert "one of GPipe, 1F1B, Interleaved1F1B, LoopedBFS, or set compile.components = [" in problem
    assert zero_bubble_problems(config, eager, kept) == []
    assert zero_bubble_problems(config, CompileConfig(enable=True, components=["loss"]), kept) == []
    assert zero_bubble_problems(dataclasses.replace(config, pipeline_parallel_degree=1), compiled, kept) == []


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
def test_a_backward_in_halves_needs_activations_twice_and_parameters_until_then(name: str):
    config = ParallelismConfig(pipeline_parallel_degree=2, pipeline_parallel_schedule=name)
    for mode, option, refused in (
        ("selective", "op", True),
        ("selective", "2", False),
        ("full", "op", False),
        ("none", "op", False),
    ):
        recompute = ActivationCheckpointConfig(mode=mode, selective_ac_option=option)
        problems = zero_bubble_problems(config, CompileConfig(), recompute)
        assert bool(problems) == (refused and name in ZERO_BUBBLE_SCHEDULES)
        assert all('or set activation_checkpoint.mode = "none"' in problem for problem in problems)
    freed = dataclasses.replace(config, fsdp_reshard_after_forward="always")
    problems = zero_bubble_problems(freed, CompileConfig(), ActivationCheckpointConfig())
    assert bool(problems) == (name in ZERO_BUBBLE_SCHEDULES)
    assert all('"always" frees parameters between the two' in problem for problem in problems)


@pytest.mark.parametrize(("actions", "refused"), [("0F0,0B0\n1F0,1B0\n", False), ("0F0,0I0,0W0\n1F0,1B0\n", True)])
def test_a_file_says_itself_whether_its_backward_is_in_halves(tmp_path: Path, actions: str, refused: bool):
    path = tmp_path / "schedule.csv"
    path.write_text(actions)
    config = ParallelismConfig(
        pipeline_parallel_degree=2, pipeline_parallel_schedule="DualPipeV", pipeline_parallel_schedule_csv=str(path)
    )
    problems = zero_bubble_problems(config, CompileConfig(enable=True), ActivationCheckpointConfig())
    assert len(problems) == refused
    assert all(f'schedule_csv = "{path}" (which has actions I and W)' in problem for problem in problems)


# --- tensor parallelism


@pytest.mark.parametrize("style", TENSOR_PARALLEL_STYLES)
def test_a_plan_of_known_styles_is_sound(style: str):
    plan = {"model.layers.*.mlp.up_proj": style, "lm_head": "vocabulary"}
    for sequence_parallel in ("auto", "always", "never"):
        config = ParallelismConfig(
            tensor_parallel_degree=8, tensor_parallel_plan=plan, sequence_parallel=sequence_parallel
        )
        assert config.problems() == []


def test_a_style_that_there_is_not_is_told_the_nearest_and_all():
    (problem,) = ParallelismConfig(tensor_parallel_plan={"lm_head": "vocab", "model.norm": "replicate"}).problems()
    assert problem == (
        'parallelism.tensor_parallel_plan."lm_head" = "vocab": must be one of colwise, rowwise, packed_qkv, '
        "packed_gate_up, packed_halves, replicate, outside, whole, split, norm_over_heads, vocabulary, region, "
        'whole_region, join, gather, direct; the nearest is "vocabulary".'
    )


def test_words_are_joined_by_plus():
    plan = {"lm_head": "colwise+join", "model.norm": "replicate+juin"}
    (problem,) = ParallelismConfig(tensor_parallel_plan=plan).problems()
    assert '"model.norm" = "replicate+juin"' in problem
    assert problem.endswith('the nearest is "join".')


@pytest.mark.parametrize("pattern", ["", " lm_head"])
def test_a_pattern_is_a_name(pattern: str):
    (problem,) = ParallelismConfig(tensor_parallel_plan={pattern: "split"}).problems()
    assert problem.startswith(f'parallelism.tensor_parallel_plan names "{pattern}": must be the name of a module or')


@pytest.mark.parametrize(
    ("compile", "device_type", "missing"),
    [
        (CompileConfig(enable=True), "cuda", []),
        (CompileConfig(enable=True), None, []),
        (CompileConfig(enable=True, components=["model"]), "cpu", ["CUDA devices"]),
        (CompileConfig(), "cuda", ["compiled layers"]),
        (CompileConfig(enable=True, components=["loss"]), None, ["compiled layers"]),
        (CompileConfig(), "cpu", ["compiled layers", "CUDA devices"]),
    ],
)
def test_asynchronous_tensor_parallelism_needs_cuda_and_compiled_layers(compile, device_type, missing: list[str]):
    config = ParallelismConfig(tensor_parallel_degree=2, enable_async_tensor_parallel=True)
    problems = async_tensor_parallel_problems(config, compile, device_type)
    assert len(problems) == bool(missing)
    for problem in problems:
        assert problem.startswith("parallelism.enable_async_tensor_parallel = true: needs ")
        assert problem.endswith("or set it to false.")
        assert [part for part in ("compiled layers", "CUDA devices") if part in problem] == missing
    assert async_tensor_parallel_problems(dataclasses.replace(config, tensor_parallel_degree=1), compile) == []


def test_choices_are_listed():
    (problem,) = ParallelismConfig(fsdp_reshard_after_forward="sometimes").problems()
    assert problem == (
        'parallelism.fsdp_reshard_after_forward = "sometimes": must be one of "default", "always", "never".'
    )
    (problem,) = ActivationCheckpointConfig(mode="some").problems()
    assert problem == (
        'activation_checkpoint.mode = "some": must be one of "none", "full", "selective", "memory_budget".'
    )
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
        context_parallel_method="x",
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


# --- accelerate's parallelism config


@pytest.fixture(autouse=True)
def _no_settings_of_accelerate(monkeypatch: pytest.MonkeyPatch):
    """Its ParallelismConfig takes what it is not given from the environment."""
    for name in ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE", "TP_SIZE", "CP_SIZE", "CP_COMM_STRATEGY", "SP_SIZE"):
        monkeypatch.delenv(f"PARALLELISM_CONFIG_{name}", raising=False)


_ALL_GATHER = {"context_parallel_degree": 2, "context_parallel_method": "allgather"}  # accelerate's default


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"dp_replicate_size": 2}, {"data_parallel_replicate_degree": 2}),
        ({"dp_shard_size": 4}, {"data_parallel_shard_degree": 4}),
        ({"tp_size": 2}, {"tensor_parallel_degree": 2}),
        ({"tp_size": 2, "tp_handler": TorchTensorParallelConfig()}, {"tensor_parallel_degree": 2}),
        ({"cp_size": 2}, _ALL_GATHER),
        ({"cp_size": 2, "cp_backend": "torch"}, _ALL_GATHER),
        (
            {"cp_size": 2, "cp_handler": TorchContextParallelConfig(cp_comm_strategy="alltoall")},
            {"context_parallel_degree": 2, "context_parallel_method": "ring"},
        ),
        ({"cp_handler": TorchContextParallelConfig(cp_comm_strategy="alltoall")}, {}),  # without effect at cp_size 1
        ({"sp_size": 1, "sp_backend": "deepspeed"}, {}),
        (
            {"dp_replicate_size": 2, "dp_shard_size": 4, "tp_size": 8},
            {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4, "tensor_parallel_degree": 8},
        ),
    ],
    ids=str,
)
def test_accelerates_sizes_are_taken_as_they_are(theirs: dict, ours: dict):
    found = ParallelismConfig.from_accelerate(accelerate.ParallelismConfig(**theirs))
    assert found == ParallelismConfig(**{"data_parallel_shard_degree": 1, **ours}), "dp_shard_size 1 is not our -1"


def _newer(**changes) -> object:
    """An accelerate.ParallelismConfig of a later version, with an axis that this one does not have."""
    fields = [(name, int, dataclasses.field(default=1)) for name in changes]
    kind = dataclasses.make_dataclass("ParallelismConfig", fields, bases=(accelerate.ParallelismConfig,))
    return kind(**changes)


def _later_strategy() -> TorchContextParallelConfig:
    handler = TorchContextParallelConfig()
    handler.cp_comm_strategy = "carousel"
    return handler


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: accelerate.ParallelismConfig(sp_size=2), "sp_size = 2: the sequence parallelism of DeepSpeed is not"),
        (
            lambda: accelerate.ParallelismConfig(cp_size=2, cp_handler=_later_strategy()),
            'cp_handler.cp_comm_strategy = "carousel": this version here does not know that way',
        ),
        (
            lambda: _newer(ep_size=4),
            "ep_size = 4: accelerate's ParallelismConfig has it, but this version here does not",
        ),
        (lambda: None, "got NoneType, which is not an accelerate.ParallelismConfig; pass one, or write Parallelism"),
        (lambda: None, "An Accelerator's parallelism_config is None where none was given to it."),
        (lambda: {"tp_size": 2}, "got dict, which is not an accelerate.ParallelismConfig"),
        (ParallelismConfig, "got ParallelismConfig, which is not an accelerate.ParallelismConfig"),
        (lambda: accelerate.ParallelismConfig, "got type, which is not an accelerate.ParallelismConfig"),
    ],
)
def test_what_accelerate_says_without_counterpart_is_refused_by_name(config, message: str):
    with pytest.raises(ValueError, match="accelerate") as caught:
        ParallelismConfig.from_accelerate(config())
    assert message in str(caught.value)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_asynchronous_tensor_parallelism_of_accelerate_carries_over(tp_size: int):
    with pytest.warns(UserWarning, match="Async tensor parallelism is currently not supported"):
        handler = TorchTensorParallelConfig(enable_async_tp=True)
    theirs = accelerate.ParallelismConfig(tp_size=tp_size, tp_handler=handler)
    ours = ParallelismConfig.from_accelerate(theirs)
    assert (ours.tensor_parallel_degree, ours.enable_async_tensor_parallel) == (tp_size, tp_size > 1)


def test_an_axis_of_a_later_accelerate_that_is_not_used_does_no_harm():
    assert ParallelismConfig.from_accelerate(_newer(ep_size=1)) == ParallelismConfig(data_parallel_shard_degree=1)


def test_sizes_from_accelerate_meet_the_same_rules():
    assert ParallelismConfig.from_accelerate(accelerate.ParallelismConfig(tp_size=2)).problems() == []
    assert ParallelismConfig.from_accelerate(accelerate.ParallelismConfig(cp_size=2)).problems() == []
