"""A picture of what scripts/benchmark.py measured: bars, a contender a line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # plot.py, from wherever this is imported

from plot import COLOURS, GRID, INK, matplotlib_figure

_OTHERS = "#999999"
_PANELS = (
    # key of a result, title, what the key is divided by, digits
    ("tokens_per_second", "throughput (tokens/s)", 1, 0),
    ("peak_memory", "peak memory (GiB)", 2**30, 2),
    ("first_step_seconds", "first step, compilation included (s)", 1, 1),
)


def draw(report: dict[str, Any], output: Path) -> None:
    """Write the picture. Raises an ImportError in words where matplotlib is not installed."""
    figure_class = matplotlib_figure()
    results = {name: result for name, result in report["results"].items() if "tokens_per_second" in result}
    figure = figure_class(figsize=(13, 1.6 + 0.5 * len(results)), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (key, title, unit, digits) in zip(axes, _PANELS, strict=True):
        values = [result[key] / unit for result in results.values()]
        colours = [
            COLOURS[0] if name == "ours" else COLOURS[5] if name.startswith("ours") else _OTHERS for name in results
        ]
        axis.barh(range(len(values)), values, color=colours, height=0.7)
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:,.{digits}f}", va="center", color=INK, fontsize=9)
        axis.set_title(title, loc="left", color=INK, fontsize=11)
        axis.set_xlim(0, 1.22 * max(values, default=1.0))
        axis.set_yticks(range(len(values)), list(results))
        axis.grid(True, axis="x", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, length=0)
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
        axis.spines["left"].set_color(INK)
    if results:
        axes[0].invert_yaxis()
    figure.suptitle(_title(report), x=0.01, ha="left", color=INK, fontsize=12)
    figure.savefig(output)


def _title(report: dict[str, Any]) -> str:
    machine, settings = report["machine"], report["settings"]
    where = machine["device"] or f"{machine['processor']}, {machine['cores']} cores"
    return (
        f"{report['parameters'] / 1e6:,.0f} million parameters, {settings['batch_size']} x {settings['seq_len']} "
        f"tokens a step, {settings['precision']} on {where}, torch {machine['torch']}, {machine['date']}"
    )
