"""Shows how ranks share a sequence (context parallelism): python scripts/plot_context.py [--degree 4] [--plot FILE.png]

For contiguous parts and for a zigzag it prints what each rank computes, and what it receives in one layer's attention;
with --plot it draws who computes which (query, key) pairs. All of it comes from the code that the ring runs by
(parallelize/context_parallel/), without processes and without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

from parallelize.context_parallel.exchange import plan_steps
from parallelize.context_parallel.layout import Chunk, SequenceLayout, sequence_length_problems
from parallelize.context_parallel.masks import MaskRule

# Colours that stay apart for colour-blind readers and in print (Okabe and Ito, https://jfly.uni-koeln.de/color/).
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#999999")
INK, UNSEEN = "#333333", "#EEEEEE"
WIDTH, HEIGHT = 11.0, 6.4  # of a picture, in inches
DOTS = 480  # of the drawn square of queries and keys


@dataclass(frozen=True)
class Share:
    """What one rank has and does in a layer's attention."""

    chunks: tuple[int, ...]
    """Numbers of its chunks, counted from the start of the sequence."""
    pairs: int
    """(query, key) pairs that it computes, in one head of one sequence."""
    received: int
    """Chunks of other ranks whose keys and values it receives in the forward."""
    sources: int
    """Ranks that it receives them from."""


def shares_of(layout: SequenceLayout, rule: MaskRule) -> list[Share]:
    """What every rank has and does, in rank order."""
    found = []
    for rank in range(layout.degree):
        own, steps = layout.chunks(rank), plan_steps(layout, rule, rank)
        found.append(
            Share(
                chunks=tuple(chunk.start // layout.chunk_length for chunk in own),
                pairs=sum(_seen_pairs(rule, chunk) for chunk in own),
                received=sum(len(step.receives) for step in steps),
                sources=sum(bool(step.receives) for step in steps),
            )
        )
    return found


def _seen_pairs(rule: MaskRule, queries: Chunk) -> int:
    """Those of all queries of a chunk: query p sees p + 1 keys, or a window of them."""
    window = min(rule.window or queries.stop, queries.stop)
    first_full = max(queries.start, window)  # the first query before which there are more keys than it sees
    return (first_full * (first_full + 1) - queries.start * (queries.start + 1)) // 2 + (
        queries.stop - first_full
    ) * window


def bytes_of_chunk(layout: SequenceLayout, kv_heads: int, head_dim: int, itemsize: int = 2) -> int:
    """Keys and values of one chunk of one sequence, in one layer."""
    return layout.chunk_length * kv_heads * 2 * head_dim * itemsize


def describe(layout: SequenceLayout, rule: MaskRule, kv_heads: int, head_dim: int) -> list[str]:
    """The lines that are printed for one way to share out a sequence."""
    shares, size = shares_of(layout, rule), bytes_of_chunk(layout, kv_heads, head_dim)
    mean = sum(share.pairs for share in shares) / len(shares)
    lines = [
        f"{_name(layout)}: most work / mean {max(share.pairs for share in shares) / mean:.3f}",
        "rank  chunks        work / mean   received, MiB  from ranks",
    ]
    for rank, share in enumerate(shares):
        chunks = ", ".join(map(str, share.chunks))
        received = share.received * size / 2**20
        lines.append(f"{rank:>4}  {chunks:<12}  {share.pairs / mean:>11.3f}  {received:>14,.1f}  {share.sources:>10}")
    return lines


def _name(layout: SequenceLayout) -> str:
    return "zigzag" if layout.is_zigzag else "contiguous"


# --- the picture


def draw(layouts: list[SequenceLayout], rule: MaskRule, output: Path) -> None:
    """Write who computes what, a column for each layout, as a PNG."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError(
            "plots need the matplotlib package, which is not installed: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(3, len(layouts), height_ratios=(0.5, 6, 1.4), squeeze=False)
    for (strip, square, bars), layout in zip(axes.T, layouts, strict=True):
        _draw_strip(strip, layout)
        _draw_square(square, layout, rule)
        _draw_work(bars, layout, rule)
    figure.savefig(output)


def _draw_strip(axis, layout: SequenceLayout) -> None:
    """Which rank has which tokens."""
    axis.set_title(f"{_name(layout)}: the tokens of each rank", loc="left", color=INK, fontsize=11)
    for rank in range(layout.degree):
        for chunk in layout.chunks(rank):
            axis.barh(0, len(chunk), left=chunk.start, height=1, color=COLOURS[rank], edgecolor="white")
            middle = (chunk.start + chunk.stop) / 2
            axis.text(middle, 0, rank, ha="center", va="center", color="black", fontsize=9)
    axis.set_xlim(0, layout.length)
    axis.set_ylim(-0.5, 0.5)
    axis.axis("off")


def _draw_square(axis, layout: SequenceLayout, rule: MaskRule) -> None:
    """Which rank computes which (query, key) pair: the one that has the query."""
    places = torch.arange(DOTS) * layout.length // DOTS
    owners = torch.empty(layout.length, dtype=torch.int64)
    for rank in range(layout.degree):
        for chunk in layout.chunks(rank):
            owners[chunk.start : chunk.stop] = rank
    seen = rule.sees(places[:, None], places[None, :])
    palette = torch.tensor([_parts(colour) for colour in (*COLOURS[: layout.degree], UNSEEN)], dtype=torch.uint8)
    numbers = owners[places][:, None].expand(-1, DOTS).masked_fill(~seen, layout.degree)
    image = palette[numbers].numpy()
    axis.imshow(image, extent=(0, layout.length, layout.length, 0), interpolation="nearest", aspect="auto")
    for number in range(1, layout.chunk_count):
        axis.axhline(number * layout.chunk_length, color="white", linewidth=0.7)
        axis.axvline(number * layout.chunk_length, color="white", linewidth=0.7)
    axis.set_xlabel("keys", color=INK)
    axis.set_ylabel("queries", color=INK)
    _bare(axis)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_work(axis, layout: SequenceLayout, rule: MaskRule) -> None:
    shares = shares_of(layout, rule)
    mean = sum(share.pairs for share in shares) / len(shares)
    ranks = range(layout.degree)
    axis.bar(ranks, [share.pairs / mean for share in shares], color=COLOURS[: layout.degree])
    axis.axhline(1, color=INK, linewidth=0.7, linestyle="--")
    axis.set_ylim(0, 2)
    axis.set_yticks([0, 1, 2])
    axis.set_xticks(ranks, [f"rank {rank}" for rank in ranks] if layout.degree <= 4 else [str(rank) for rank in ranks])
    axis.set_ylabel("work / mean", color=INK)
    _bare(axis)


def _bare(axis) -> None:
    axis.tick_params(colors=INK, length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


# --- command line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/plot_context.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--degree", type=int, default=4, metavar="N", help="ranks that share a sequence (default 4)")
    parser.add_argument("--seq_len", type=int, default=131072, metavar="N", help="tokens of it (default 131072)")
    parser.add_argument("--window", type=int, metavar="N", help="tokens that a query sees; default all before it")
    parser.add_argument("--kv_heads", type=int, default=8, metavar="N", help="key-value heads of a layer (default 8)")
    parser.add_argument("--head_dim", type=int, default=128, metavar="N", help="numbers of a head (default 128)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="picture to write")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    for name in ("degree", "seq_len", "window", "kv_heads", "head_dim"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1.")
    if problems := sequence_length_problems("--seq_len", options.seq_len, options.degree):
        raise ValueError(problems[0])
    if options.plot is None:
        return
    if options.degree > len(COLOURS):
        raise ValueError(f"--degree {options.degree}: a picture has colours for {len(COLOURS)} ranks at most.")
    if options.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot {options.plot}: must end in .png.")
    if not options.plot.parent.is_dir():
        raise ValueError(f"--plot {options.plot}: there is no folder {options.plot.parent}. Make it, or name another.")


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    rule = MaskRule(window=options.window)
    try:
        check(options)
        layouts = [SequenceLayout(options.seq_len, options.degree, is_zigzag) for is_zigzag in (False, True)]
        for layout in layouts:
            print("\n".join([*describe(layout, rule, options.kv_heads, options.head_dim), ""]))
        print("received: keys and values of one layer and sequence in bf16, in the forward")
        if options.plot is not None:
            draw(layouts, rule, options.plot)
            print(options.plot)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
