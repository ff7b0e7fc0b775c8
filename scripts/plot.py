"""Draws the loss, throughput and memory of runs to a PNG: python scripts/plot.py RUN [RUN ...] [--output FILE.png]

A RUN is a run's folder (job.dump_folder). It reads `metrics.jsonl` and, where there is one, `validation.jsonl`; a run
that is still going on is drawn as far as it is. Of a step that occurs twice the last line counts. What was measured is
drawn thin, its moving average thick, validation losses as points; what a run did not record is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Colours that stay apart for colour-blind readers and in print (Okabe and Ito, https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")  # one after the other, where there are more runs than colours
INK, GRID = "#333333", "#E5E5E5"
# Fewer measurements than this are drawn as they are.
ENOUGH_TO_SMOOTH = 20
PANELS = (
    # key of metrics.jsonl, title, whether the axis begins at 0
    ("loss", "loss (nats a token)", False),
    ("tokens_per_second", "throughput (tokens/s)", True),
    ("peak_memory_gib", "peak memory (GiB a rank)", True),
)


@dataclass
class Run:
    name: str
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, one a step, in their order."""
    validation: list[dict[str, Any]] = field(default_factory=list)


def read_run(path: Path, name: str) -> Run:
    """Read a run's folder. Raises a ValueError that says what is missing."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder. Name the folder that a run wrote to (job.dump_folder).")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        inside = sorted(file.parent.name for file in path.glob("*/metrics.jsonl"))
        hint = f"there is one in {', '.join(inside)}" if inside else "it appears with a run's first logged step"
        raise ValueError(f"{path}: no metrics.jsonl in this folder; {hint}.")
    lines = read_lines(metrics)
    if not lines:
        raise ValueError(f"{metrics}: holds no step yet.")
    validation = path / "validation.jsonl"
    return Run(name, lines, read_lines(validation) if validation.is_file() else [])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a step: the last that was written, in the order of their steps."""
    by_step: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            by_step[int(record["step"])] = record
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            damaged += 1
    if damaged:
        print(f"{path}: {damaged} damaged lines are left out.", file=sys.stderr)
    return [by_step[step] for step in sorted(by_step)]


def series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key; steps without it, or where it is null, have nan, which shows as a gap."""
    values = [line.get(key) for line in lines]
    numbers = [float(value) if isinstance(value, (int, float)) else math.nan for value in values]
    return [int(line["step"]) for line in lines], numbers


def smoothed(values: list[float], points: int, average: Callable[[list[float]], float]) -> list[float]:
    """The average of the `points` values around each, which does not lag behind as a running one does.

    At the start as few values after a step count as there are before it, because a loss falls steeply there.
    """
    averages = []
    for index, value in enumerate(values):
        reach = min(points // 2, index)
        around = [other for other in values[max(0, index - reach) : index + reach + 1] if not math.isnan(other)]
        averages.append(math.nan if math.isnan(value) else average(around))
    return averages


def names_of(paths: list[Path]) -> list[str]:
    """The folders' names; of folders with the same name as much of the path as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def draw(runs: list[Run], output: Path, *, smooth: int | None) -> None:
    """Write the picture. smooth: points of the moving average; None: a twentieth of the run's, 1: none."""
    figure_class = matplotlib_figure()
    figure = figure_class(figsize=(10, 10), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    axes = figure.subplots(len(PANELS), 1, sharex=True, gridspec_kw={"height_ratios": [2, 1, 1]})
    for axis, (key, label, from_zero) in zip(axes, PANELS, strict=True):
        _prepare(axis, label)
        drawn = [_draw_run(axis, run, key, number, smooth) for number, run in enumerate(runs)]
        if not any(drawn):
            axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color=INK)
        elif from_zero:
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axes[-1].set_xlabel("optimizer step", color=INK)
    _add_legend(figure, axes[0], runs)
    figure.savefig(output)


def matplotlib_figure():
    """matplotlib's class of figures; an ImportError in words where it is not installed."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError(
            "plots need the matplotlib package, which is not installed: pip install matplotlib"
        ) from error
    return Figure


def _prepare(axis, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_title(label, loc="left", color=INK, fontsize=11)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, length=0)
    axis.margins(x=0.01)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _draw_run(axis, run: Run, key: str, number: int, smooth: int | None) -> bool:
    """Draw one curve, and validation losses beside the loss; returns whether there was anything to draw."""
    steps, values = series(run.lines, key)
    style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINE_STYLES[number // len(COLOURS) % 4]}
    known = [value for value in values if not math.isnan(value)]
    points = smooth or max(3, len(known) // 20)
    if key == "peak_memory_gib" or points == 1 or (len(known) < ENOUGH_TO_SMOOTH and smooth is None):
        axis.plot(
            steps, values, linewidth=1.8, marker="o" if len(known) < ENOUGH_TO_SMOOTH else None, markersize=4, **style
        )
    else:
        axis.plot(steps, values, linewidth=0.9, alpha=0.35, **style)
        # One slow step must not bend the throughput around it.
        average = statistics.median if key == "tokens_per_second" else statistics.fmean
        axis.plot(steps, smoothed(values, points, average), linewidth=2.0, **style)
    if key == "loss" and run.validation:
        axis.plot(*series(run.validation, "validation_loss"), linestyle="none", marker="D", markersize=5,
                  color=style["color"], markeredgecolor="white", markeredgewidth=0.8, zorder=4)  # fmt: skip
    return bool(known)


def _add_legend(figure, axis, runs: list[Run]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[n % len(COLOURS)], linestyle=LINE_STYLES[n // len(COLOURS) % 4], linewidth=2.5,
               label=run.name)
        for n, run in enumerate(runs)
    ]  # fmt: skip
    if any(run.validation for run in runs):
        handles.append(Line2D([], [], linestyle="none", marker="D", markersize=5, color="#777777", label="validation"))
    columns = min(len(handles), 4)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=11)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the loss, throughput and memory of runs to a PNG.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that a run wrote to")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="picture to write; by default plot.png in the (first) run"
    )
    parser.add_argument(
        "--smooth", type=int, metavar="POINTS", help="points of the moving average; 1 draws none (default: a twentieth)"
    )
    options = parser.parse_args(arguments)
    output = options.output or options.runs[0] / "plot.png"
    try:
        if output.suffix.lower() != ".png":
            raise ValueError(f"--output {output}: must end in .png.")
        if options.smooth is not None and options.smooth < 1:
            raise ValueError(f"--smooth {options.smooth}: must be at least 1, which draws none.")
        runs = [read_run(path, name) for path, name in zip(options.runs, names_of(options.runs), strict=True)]
        if not output.parent.parent.is_dir():
            raise ValueError(f"--output {output}: there is no folder {output.parent.parent}. Make it, or name another.")
        output.parent.mkdir(exist_ok=True)
        draw(runs, output, smooth=options.smooth)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
