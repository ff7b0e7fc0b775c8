"""Shows how a run's layers are split over a pipeline: python scripts/plan_pipeline.py [CONFIG.toml] [--plot FILE.png]

CONFIG.toml and options are those of scripts/train.sh, such as --parallelism.pipeline_parallel_degree 4. It prints a
table of the stages and the share of time in which ranks are idle, and with --plot it draws who computes what when. One
process and no GPU are needed: only the model's config is read, and communication takes no time here.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

from parallelize.pipeline_parallel.schedules import bubble_share, canonical_name
from parallelize.pipeline_parallel.split import StageShare
from parallelize.pipeline_parallel.timeline import Slot
from scripts.plot import matplotlib_figure
from transformers_backend.decisions import proven_attention
from transformers_backend.decoder import describe_decoder
from transformers_backend.job_config import JobConfig, load_job_config
from transformers_backend.model_args import HFTransformerModelArgs, build_on_meta
from transformers_backend.pipeline_plan import plan_pipeline
from transformers_backend.run_summary import stage_table

# Colours that stay apart for colour-blind readers and in print (Okabe and Ito, https://jfly.uni-koeln.de/color/).
COLOURS = {"forward": "#56B4E9", "backward": "#E69F00", "backward_input": "#009E73", "backward_weight": "#CC79A7"}
NAMES = {"backward_input": "backward of inputs", "backward_weight": "backward of weights"}
INK, IDLE = "#333333", "#EEEEEE"
# Of a picture: inches, and points that a digit takes.
WIDTH, DIGIT = 14.0, 4.6


@dataclass(frozen=True)
class Plan:
    """What is known of a pipeline before it runs."""

    name: str
    """Of the schedule."""
    stages: list[StageShare]
    ranks: list[int]
    """Of each stage."""
    micro_batches: int
    timeline: list[list[Slot]]
    """For each rank; a unit of time is the mean forward of a stage."""


def make_plan(config: JobConfig) -> Plan:
    """Split the model that a config names. Raises a ValueError for what cannot be a pipeline."""
    parallelism = config.parallelism
    if parallelism.pipeline_parallel_degree == 1:
        raise ValueError(
            "parallelism.pipeline_parallel_degree = 1: there is nothing to split; set it to the number of ranks that "
            "the layers are split over."
        )
    model_args = HFTransformerModelArgs().update_from_config(config)
    hf_model = build_on_meta(*model_args.resolve(), model_args)
    pipeline = plan_pipeline(
        hf_model, describe_decoder(hf_model), proven_attention(model_args.attn_implementation), parallelism,
        config.training.seq_len,
    )  # fmt: skip
    schedule, csv = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_schedule_csv
    micro_batches = config.training.local_batch_size // parallelism.pipeline_parallel_microbatch_size
    return Plan(
        name=Path(csv).name if csv else canonical_name(schedule),
        stages=list(pipeline.shares),
        ranks=list(pipeline.rank_of_stage),
        micro_batches=micro_batches,
        timeline=pipeline.timeline(parallelism, micro_batches),
    )


def describe(plan: Plan) -> list[str]:
    """The lines that are printed."""
    slowest = max(plan.stages, key=lambda share: share.share)
    return [
        f"{plan.name}: {len(plan.stages)} stages on {len(plan.timeline)} ranks, {plan.micro_batches} micro-batches",
        "",
        *stage_table(plan.stages, plan.ranks),
        "",
        f"idle: {bubble_share(plan.timeline):.1%} of the ranks' time, without communication",
        f"the slowest stage, {slowest.stage}, takes {slowest.share * len(plan.stages):.2f} x the mean",
    ]


# --- the picture


def draw(plan: Plan, output: Path) -> None:
    """Write the timeline of the ranks as a PNG."""
    figure_class = matplotlib_figure()
    ranks, end = len(plan.timeline), max(slot.end for slots in plan.timeline for slot in slots)
    figure = figure_class(figsize=(WIDTH, 1.5 + 0.5 * ranks), dpi=150, layout="constrained", facecolor="white")
    axis = figure.subplots()
    _prepare(axis, plan, end)
    first_stages = [plan.ranks.index(rank) for rank in range(ranks)]
    for rank, slots in enumerate(plan.timeline):
        axis.barh(rank, end, height=0.9, color=IDLE, zorder=1)
        for kind, colour in COLOURS.items():
            for later in (False, True):
                chosen = [slot for slot in slots if slot.kind == kind and (slot.stage != first_stages[rank]) == later]
                axis.broken_barh(
                    [(slot.start, slot.end - slot.start) for slot in chosen], (rank - 0.45, 0.9), zorder=2,
                    facecolors=_lighter(colour) if later else colour, edgecolors="white", linewidth=0.5,
                )  # fmt: skip
        points = 72 * 0.93 * WIDTH / end
        for slot in slots:
            if points * (slot.end - slot.start) >= DIGIT * len(str(slot.micro_batch)) + 2:
                middle = (slot.start + slot.end) / 2
                axis.text(middle, rank, slot.micro_batch, ha="center", va="center", color="black", fontsize=7, zorder=3)
    _add_legend(figure, plan)
    figure.savefig(output)


def _prepare(axis, plan: Plan, end: float) -> None:
    axis.set_title(f"{describe(plan)[0]}; {bubble_share(plan.timeline):.1%} idle", loc="left", color=INK, fontsize=11)
    axis.set_xlabel("time (the mean forward of a stage is 1), communication left out", color=INK)
    axis.set_xlim(0, end)
    axis.set_ylim(len(plan.timeline) - 0.5, -0.5)  # rank 0 on top
    axis.set_yticks(range(len(plan.timeline)), [f"rank {rank}" for rank in range(len(plan.timeline))])
    axis.tick_params(colors=INK, length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def _lighter(colour: str) -> str:
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{(part + 255) // 2:02X}" for part in parts)


def _add_legend(figure, plan: Plan) -> None:
    from matplotlib.patches import Patch

    kinds = {slot.kind for slots in plan.timeline for slot in slots}
    handles = [Patch(color=colour, label=NAMES.get(kind, kind)) for kind, colour in COLOURS.items() if kind in kinds]
    if len(plan.stages) > len(plan.timeline):
        handles.append(Patch(color=_lighter(INK), label="lighter: a rank's later stages"))
    handles.append(Patch(color=IDLE, label="idle"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, labelcolor=INK)


# --- command line


def parse(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Separate the picture to write from the job's arguments."""
    parser = argparse.ArgumentParser(
        prog="scripts/plan_pipeline.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [CONFIG.toml] [--plot FILE.png] [--section.key value ...]", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="picture to write")
    options, job = parser.parse_known_args(arguments)
    return options.plot, job


def main(arguments: list[str] | None = None) -> int:
    output, job = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if output is not None and output.suffix.lower() != ".png":
            raise ValueError(f"--plot {output}: must end in .png.")
        if output is not None and not output.parent.is_dir():
            raise ValueError(f"--plot {output}: there is no folder {output.parent}. Make it, or name another.")
        plan = make_plan(load_job_config(job))
        print("\n".join(describe(plan)))
        if output is not None:
            draw(plan, output)
            print(output)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
