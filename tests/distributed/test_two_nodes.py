"""Two nodes, as two network namespaces joined by a cable of their own; one is killed and the job goes on.

Needs root and `ip` of iproute2, for namespaces and a pair of virtual interfaces (veth).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.jobs import tiny_job

REPOSITORY = Path(__file__).parents[2]
SECONDS = 240.0


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass
class Node:
    namespace: str
    address: str
    log: Path
    launcher: subprocess.Popen | None = field(default=None)

    def start(self, config: Path, *, endpoint: str, nodes: str) -> None:
        """Run the launch script as on a real node: its name does not lead here, so it says its address itself."""
        variables = {
            "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "LOCAL_ADDR": self.address,
            "NPROC": "1", "NNODES": nodes, "RDZV_ENDPOINT": endpoint, "MAX_RESTARTS": "2",
            "RDZV_CONF": "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=2,join_timeout=120",
        }  # fmt: skip
        with self.log.open("a") as log:
            self.launcher = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, REPOSITORY / "scripts" / "train.sh", config],
                env={**os.environ, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
            )

    def kill(self) -> None:
        """End everything that runs on the node, as a power cut does."""
        while pids := _ip("netns", "pids", self.namespace).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        if self.launcher is not None:
            self.launcher.wait()


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    nodes = [
        Node(f"node{number}-{os.getpid()}", f"10.93.0.{number}", tmp_path / f"node{number}.log") for number in (1, 2)
    ]
    try:
        for node in nodes:
            _ip("netns", "add", node.namespace)
        first, second = nodes
        ends = ("eth0", "netns", first.namespace), ("eth0", "netns", second.namespace)
        _ip("link", "add", "name", *ends[0], "type", "veth", "peer", "name", *ends[1])
    except (OSError, subprocess.CalledProcessError) as error:
        _remove(nodes)
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    try:
        for node in nodes:
            inside = ("-n", node.namespace)
            _ip(*inside, "address", "add", f"{node.address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield first, second
    finally:
        _remove(nodes)


def _remove(nodes: list[Node]) -> None:
    existing = _ip("netns", "list")
    for node in nodes:
        if node.namespace in existing:
            node.kill()
            _ip("netns", "delete", node.namespace)


def _job(folder: Path, steps: int, **changes) -> Path:
    (folder / "text").mkdir()
    for number in range(4):
        text = "".join(f"{number}: line {line} of some text\n" for line in range(40))
        (folder / "text" / f"{number}.txt").write_text(text)
    options = {"training__local_batch_size": 1, "training__global_batch_size": 2, "training__steps": steps,
               "checkpoint__enable": True, "checkpoint__interval": 10, **changes}  # fmt: skip
    tiny_job(folder, "run", **options).save(folder / "job.toml")
    return folder / "job.toml"


def _metrics(folder: Path) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written


def _wait_for_steps(folder: Path, count: int, nodes: tuple[Node, ...]) -> None:
    deadline = time.monotonic() + SECONDS
    while len(_metrics(folder)) < count:
        assert time.monotonic() < deadline, "\n".join(node.log.read_text() for node in nodes)
        time.sleep(0.02)


def test_a_killed_node_comes_back_and_the_job_finishes(two_nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """The first node by address dies, which has rank 0; the rendezvous is on the other, which survives."""
    dies, survives = two_nodes
    config, endpoint = _job(tmp_path, 100), f"{survives.address}:29400"
    for node in (survives, dies):
        node.start(config, endpoint=endpoint, nodes="2")
    _wait_for_steps(tmp_path, 12, two_nodes)
    dies.kill()
    dies.start(config, endpoint=endpoint, nodes="2")
    statuses = [node.launcher.wait(timeout=SECONDS) for node in two_nodes]

    log = survives.log.read_text()
    assert statuses == [0, 0], log
    resumed = int(re.search(r"resumed from \S+/step-(\d+)", dies.log.read_text() + log)[1])
    assert 0 < resumed < 100, "it was killed in the middle, and went on from a checkpoint"
    assert resumed % 10 == 0
    assert [line["step"] for line in _metrics(tmp_path)] == list(range(1, 101)), "each step stands there once"
    assert "error: rank 1" in log
    assert "another rank" in log
    assert "restart 1 of 2, from the last checkpoint" in log


def _world_sizes(folder: Path) -> list[int]:
    """Number of ranks in the order in which it changed, as the log of steps shows it."""
    sizes = [round(line["tokens_per_second"] / line["tokens_per_second_per_device"]) for line in _metrics(folder)]
    return [size for size, _ in itertools.groupby(sizes)]


def _wait_for_world_sizes(folder: Path, sizes: list[int], nodes: tuple[Node, ...]) -> None:
    deadline = time.monotonic() + SECONDS
    while _world_sizes(folder) != sizes:
        assert time.monotonic() < deadline, "\n".join(node.log.read_text() for node in nodes)
        time.sleep(0.1)


def test_the_survivor_goes_on_alone_until_the_node_is_back(two_nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """With NNODES=1:2; and a signal to the launcher of one node ends the run on both."""
    dies, survives = two_nodes
    config, endpoint = _job(tmp_path, 100_000, metrics__log_freq=1), f"{survives.address}:29400"
    for node in (survives, dies):
        node.start(config, endpoint=endpoint, nodes="1:2")
    _wait_for_steps(tmp_path, 12, two_nodes)
    if _world_sizes(tmp_path) == [1]:  # the first one did not wait long enough for the second
        _wait_for_world_sizes(tmp_path, [1, 2], two_nodes)
    before = _world_sizes(tmp_path)
    dies.kill()
    _wait_for_world_sizes(tmp_path, [*before, 1], two_nodes)
    dies.start(config, endpoint=endpoint, nodes="1:2")
    _wait_for_world_sizes(tmp_path, [*before, 1, 2], two_nodes)
    survives.launcher.send_signal(signal.SIGTERM)
    assert [node.launcher.wait(timeout=SECONDS) for node in two_nodes] == [0, 0], survives.log.read_text()
    lines = _metrics(tmp_path)
    sizes = [round(line["tokens_per_second"] / line["tokens_per_second_per_device"]) for line in lines]
    alone = max(index for index, size in enumerate(sizes) if size == 1)
    assert lines[alone + 1]["step"] == lines[alone]["step"] + 1, "it saved before the node joined: no step is repeated"
