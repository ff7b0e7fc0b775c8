"""scripts/plot_context.py: its numbers are counted anew here, its pictures and the page that shows them agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.masks import MaskRule
from scripts import plot_context

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "plot_context.py"
PAGE = (REPOSITORY / "docs" / "context_parallelism.md").read_text()


def tokens_of(rank: int, degree: int, length: int, is_zigzag: bool) -> set[int]:
    if not is_zigzag:
        return set(range(rank * length // degree, (rank + 1) * length // degree))
    size = length // (2 * degree)
    early = range(rank * size, (rank + 1) * size)
    return {*early, *(length - 1 - token for token in early)}


@pytest.mark.parametrize("is_zigzag", [True, False])
@pytest.mark.parametrize("degree", [2, 3, 8])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 200])
def test_the_numbers_are_those_of_single_tokens(degree: int, window: int | None, is_zigzag: bool):
    length = 96
    layout = SequenceLayout(length, degree, is_zigzag)
    shares = plot_context.shares_of(layout, MaskRule(window=window))
    size = length // layout.chunk_count
    owned = [tokens_of(rank, degree, length, is_zigzag) for rank in range(degree)]
    for rank, share in enumerate(shares):
        seen = [(q, k) for q in owned[rank] for k in range(q + 1) if window is None or q - k < window]
        keys = {key for _, key in seen} - owned[rank]
        assert share.pairs == len(seen)
        assert {token // size for token in owned[rank]} == set(share.chunks)
        assert share.received == len({key // size for key in keys})
        assert share.sources == sum(bool(keys & other) for other in owned)


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_the_formula_of_the_page(degree: int):
    """For a zigzag and a causal mask."""
    layout = SequenceLayout(131072, degree)
    shares = plot_context.shares_of(layout, MaskRule())
    assert "receives `2 (n - 1) - r` chunks" in PAGE
    assert [share.received for share in shares] == [2 * (degree - 1) - rank for rank in range(degree)]
    assert "forward    3/2 n (n - 1) chunks" in PAGE
    assert sum(share.received for share in shares) == 3 * degree * (degree - 1) // 2
    assert max(share.pairs for share in shares) * degree / sum(share.pairs for share in shares) <= 1.02


def test_the_numbers_of_the_page():
    for row in re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE):
        rank, found = int(row[0]), [float(cell) for cell in row[1:]]
        for work, is_zigzag in zip(found, (False, True), strict=True):
            pairs = [s.pairs for s in plot_context.shares_of(SequenceLayout(131072, 4, is_zigzag), MaskRule())]
            assert work == pytest.approx(4 * pairs[rank] / sum(pairs), abs=0.0005)
    chunk = plot_context.bytes_of_chunk(SequenceLayout(131072, 8), kv_heads=8, head_dim=128)
    assert (chunk, 14 * chunk) == (32 * 2**20, 448 * 2**20)
    operations = 4 * 32 * 128 * 131072 / 2 * 16384
    assert "17.6 TFLOP" in PAGE
    assert operations == pytest.approx(17.6e12, rel=0.01)
    assert "13 GB/s" in PAGE
    assert 14 * chunk / (operations / 500e12) == pytest.approx(13e9, rel=0.05)


def test_the_numbers_of_two_levels():
    """32 ranks, in one ring and in a ring of 4 with 8 ranks to a heads group."""
    one, two = SequenceLayout(131072, 32), SequenceLayout(131072, 4)
    sizes = [plot_context.bytes_of_chunk(one, 8, 128), plot_context.bytes_of_chunk(two, 8 // 8, 128)]
    chunks = [plot_context.shares_of(layout, MaskRule())[0].received for layout in (one, two)]
    exchange = 7 / 8 * 131072 / 32 * (32 + 8) * 2 * 128 * 2
    assert (sizes, chunks) == ([8 * 2**20] * 2, [62, 6])
    assert (62 * sizes[0], exchange, 6 * sizes[1] + exchange) == (496 * 2**20, 70 * 2**20, 118 * 2**20)
    page = " ".join(PAGE.split())
    assert "receives 62 chunks of 8 MiB around a ring of 32, 496 MiB. With `u = 8` it receives 6 of them and 70" in page
    assert "118 MiB in all" in page


def test_sequences_of_any_length_are_counted():
    layout = SequenceLayout(2**40, 4)
    assert sum(share.pairs for share in plot_context.shares_of(layout, MaskRule())) == 2**40 * (2**40 + 1) // 2


def test_the_pictures_of_the_page_are_there():
    commands = re.findall(r"plot_context.py .*--plot docs/(\S+)$", PAGE, re.MULTILINE)
    assert (
        commands == re.findall(r"^!\[.*\]\((.*)\)$", PAGE, re.MULTILINE) == ["context/zigzag.png", "context/window.png"]
    )
    for picture in commands:
        assert (REPOSITORY / "docs" / picture).stat().st_size < 100_000


def test_the_command_prints_and_draws(tmp_path: Path):
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    picture = tmp_path / "zigzag.png"
    ran = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, "--degree", "2", "--seq_len", "512", "--plot", picture],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("contiguous: most work / mean 1.499\n")
    assert "\nzigzag: most work / mean 1.000\n" in ran.stdout
    assert ran.stdout.endswith(f"{picture}\n")
    pixels = (torch.tensor(image.imread(picture))[::3, ::3, :3] * 255).round().int().flatten(0, 1).unique(dim=0)
    found = {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in pixels.tolist()}
    assert {*plot_context.COLOURS[:2], plot_context.UNSEEN} <= found
    assert plot_context.COLOURS[2] not in found, "that of a third rank"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--degree", "0"], "--degree 0: must be at least 1"),
        (["--window", "0"], "--window 0: must be at least 1"),
        (["--seq_len", "100", "--degree", "8"], "must be divisible by 16; the nearest are 96 or 112"),
        (["--degree", "16", "--plot", "a.png"], "--degree 16: a picture has colours for 8 ranks at most"),
        (["--plot", "a.jpg"], "--plot a.jpg: must end in .png"),
        (["--plot", "no/such/a.png"], "there is no folder no/such"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    assert plot_context.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
