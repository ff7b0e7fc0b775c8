"""The job config: precedence, the command line, refusals and what they say, torchtitan's files, the round trip."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest

from parallelize.config import TENSOR_PARALLEL_STYLES, ParallelismConfig
from transformers_backend.job_config import HFTransformers, JobConfig, load_job_config, validate
from transformers_backend.job_config.help import field_meanings
from transformers_backend.job_config.values import field_types, to_toml, toml_reader
from transformers_backend.model_args import HFTransformerModelArgs

MINIMAL = '[hf_transformers]\nmodel = "Qwen/Qwen3-0.6B"\n'

# What a torchtitan v0.2.2 user of the Transformers backend brings along.
TORCHTITAN = """
[job]
dump_folder = "./outputs"
custom_config_module = "torchtitan.experiments.transformers_modeling_backend.job_config"
[profiling]
enable_profiling = false
profile_freq = 100
[metrics]
log_freq = 10
enable_wandb = false
[model]
name = "transformers_modeling_backend"
flavor = "full"
tokenizer_path = "Qwen/Qwen3-0.6B"
converters = []
[hf_transformers]
model = "Qwen/Qwen3-0.6B"
[optimizer]
name = "AdamW"
lr = 3e-4
early_step_in_backward = false
[training]
dataset = "c4"
local_batch_size = 1
max_norm = 1
[training.dataloader]
num_workers = 4
pin_memory = true
[parallelism]
data_parallel_shard_degree = -1
pipeline_parallel_schedule = "Interleaved1F1B"
pipeline_parallel_layers_per_stage = 4
module_fqns_per_model_part = [["model.embed_tokens", "model.layers.0"], ["model.norm", "lm_head"]]
expert_parallel_degree = 1
[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"
[compile]
enable = true
components = ["model"]
[quantize.linear.float8]
enable_fsdp_float8_all_gather = false
[experimental]
custom_import = ""
"""


def write(folder: Path, text: str) -> str:
    path = folder / "job.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(folder: Path, text: str, *options: str) -> str:
    with pytest.raises(ValueError, match=r"Invalid configuration|not valid TOML|TOML files") as raised:
        load_job_config([write(folder, text), *options])
    return str(raised.value)


def test_defaults_then_toml_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "[training]\nsteps = 7\nseq_len = 64\n")
    config = load_job_config([path, "--training.steps", "9"])
    assert (config.training.steps, config.training.seq_len, config.training.local_batch_size) == (9, 64, 8)
    assert load_job_config(["--training.steps=9", "--job.config_file", path]) == config


def test_no_file_is_the_default_run() -> None:
    config = load_job_config([])
    assert (config.hf_transformers.model_type, config.model.hf_assets_path) == ("llama", "byt5")
    assert config.job.sample_prompt == "def "
    assert load_job_config(["--training.steps", "10"]).training.steps == 10


@pytest.mark.parametrize(
    ("options", "section", "key", "value"),
    [
        (["--checkpoint.enable"], "checkpoint", "enable", True),
        (["--checkpoint.enable", "false"], "checkpoint", "enable", False),
        (["--checkpoint.enable=True"], "checkpoint", "enable", True),
        (["--checkpoint.no_last_save_in_hf"], "checkpoint", "last_save_in_hf", False),
        (["--checkpoint.load_step", "-1"], "checkpoint", "load_step", -1),
        (["--compile.components", "model,loss"], "compile", "components", ["model", "loss"]),
        (["--compile.components", '["model"]'], "compile", "components", ["model"]),
        (["--compile.components", ""], "compile", "components", []),
        (
            ["--parallelism.module_fqns_per_model_part", "a, b;c"],
            "parallelism",
            "module_fqns_per_model_part",
            [["a", "b"], ["c"]],
        ),
        (
            ["--parallelism.module_fqns_per_model_part", '[["a"], ["b"]]'],
            "parallelism",
            "module_fqns_per_model_part",
            [["a"], ["b"]],
        ),
        (["--lr_scheduler.decay_ratio", "none"], "lr_scheduler", "decay_ratio", None),
        (["--training.max_norm", "inf"], "training", "max_norm", float("inf")),
        (["--optimizer.lr", "1e-3"], "optimizer", "lr", 1e-3),
        (["--optimizer.weight_decay", "0"], "optimizer", "weight_decay", 0.0),
        (["--job.description", "none, or so = it"], "job", "description", "none, or so = it"),
        (["--activation_checkpoint.selective_ac_option", "2"], "activation_checkpoint", "selective_ac_option", "2"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_command_line_values(options: list[str], section: str, key: str, value: object) -> None:
    found = getattr(getattr(load_job_config(options), section), key)
    assert found == value
    assert type(found) is type(value)


def test_command_line_reaches_every_key(tmp_path: Path) -> None:
    default_run = load_job_config([])
    options = [
        f"--{section}.{key}={'none' if value is None else value if isinstance(value, str) else to_toml(value)}"
        for section, values in default_run.to_dict().items()
        for key, value in values.items()
    ]
    other_file = write(tmp_path, MINIMAL + "[debug]\nseed = 1\n")
    assert load_job_config([other_file, *options]) == default_run


def test_command_line_reaches_into_tables() -> None:
    table = "--hf_transformers.config_overrides"
    options = f"{table}.hidden_size 128 {table}.hidden_act=gelu {table}.rope_parameters.rope_theta 1e4"
    options += f" {table}.head_dim none {table}.eos_token_id [1,2]"
    config = load_job_config(options.split())
    overrides = config.hf_transformers.config_overrides
    assert (overrides["hidden_size"], overrides["hidden_act"], overrides["head_dim"]) == (128, "gelu", None)
    assert (overrides["rope_parameters"], overrides["eos_token_id"]) == ({"rope_theta": 1e4}, [1, 2])
    assert overrides["num_hidden_layers"] == 4  # from the file
    assert load_job_config([table, "{vocab_size = 260}"]).hf_transformers.config_overrides == {"vocab_size": 260}


def test_every_style_that_a_plan_may_have_is_in_the_keys_meaning() -> None:
    meaning = field_meanings(ParallelismConfig)["tensor_parallel_plan"]
    assert meaning.endswith(f"Styles: {', '.join(TENSOR_PARALLEL_STYLES)}.")


def test_the_plan_of_tensor_parallelism_has_the_names_of_modules_as_keys(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        MINIMAL
        + """
        [parallelism]
        tensor_parallel_degree = 4
        sequence_parallel = "never"
        disable_loss_parallel = false  # torchtitan's, which has no other value here
        [parallelism.tensor_parallel_plan]
        "model.layers.*.mlp.up_proj" = "colwise"
        "model.layers.*.self_attn.sinks" = "split"
        model.embed_tokens = "vocabulary"  # a table in a table to TOML
        lm_head = "none"
        """,
    )
    options = "--parallelism.tensor_parallel_plan.model.layers.*.self_attn.sinks replicate"
    options += " --parallelism.tensor_parallel_plan.lm_head=vocabulary"
    config = load_job_config([file, *options.split()])
    plan = {
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.self_attn.sinks": "replicate",
        "model.embed_tokens": "vocabulary",
        "lm_head": "vocabulary",
    }
    assert config.parallelism == ParallelismConfig(
        tensor_parallel_degree=4, sequence_parallel="never", tensor_parallel_plan=plan
    )
    config.save(tmp_path / "saved.toml")
    assert load_job_config([str(tmp_path / "saved.toml")]) == config
    whole = ["--parallelism.tensor_parallel_plan", '{"lm_head" = "split"}']
    assert load_job_config([file, *whole]).parallelism.tensor_parallel_plan == {"lm_head": "split"}
    with pytest.raises(ValueError, match=r"--parallelism\.tensor_parallel_plan\.lm_head: needs a value, a string"):
        load_job_config([file, "--parallelism.tensor_parallel_plan.lm_head"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nstepz = 3", "training.stepz: unknown key; the nearest is training.steps."),
        ("[training]\nlr = 3.0", "training.lr: unknown key; the nearest is optimizer.lr."),
        ("[trainning]\nsteps = 3", "trainning.steps: unknown key; the nearest is training.steps."),
        ("[metrics.tb]\nx = 1", "metrics.tb.x: unknown key"),
        ("[[debug]]\nseed = 1", "debug = [{'seed': 1}]: must be a table of keys, [debug]."),
        ("[training]\nsteps = 'ten'", 'training.steps = "ten": must be an integer.'),
        ("[training]\nsteps = true", "training.steps = true: must be an integer."),
        ("[training]\nsteps = 1.5", "training.steps = 1.5: must be an integer."),
        ("[training]\nsteps = 0", "training.steps = 0: must be at least 1."),
        ("[training]\nmax_norm = nan", "training.max_norm = nan: must be above 0"),
        ("[training]\nmax_norm = -inf", "training.max_norm = -inf: must be above 0; inf turns clipping off"),
        ("[optimizer]\nlr = inf", "optimizer.lr = inf: must be a finite number; correct it."),
        ("[optimizer]\nlr = nan", "optimizer.lr = nan: must be a finite number"),
        ("[optimizer]\nweight_decay = inf", "optimizer.weight_decay = inf: must be a finite number"),
        ("[optimizer]\neps = inf", "optimizer.eps = inf: must be a finite number"),
        ("[optimizer]\nbeta1 = nan", "optimizer.beta1 = nan: must be a finite number"),
        ("[lr_scheduler]\nmin_lr_factor = -inf", "lr_scheduler.min_lr_factor = -inf: must be a finite number"),
        ("[training]\ndtype = 'float16'", 'training.dtype = "float16": must be one of "bfloat16", "float32".'),
        ("[training]\nglobal_batch_size = 12", "training.global_batch_size = 12: must be a multiple of"),
        ("[training]\ndataset_path = 'no/such'", 'training.dataset_path = "no/such": no such file or folder'),
        ("[compile]\ncomponents = 3", "compile.components = 3: must be a list of strings."),
        ("[compile]\ncomponents = ['head']", 'compile.components has "head"'),
        ("[optimizer]\nbeta2 = 1.0", "optimizer.beta2 = 1.0: must be in [0, 1)"),
        ("[optimizer]\nname = 'Adam'", 'optimizer.name = "Adam": must be one of "AdamW", "Muon".'),
        ("[lr_scheduler]\ndecay_ratio = 1.5", "lr_scheduler.decay_ratio = 1.5: must be in [0, 1]"),
        ("[lr_scheduler]\ntotal_steps = 5", "lr_scheduler.warmup_steps = 200: must be at most lr_scheduler.total_"),
        ("[checkpoint]\nkeep_latest_k = 1", "checkpoint.keep_latest_k = 1: must be 0 (all) or at least 2"),
        ("[checkpoint]\nasync_mode = 'later'", 'checkpoint.async_mode = "later": must be one of "disabled", "async"'),
        ("[checkpoint]\non_save_error = 'x'", 'checkpoint.on_save_error = "x": must be one of "stop", "continue"'),
        ("[checkpoint]\ninitial_load_path = 'x'", "checkpoint.initial_load_path needs checkpoint.enable = true"),
        ("[checkpoint]\ncreate_seed_checkpoint = true", "checkpoint.create_seed_checkpoint needs checkpoint.enable"),
        ("[checkpoint]\nload_only = true\ncreate_seed_checkpoint = true", "one saves, the other does not"),
        ("[checkpoint]\ninitial_load_in_hf = true", "initial_load_in_hf = true: set checkpoint.initial_load_path"),
        (
            "[checkpoint]\nenable = true\ninitial_load_in_hf = true\ninitial_load_path = 'x'\n"
            "initial_load_model_only = false",
            "checkpoint.initial_load_model_only = false: a Hugging Face folder has weights only",
        ),
        ("[checkpoint]\nexclude_from_loading = ['data']", "checkpoint.exclude_from_loading = ['data']: no parts of a"),
        ("[checkpoint]\ninitial_load_in_hf_quantized = true", "quantized weights are not loaded"),
        ("[model]\nconverters = ['quantize.linear.float8']", "Set float8.enable = true, with float8.recipe and"),
        ("[checkpoint]\nload_step = -2", "checkpoint.load_step = -2: must be at least 0, or -1 for the latest"),
        ("[profiling]\nmax_ranks = 0", "profiling.max_ranks = 0: must be at least 1, or -1 for all ranks."),
        ("[profiling]\nprofile_freq = 3", "profiling.profile_freq = 3: must be at least profiler_warmup + "),
        (
            "[parallelism]\ncontext_parallel_degree = 2\n[training]\nseq_len = 30",
            "training.seq_len = 30: context_parallel_degree = 2 cuts every sequence into 4 equal chunks, so it must "
            "be divisible by 4; the nearest are 28 or 32.",
        ),
        (
            "[parallelism]\ncontext_parallel_degree = 2\n[validation]\nenable = true\nseq_len = 3",
            "validation.seq_len = 3: context_parallel_degree = 2 cuts every sequence into 4 equal chunks, so it must "
            "be divisible by 4; the nearest are 4.",
        ),
        ("[parallelism]\ncontext_parallel_method = 'star'", 'context_parallel_method = "star": must be one of "ring"'),
        ("[parallelism]\ndisable_loss_parallel = true", "parallelism.disable_loss_parallel = true: with tensor"),
        ("[parallelism]\nsequence_parallel = true", 'sequence_parallel = true: must be one of "auto", "always"'),
        ("[parallelism.tensor_parallel_plan]\nlm_head = 1", "lm_head = 1}: must be a table of strings."),
        ("[parallelism.tensor_parallel_plan]\nlm_head = 'column'", 'lm_head" = "column": must be one of colwise, '),
        (
            "[parallelism]\ntensor_parallel_degree = 2\nenable_async_tensor_parallel = true",
            "parallelism.enable_async_tensor_parallel = true: needs compiled layers",
        ),
        ("[parallelism]\nexpert_parallel_degree = 2", "parallelism.expert_parallel_degree = 2: expert parallelism is"),
        ("[validation]\nsteps = 0", "validation.steps = 0: must be at least 1, or -1"),
        ("[model]\nhf_assets_path = './no/such'", 'model.hf_assets_path = "./no/such": no such folder'),
    ],
    ids=lambda text: text if "\n" in text else "",
)
def test_bad_values_are_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, MINIMAL + text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "hf_transformers.model is missing: name a hub id or a local folder"),
        ("model = 'a/b'\nmodel_type = 'llama'", "exactly one of them names the model"),
        ("model = 'a/b/c'", 'hf_transformers.model = "a/b/c": no such folder'),
        ("model = 'a/b'\ninit = 'random'", 'init = "random": must be one of "pretrained", "scratch" or none.'),
        ("model_type = ''", 'hf_transformers.model_type = "": must not be empty'),
        ("model_type = 'lama'", 'Transformers knows no such type; the nearest is "llama"'),
        ("model_type = 'llama'\ninit = 'pretrained'", "a model_type has no weights to load"),
        ("model_type = 'llama'", "model.hf_assets_path is missing"),
    ],
    ids=lambda text: text.replace("\n", " ")[:30],
)
def test_models_that_cannot_be_built(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, f"[hf_transformers]\n{text}")


def test_model_folder_needs_a_config(tmp_path: Path) -> None:
    config = JobConfig(hf_transformers=HFTransformers(model=str(tmp_path)))
    with pytest.raises(ValueError, match=r"the folder has no config\.json"):
        validate(config, world_size=None)
    (tmp_path / "config.json").write_text("{}")
    validate(config, world_size=None)
    config.hf_transformers.revision = "main"
    with pytest.raises(ValueError, match=r'revision = "main": .* is a local folder, which has no revisions; remove it'):
        validate(config, world_size=None)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        MINIMAL + "[training]\nsteps = 0\n[optimizer]\nlr = 'big'\n[nothing]\n",
        "--debug.sed=1", "--comm.init_timeout_seconds", "--steps", "3",
    )  # fmt: skip
    problems = message.splitlines()
    assert problems[0] == "Invalid configuration:"
    for start in (
        "--comm.init_timeout_seconds: needs a value, an integer.",
        "--steps: unknown key; the nearest is --training.steps.",
        "nothing: unknown key",
        "debug.sed: unknown key; the nearest is debug.seed.",
        "training.steps = 0",
        'optimizer.lr = "big": must be a number.',
    ):
        assert sum(problem.startswith(f"  - {start}") for problem in problems) == 1
    assert len(problems) == 7


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "1", "0", "ture"])
def test_a_boolean_takes_true_or_false_only(word: str) -> None:
    with pytest.raises(ValueError, match="Invalid configuration") as raised:
        load_job_config(["--checkpoint.enable", word])
    assert f'checkpoint.enable = "{word}": must be true or false.' in str(raised.value)
    with pytest.raises(ValueError, match="Invalid configuration") as raised:
        load_job_config(["--checkpoint.no_enable", word, "--debug.deterministic"])
    assert f"--checkpoint.no_enable {word}: takes no value; write --checkpoint.no_enable, or" in str(raised.value)


def test_a_file_may_follow_a_boolean(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_job_config(["--checkpoint.enable", path]) == load_job_config([path, "--checkpoint.enable", "true"])
    with pytest.raises(ValueError, match=r"absent\.toml: cannot be read"):
        load_job_config(["--checkpoint.enable", "absent.toml"])


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_job_config([str(tmp_path / "job.toml")]).hf_transformers.model == "Qwen/Qwen3-0.6B"


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    path = write(tmp_path, "[hf_transformers]\nmodel = '~/model'\n[model]\nhf_assets_path = '~/model'")
    with pytest.raises(ValueError, match=r'"~/model": the folder has no config\.json'):
        load_job_config(["~/job.toml"])
    (tmp_path / "model" / "config.json").write_text("{}")
    config = load_job_config(["--job.config_file=~/job.toml"])
    assert load_job_config([path]) == config
    model_args = HFTransformerModelArgs().update_from_config(config)
    assert model_args.model == str(tmp_path / "model")
    assert HFTransformerModelArgs(model="Qwen/Qwen3-0.6B").model == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("training.steps=3", "training.steps=3: cannot be read (No such file or directory); an option begins with two "
         "dashes: --training.steps=3."),
        ("-training.steps", "-training.steps: cannot be read (No such file or directory); an option begins with two"),
        ("20", "20: cannot be read (No such file or directory); name a TOML file such as those in train_configs/. An "
         "option takes one value, a list is a,b."),
        ("tests", "cannot be read (Is a directory); name a TOML file"),
        ("", "an empty argument: cannot be read"),
    ],
)  # fmt: skip
def test_stray_words_are_explained(token: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be read") as raised:
        load_job_config([token, "--training.steps", "3"])
    assert message in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: cannot be read \(No such file or directory\); name a TOML"):
        load_job_config(["none.toml"])
    assert "job.toml: not valid TOML" in refusal(tmp_path, "[training\n")
    assert "2 TOML files" in refusal(tmp_path, MINIMAL, "other.toml")


def test_fields_set_from_python_are_checked() -> None:
    config = JobConfig()
    config.hf_transformers = HFTransformers(model="Qwen/Qwen2.5-7B")
    validate(config, world_size=None)
    config.training.steps = "10"
    config.debug = {"seed": 1}
    config.job.dump_folder = Path("outputs")
    with pytest.raises(ValueError, match="Invalid configuration") as raised:
        validate(config, world_size=None)
    assert 'training.steps = "10": must be an integer.' in str(raised.value)
    assert "debug = {'seed': 1}: must be a Debug." in str(raised.value)
    assert "job.dump_folder = PosixPath('outputs'): must be a string." in str(raised.value)


@pytest.mark.parametrize(
    ("replicate", "shard", "global_batch_size", "world_size", "message"),
    [
        (1, -1, -1, 8, None),
        (2, -1, 64, 8, None),
        (2, 4, 128, 8, None),
        (3, -1, -1, 8, "multiply to 3, which must divide the number of ranks, 8"),
        (2, 2, -1, 8, "multiply to 4, which must equal the number of ranks, 8"),
        (2, -1, 32, 8, "training.global_batch_size = 32: must be a multiple of local_batch_size x data-parallel"),
        (2, 2, 32, None, None),
    ],
)
def test_world_size_rules(replicate: int, shard: int, global_batch_size: int, world_size: int | None, message) -> None:
    config = JobConfig(hf_transformers=HFTransformers(model="Qwen/Qwen3-0.6B"))
    config.parallelism.data_parallel_replicate_degree = replicate
    config.parallelism.data_parallel_shard_degree = shard
    config.training.global_batch_size = global_batch_size
    if message is None:
        validate(config, world_size=world_size)
        return
    with pytest.raises(ValueError, match=message):
        validate(config, world_size=world_size)


@pytest.mark.parametrize(
    ("tensor", "shard", "global_batch_size", "message"),
    [
        (2, -1, 32, None),  # 4 data ranks
        (8, -1, 8, None),  # one
        (2, 4, 64, None),
        (1, -1, 32, "must be a multiple of local_batch_size x data-parallel ranks = 8 x 8;"),
        (2, -1, 48, "must be a multiple of local_batch_size x data-parallel ranks = 8 x 4;"),
        (3, -1, -1, "multiply to 3, which must divide the number of ranks, 8"),
        (2, 8, -1, "multiply to 16, which must equal the number of ranks, 8"),
    ],
)
def test_a_batch_is_shared_by_data_ranks_not_by_tensor_parallel_ones(tensor, shard, global_batch_size, message) -> None:
    config = JobConfig(hf_transformers=HFTransformers(model="Qwen/Qwen3-0.6B"))
    config.parallelism = ParallelismConfig(tensor_parallel_degree=tensor, data_parallel_shard_degree=shard)
    config.training.local_batch_size, config.training.global_batch_size = 8, global_batch_size
    if message is None:
        validate(config, world_size=8)
        return
    with pytest.raises(ValueError, match=message):
        validate(config, world_size=8)


PIPELINE = "[parallelism]\npipeline_parallel_degree = 4\n"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("[training]\nlocal_batch_size = 4\n", []),
        ("[training]\nlocal_batch_size = 3\n", ["training.local_batch_size = 3 in micro-batches of 1: .* at least 4"]),
        ("pipeline_parallel_microbatch_size = 3\n", [r"training.local_batch_size = 8: must be divisible by .* = 3"]),
        ('pipeline_parallel_schedule = "DualPipeV"\n', []),
        ('pipeline_parallel_schedule = "DualPipeV"\npipeline_parallel_microbatch_size = 2\n', ["at least 8, one for"]),
        ('pipeline_parallel_schedule = "zbvzerobubble"\n[compile]\nenable = true\n', ["computes the gradients of"]),
        ('module_fqns_per_model_part = [["a"], ["b"]]\n', ["has 2 parts.* must be exactly 4"]),
        ('[validation]\nenable = true\ndataset = "python_stdlib"\nlocal_batch_size = 2\n', []),  # forward only
    ],
)  # fmt: skip
def test_what_the_pipeline_needs_of_a_batch(tmp_path: Path, text: str, messages: list[str]) -> None:
    path = write(tmp_path, MINIMAL + PIPELINE + text)
    if not messages:
        assert load_job_config([path]).parallelism.pipeline_parallel_degree == 4
        return
    with pytest.raises(ValueError, match="Invalid configuration") as raised:
        load_job_config([path])
    problems = str(raised.value).splitlines()[1:]
    assert len(problems) == len(messages)
    assert all(re.search(message, problem) for message, problem in zip(messages, problems, strict=True))


def test_a_pipeline_schedule_of_a_file_is_read_before_anything_starts(tmp_path: Path) -> None:
    schedule = tmp_path / "schedule.csv"
    options = ["--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "1"]
    options += ["--parallelism.pipeline_parallel_schedule_csv", str(schedule)]
    assert "no such file" in refusal(tmp_path, MINIMAL, *options)
    schedule.write_text("0F0,0B0\n1F0\n")
    assert "stage 1, micro-batch 0: needs one backward" in refusal(tmp_path, MINIMAL, *options)
    schedule.write_text("0F0,0B0\n1F0,1B0\n")
    assert load_job_config([write(tmp_path, MINIMAL), *options]).training.local_batch_size == 1
    assert "must be exactly 1, as the file has them" in refusal(
        tmp_path, MINIMAL, *options, "--training.local_batch_size", "2"
    )


def test_torchtitan_file_loads_unchanged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_job_config([write(tmp_path, TORCHTITAN), "--metrics.no_enable_wandb", "--comm.mode", "default"])
    assert config.model.hf_assets_path == "Qwen/Qwen3-0.6B"  # from tokenizer_path
    assert config.training.max_norm == 1.0
    assert config.training.num_workers == 4  # from the table training.dataloader
    assert config.parallelism.pipeline_parallel_schedule == "Interleaved1F1B"
    assert config.parallelism.pipeline_parallel_layers_per_stage == 4
    assert config.parallelism.module_fqns_per_model_part[1] == ["model.norm", "lm_head"]
    assert (config.compile.components, config.activation_checkpoint.selective_ac_option) == (["model"], "op")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "model.tokenizer_path is deprecated in torchtitan; read as model.hf_assets_path." in warnings
    ignored = {warning.partition(" ")[0] for warning in warnings if warning.endswith("without meaning here; ignored.")}
    assert ignored == {
        "job.custom_config_module", "comm.mode", "model.name",
        "model.flavor", "model.converters",
        "optimizer.early_step_in_backward", "training.dataloader.pin_memory",
        "parallelism.expert_parallel_degree",
        "quantize.linear.float8.enable_fsdp_float8_all_gather", "experimental.custom_import",
    }  # fmt: skip
    assert len(warnings) == len(ignored) + 1


def test_saved_config_loads_to_an_equal_one(tmp_path: Path) -> None:
    text = (
        MINIMAL
        + """[job]
        description = 'tab\t "quotes" \\ é 😀'
        [training]
        max_norm = inf
        [optimizer]
        eps = 1e-20
        [lr_scheduler]
        decay_ratio = 0.2
        [hf_transformers.config_overrides]
        head_dim = "none"
        rope_parameters = {rope_theta = 1e4, "odd key" = [1, "none"]}"""
    )
    config = load_job_config([write(tmp_path, text), "--job.sample_prompt", "a\nb\x7f"])
    config.save(tmp_path / "run" / "config.toml")
    assert load_job_config([str(tmp_path / "run" / "config.toml")]) == config
    assert config.to_dict()["hf_transformers"]["config_overrides"]["head_dim"] is None


def test_toml_values_read_back() -> None:
    table = {"a": [1, 2.5, True, "x"], "b": {"c d": -1e-30, "e": {}}, "": '\'"""\''}
    assert toml_reader().loads(f"value = {to_toml(table)}") == {"value": table}
    with pytest.raises(TypeError, match="of type object cannot be written as TOML"):
        to_toml(object())


def test_none_is_always_the_default() -> None:
    """`to_toml` leaves None out, so that no field may have another default and admit None."""
    for section, values in JobConfig().to_dict().items():
        kinds = field_types(field_types(JobConfig)[section])
        for key, default in values.items():
            assert default is None or "None" not in str(kinds[key]), f"{section}.{key}"


def test_help_lists_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_job_config(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: scripts/train.sh [CONFIG.toml] [--section.key value ...]")
    assert "--training.steps  (an integer; default 10000)\n      Number of optimizer steps of the run.\n" in text
    assert '--validation.dataset_split  (a string; default "validation")' in text
    assert '--compile.components  (a list of strings; default ["model", "loss"])' in text
    flat = " ".join(text.split())
    for section in dataclasses.fields(JobConfig):
        kind = field_types(JobConfig)[section.name]
        for key, meaning in field_meanings(kind).items():
            assert f"--{section.name}.{key} (" in flat
            assert meaning.endswith(".")
            assert meaning in flat
