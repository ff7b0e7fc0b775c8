"""scripts/plan_pipeline.py: the stages that it prints are the model's, its picture shows time, mistakes are named."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from parallelize.config import PIPELINE_SCHEDULES
from parallelize.pipeline_parallel.schedules import bubble_share, timeline
from parallelize.pipeline_parallel.timeline import Slot
from scripts import plan_pipeline
from transformers_backend import load_job_config

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "plan_pipeline.py"
DEGREE = "--parallelism.pipeline_parallel_degree"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"


def config_of(*options: str):
    return load_job_config([DEGREE, "2", *options])


def default_model() -> torch.nn.Module:
    """The default run's, built without this project; its embedding is the head."""
    sizes = load_job_config([]).hf_transformers.config_overrides
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes))


@pytest.mark.parametrize(
    ("options", "layers", "ranks"),
    [
        ((), ["0-1", "2-3"], [0, 1]),
        ((SCHEDULE, "interleaved1f1b"), ["0", "1", "2", "3"], [0, 1, 0, 1]),
        ((SCHEDULE, "ZBVZeroBubble"), ["0", "1", "2", "3"], [0, 1, 1, 0]),
        (("--parallelism.pipeline_parallel_last_stage_less_layers", "2"), ["0-2", "3"], [0, 1]),
        (
            ("--parallelism.module_fqns_per_model_part",
             "model.embed_tokens,model.layers.0;model.layers.1,model.layers.2,model.layers.3,model.norm,lm_head"),
            ["0", "1-3"], [0, 1],
        ),
    ],
)  # fmt: skip
def test_stages_hold_the_model(options: tuple[str, ...], layers: list[str], ranks: list[int]):
    plan = plan_pipeline.make_plan(config_of(*options))
    rows = [line.split() for line in plan_pipeline.describe(plan)[3 : 3 + len(layers)]]
    assert [row[:3] for row in rows] == [[str(n), str(rank), layers[n]] for n, rank in enumerate(ranks)]
    hf_model = default_model()
    embedding = hf_model.model.embed_tokens.weight.numel()
    held = [int(row[3].replace(",", "")) for row in rows]
    assert sum(held) == sum(p.numel() for p in hf_model.parameters()) + embedding, "a tied embedding is on both"
    first = range(int(layers[0][-1]) + 1)
    assert held[0] == embedding + sum(p.numel() for n in first for p in hf_model.model.layers[n].parameters())
    assert sum(float(row[4].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.3)
    assert f"idle: {bubble_share(plan.timeline):.1%} of the ranks' time" in plan_pipeline.describe(plan)[-2]


def test_the_slowest_stage_sets_the_pace():
    plan = plan_pipeline.make_plan(config_of("--parallelism.pipeline_parallel_last_stage_less_layers", "2"))
    slow, fast = (share.share for share in plan.stages)
    # 8 micro-batches: rank 0 is busy from the first to the last backward, but while the last stage has its first.
    end = 8 * 3 * 2 * slow + max(0.0, 3 * 2 * fast - 2 * slow)
    assert max(slot.end for slot in plan.timeline[0]) == pytest.approx(end)
    assert f"the slowest stage, 0, takes {2 * slow:.2f} x the mean" in plan_pipeline.describe(plan)


def test_the_command_prints_and_draws(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "plan.png"
    ran = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, DEGREE, "2", SCHEDULE, "DualPipeV", "--plot", picture],
        cwd=SCRIPT.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("DualPipeV: 4 stages on 2 ranks, 8 micro-batches\n")
    assert ran.stdout.endswith(f"{picture}\n")
    assert {plan_pipeline.IDLE.lower(), *map(str.lower, plan_pipeline.COLOURS.values())} <= colours(picture)


def colours(picture: Path) -> set[str]:
    from matplotlib.image import imread

    pixels = {tuple(round(float(part) * 255) for part in pixel[:3]) for row in imread(picture)[::3] for pixel in row}
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in pixels}


def test_a_file_with_a_schedule_is_planned(tmp_path: Path):
    path = tmp_path / "mine.csv"
    path.write_text("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n")
    options = ("--parallelism.pipeline_parallel_schedule_csv", str(path), "--training.local_batch_size", "1")
    plan = plan_pipeline.make_plan(config_of(*options))
    assert (plan.name, plan.ranks, plan.micro_batches) == ("mine.csv", [0, 1, 1, 0], 1)
    # Forward through 4 stages and back again, of which one rank at a time computes.
    assert bubble_share(plan.timeline) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pipeline_parallel_degree = 1: there is nothing to split"),
        ([DEGREE, "8"], "makes 8 stages on pipeline_parallel_degree = 8 ranks, and the model has 4 layers"),
        ([DEGREE, "2", SCHEDULE, "2F2B"], r'pipeline_parallel_schedule = "2F2B": must be one of GPipe'),
        ([DEGREE, "2", "--plot", "plan.jpg"], r"--plot plan.jpg: must end in .png"),
        ([DEGREE, "2", "--plot", "no/such/plan.png"], r"--plot no/such/plan.png: there is no folder no/such"),
        ([DEGREE, "2", "--parallelism.module_fqns_per_model_part", "model.layers.0;lm_head"], "part 1 has no layer"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    assert plan_pipeline.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(f"error: .*{message}", output.err, re.DOTALL)


# --- docs/how_it_works.md


def documented() -> str:
    return (REPOSITORY / "docs" / "how_it_works.md").read_text().partition("\n## Pipeline parallelism\n")[2]


def most_kept(slots: list[Slot]) -> int:
    """Forwards of a rank whose backward, or half of it, is to come."""
    changes = [{"forward": 1, "backward_input": 0}.get(slot.kind, -1) for slot in slots]
    return max(sum(changes[:end]) for end in range(1, len(changes) + 1))


@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
def test_the_documented_numbers_are_the_scripts(schedule: str):
    """Of 8 layers on 4 ranks with 8 micro-batches."""
    row = next(line for line in documented().splitlines() if line.startswith(f"| `{schedule}` "))
    even, uneven, kept = (cell.strip() for cell in row.split("|")[2:5])
    layers = ("--hf_transformers.config_overrides.num_hidden_layers", "8")
    plan = plan_pipeline.make_plan(load_job_config([DEGREE, "4", SCHEDULE, schedule, *layers]))
    stages = len(plan.stages)
    assert even == f"{bubble_share(timeline(schedule, pp=4, stages=stages, micro_batches=8)):.1%}"
    assert uneven == f"{bubble_share(plan.timeline):.1%}"
    of_ranks = [most_kept(slots) * 4 / stages for slots in plan.timeline]
    assert float(kept.partition(",")[0]) == max(of_ranks)
    assert ("on the last rank 1" in kept) == (of_ranks[-1] == 1)


def test_the_documented_pictures_and_the_schedule_are_there():
    commands = re.findall(r"pipeline_parallel_schedule (\w+) .*?--plot docs/(\S+)", documented(), re.DOTALL)
    assert [picture for _, picture in commands] == re.findall(r"^!\[.*\]\((.*)\)$", documented(), re.MULTILINE)
    assert len(commands) == 4
    for schedule, picture in commands:
        assert picture == f"pipelines/{schedule.lower()}.png"
        assert (REPOSITORY / "docs" / picture).stat().st_size < 100_000
    schedule = (REPOSITORY / "docs" / "pipelines" / "zero_bubble_h1.csv").read_text()
    assert f"```text\n{schedule}```\n" in documented()
