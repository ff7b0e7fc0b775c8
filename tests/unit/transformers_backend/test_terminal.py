"""The log format by rank, and a progress bar on a terminal that log lines do not break."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from tests.jobs import restored_process
from transformers_backend import train
from transformers_backend.metrics import setup_logging
from transformers_backend.metrics.terminal import ProgressBar, duration


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored_process():
        yield


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_format_and_levels_by_rank(capsys):
    def speak() -> list[str]:
        logging.getLogger("transformers_backend.trainer").info("training starts")
        logging.getLogger("parallelize.fsdp").warning("slow link")
        logging.getLogger("parallelize.fsdp").error("no link")
        logging.getLogger("some_library").info("chatter")
        return capsys.readouterr().err.splitlines()

    setup_logging(0)
    setup_logging(0)  # a second call does not double the lines
    lines = speak()
    assert len(lines) == 3
    assert re.fullmatch(r"\[rank0\] \d\d:\d\d:\d\d training starts", lines[0])
    setup_logging(3)
    lines = speak()
    assert len(lines) == 1, "a warning that every rank comes to is printed once"
    assert re.fullmatch(r"\[rank3\] \d\d:\d\d:\d\d no link", lines[0])


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_a_warning_about_the_config_is_printed_by_one_rank(monkeypatch, capsys, rank: str, times: int):
    monkeypatch.setenv("RANK", rank)
    assert train.main(["--comm.mode", "default", "--training.steps", "0"]) == 2
    warning = f"[rank{rank}] .* comm.mode is a torchtitan key without meaning here; ignored.\n"
    assert len(re.findall(warning.replace("[", "\\["), capsys.readouterr().err)) == times


def test_a_bar_on_a_terminal_with_whole_log_lines_above_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_logging(0)
    bar = ProgressBar(steps_done=2, total_steps=5, enabled=True)
    bar.advance()
    logging.getLogger("transformers_backend").info("a line")
    bar.show("loss 1.25")
    bar.advance()
    bar.advance()
    text = terminal.getvalue()
    logging.getLogger("transformers_backend").info("below it")
    bar.close()
    assert re.search(r"3/5 \[", text), "the steps before the resume count"
    assert re.search(r"\r *\r\[rank0\] \d\d:\d\d:\d\d a line\n", text), "the bar is cleared before the line"
    last = text.rstrip("\n").rpartition("\r")[2]
    assert "100%" in last
    assert "5/5 [" in last
    assert "loss 1.25" in last
    assert re.search(r"^\[rank0\] .* below it\n$", terminal.getvalue()[len(text) :]), "a finished bar stays where it is"


@pytest.mark.parametrize(("stream", "enabled"), [(io.StringIO, True), (Terminal, False)])
def test_no_bar_into_a_file_or_where_none_is_wanted(monkeypatch, stream, enabled):
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    setup_logging(0)
    bar = ProgressBar(steps_done=0, total_steps=2, enabled=enabled)
    bar.advance()
    bar.show("loss 1.0")
    logging.getLogger("transformers_backend").info("a line")
    bar.close()
    assert re.fullmatch(r"\[rank0\] \d\d:\d\d:\d\d a line\n", written.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (86399, "23:59:59"), (176523, "2d 01:02:03")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text
