"""What a job file says about data: sources, stages, workers; the rules, the round trip, and a run with all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs import SEQUENCE, tiny_job
from tests.texts import write_text_files
from transformers_backend import Trainer
from transformers_backend.data import configured_sources
from transformers_backend.job_config import Source, Stage, load_job_config, stage_weights

MINIMAL = '[hf_transformers]\nmodel = "Qwen/Qwen3-0.6B"\n'
MIXTURE = (
    MINIMAL
    + """
[training]
packing = "documents"
[[training.sources]]
name = "web"
dataset = "c4"
weight = 3
[[training.sources]]
name = "code"
dataset_split = "validation"
[[training.stages]]
from_step = 1
sources = ["web"]
[[training.stages]]
from_step = 100
weights = [1, 2.5]
"""
)


def write(folder: Path, text: str) -> str:
    path = folder / "job.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_sources_and_stages_are_read_and_written(tmp_path: Path) -> None:
    config = load_job_config([write(tmp_path, MIXTURE)])
    assert config.training.sources == [
        Source(name="web", dataset="c4", weight=3.0),
        Source(name="code", dataset_split="validation"),
    ]
    assert [type(source.weight) for source in config.training.sources] == [float, float]
    assert config.training.stages == [Stage(1, ["web"]), Stage(100, [], [1.0, 2.5])]
    config.save(tmp_path / "run" / "config.toml")
    assert load_job_config([str(tmp_path / "run" / "config.toml")]) == config


def test_sources_on_the_command_line(tmp_path: Path) -> None:
    sources = '[{name = "x", weight = 2}, {name = "y", dataset_split = "validation"}]'
    config = load_job_config([write(tmp_path, MINIMAL), "--training.sources", sources])
    assert [(source.name, source.weight) for source in config.training.sources] == [("x", 2.0), ("y", 1.0)]


def test_stage_weights_say_what_each_source_has_in_each_stage() -> None:
    sources = [Source(name="a", weight=3.0), Source(name="b"), Source(name="c", weight=0.5)]
    assert stage_weights(sources, []) == [(1, (3.0, 1.0, 0.5))]
    stages = [Stage(1, ["c", "a"], [7.0, 1.0]), Stage(5, ["b"]), Stage(9)]
    assert stage_weights(sources, stages) == [(1, (1.0, 0.0, 7.0)), (5, (0.0, 1.0, 0.0)), (9, (3.0, 1.0, 0.5))]


TWO = '[[training.sources]]\nname = "a"\n[[training.sources]]\nname = "b"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[training.sources]]\nname = 'a'\nweight = 0", r"training.sources[0].weight = 0.0: must be above 0"),
        ("[[training.sources]]\nname = 'a'\nweight = 'x'", r'training.sources[0].weight = "x": must be a number.'),
        ("[[training.sources]]\nwieght = 1", r"training.sources[0].wieght: unknown key; the nearest is weight."),
        ("[[training.sources]]\nweight = 1.0", r'training.sources[0].name = "": must not be empty'),
        ("[[training.sources]]\nname = 'a'\ndataset_path = 'nowhere'", r"training.sources[0].dataset_path = "),
        ("[training]\nsources = ['a']", r'training.sources = ["a"]: must be a list of tables.'),
        ("[training]\nsources = 3", r"training.sources = 3: must be a list of tables."),
        (TWO.replace('"b"', '"a"'), r'training.sources: 2 have the name "a": names must differ'),
        ("[training]\ndataset = 'c4'\n" + TWO, r"training.dataset is set beside training.sources: they exclude"),
        ("[training]\ndataset_path = '.'\n" + TWO, r"training.dataset_path is set beside training.sources"),
        ("[[training.stages]]\nfrom_step = 1", r"training.stages: choose among sources, and there are none"),
        (TWO + "[[training.stages]]\nfrom_step = 2", r"stages[0].from_step = 2: the first stage begins at 1"),
        (
            TWO + "[[training.stages]]\nfrom_step = 1\n[[training.stages]]\nfrom_step = 1",
            r"training.stages[1].from_step = 1: must be at least 2, after the stage before it",
        ),
        (TWO + "[[training.stages]]\nsources = ['x']", r'training.stages[0].sources: "x" is no source; there are a, b'),
        (TWO + "[[training.stages]]\nsources = ['a', 'a']", r"names a source twice"),
        (TWO + "[[training.stages]]\nweights = [1.0]", r"must have one weight for each of the stage's 2 sources"),
        (
            TWO + "[[training.stages]]\nweights = [1.0, -1]",
            r"training.stages[0].weights = [1.0, -1.0]: must all be",
        ),
        (TWO + "[[training.stages]]\nweights = ['x', 1]", r"must be a list of numbers."),
        ("[training]\nnum_workers = -1", r"training.num_workers = -1: must be at least 0."),
        ("[training]\nprefetch_factor = 0", r"training.prefetch_factor = 0: must be at least 1."),
        ("[training]\npacking = 'tight'", r'training.packing = "tight": must be one of "concat", "documents".'),
        ("[validation]\nseq_len = 0", r"validation.seq_len = 0: must be at least 1."),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="Invalid configuration") as raised:
        load_job_config([write(tmp_path, MINIMAL + text)])
    assert message in str(raised.value)


HELD_OUT = "[validation]\nenable = true\n"


@pytest.mark.parametrize(
    "training", ["dataset = 'c4'", "dataset_path = '.'", "[[training.sources]]\nname='a'\ndataset='c4'"]
)
def test_held_out_text_must_be_named_where_training_reads_other_text_than_the_default(tmp_path, training) -> None:
    """It would be the Python standard library, without a word."""
    job = f"{MINIMAL}[training]\n{training}\n{HELD_OUT}"
    with pytest.raises(ValueError, match=r"validation\.dataset is missing: .* is that of python_stdlib, and training"):
        load_job_config([write(tmp_path, job)])
    for named in ("dataset = 'c4'", "dataset = 'python_stdlib'", "dataset_path = '.'"):
        load_job_config([write(tmp_path, job + named)])


def test_held_out_text_of_a_training_on_the_default_is_its_own(tmp_path) -> None:
    for training in ("", "[[training.sources]]\nname='a'\ndataset='c4'\n[[training.sources]]\nname='b'\n"):
        config = load_job_config([write(tmp_path, MINIMAL + training + HELD_OUT)])
        keys = configured_sources(config.validation)[0][""]
        assert (keys.dataset, keys.dataset_split) == ("python_stdlib", "validation")


def test_help_lists_the_keys_of_sources_and_stages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_job_config(["--help"])
    text = capsys.readouterr().out
    assert "--training.sources  (a list of tables; default [])" in text
    assert "Each [[training.sources]] of the TOML file has:\n        name  (a string;" in text
    assert "weight  (a number; default 1.0)\n          Share of the training tokens" in text
    assert "from_step  (an integer; default 1)\n          First step of the stage" in text


def test_a_run_of_sources_and_stages_with_workers_resumes_bit_by_bit(tmp_path: Path) -> None:
    """Two sources, two stages, positions, a worker, validation with the training's own lengths."""
    paths = [
        write_text_files(tmp_path / name, [f"{name} {number} " * (number % 9 + 1) for number in range(40)])
        for name in ("one", "two")
    ]
    changes = {
        "training__dataset_path": None, "training__packing": "documents", "training__num_workers": 1,
        "training__sources": [Source(name=path.name, dataset_path=str(path)) for path in paths],
        "training__stages": [Stage(1, ["one"]), Stage(3, ["one", "two"], [1.0, 3.0])],
        "validation__enable": True, "validation__dataset_path": str(paths[1]), "validation__freq": 4,
        "checkpoint__enable": True, "lr_scheduler__total_steps": 6,
    }  # fmt: skip
    curves, waited = {}, []
    for name, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        trainer = Trainer(tiny_job(tmp_path, name, **changes, training__steps=steps))
        trainer.train()
        waited.append(trainer.data_wait_seconds)
        assert trainer.validation_data.seq_len == SEQUENCE
        assert trainer.validation_data.batch_size == trainer.data.batch_size == 2
        trainer.close()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves[name] = [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]
    assert len(curves["whole"]) == 6
    assert curves["parts"] == curves["whole"]
    assert all(seconds > 0 for seconds in waited)
