"""Kill -9 at a random moment, again and again during one run that saves beside training: it ends as if undisturbed.

Half of the kills come near a save, where they hurt most, the others anywhere between a life's first moment and its end:
while it sets up, loads, trains, saves or exports.

For more ranks or another seed, as a program:

    python -m tests.distributed.test_checkpoint_kills --ranks 2 --kills 20 --seed 7
"""

from __future__ import annotations

import argparse
import os
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed.workers import quick_context
from tests.jobs import tiny_job
from transformers_backend import JobConfig, Trainer

_SECONDS_PER_LIFE = 120
_STEPS_PER_LIFE = 6  # at most, to a kill near a save; so many steps make room for all of those


def _live(config: JobConfig, rank: int, ranks: int, store: str, silent: bool) -> None:
    """One process of a run, from wherever the run is to its end."""
    if silent:  # a rank whose peer was killed says so at length
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    trainer = Trainer(config)
    trainer.train()
    trainer.close()


class _Life:
    def __init__(self, config: JobConfig, ranks: int, *, silent: bool = True) -> None:
        context = quick_context()
        self._folder = tempfile.TemporaryDirectory()
        store = f"{self._folder.name}/store"
        self.processes = [
            context.Process(target=_live, args=(config, rank, ranks, store, silent), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def ended(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def kill(self, first: int) -> None:
        """Kill -9 one rank, then the rest, as torchrun does."""
        self.processes[first].kill()
        time.sleep(0.05 if len(self.processes) > 1 else 0)
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def exit_codes(self) -> list[int | None]:
        for process in self.processes:
            process.join(_SECONDS_PER_LIFE)
        codes = [process.exitcode for process in self.processes]
        self.kill(0)
        return codes


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _newest(names: list[str], pattern: str) -> int:
    return max((int(match.group(1)) for name in names if (match := re.fullmatch(pattern, name))), default=0)


def _kill_near_a_save(config: JobConfig, ranks: int, moments: random.Random) -> str:
    """Start a life, let it come a few steps further, and kill it; says what was going on."""
    folder = Path(config.job.dump_folder) / "checkpoint"
    goal = _newest(_names(folder), r"step-(\d+)") + 2 * moments.randint(1, _STEPS_PER_LIFE // 2)
    goal = min(goal, config.training.steps)  # on a machine so busy that the kills before came late
    life, deadline = _Life(config, ranks), time.monotonic() + _SECONDS_PER_LIFE
    while _newest(_names(folder), r"step-(\d+)(?:\.tmp)?") < goal:
        if life.ended() and _newest(_names(folder), r"step-(\d+)") < goal:
            raise AssertionError(f"a life ended before step {goal} by itself: {life.exit_codes()}")
        assert time.monotonic() < deadline, f"no step {goal} within {_SECONDS_PER_LIFE} s"
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.05))
    life.kill(moments.randrange(ranks))
    return _found_at_kill(config, started_with=0)


def _kill_anywhere(config: JobConfig, ranks: int, moments: random.Random, lifetime: float) -> str:
    """Start a life and kill it at a moment drawn from `lifetime` seconds; says what was going on."""
    lines = _count_lines(config)
    life = _Life(config, ranks)
    time.sleep(moments.uniform(0, lifetime))
    life.kill(moments.randrange(ranks))
    return _found_at_kill(config, started_with=lines)


def _found_at_kill(config: JobConfig, *, started_with: int) -> str:
    """started_with: lines of figures before that life; without a new one it was still setting up, or at its end."""
    names = _names(Path(config.job.dump_folder) / "checkpoint")
    if any(name.endswith(".partial") for name in names):
        return "exporting"
    if any(name.endswith(".tmp") for name in names):
        return "saving"
    return "training" if _count_lines(config) > started_with else "at its start or end"


def _count_lines(config: JobConfig) -> int:
    path = Path(config.job.dump_folder) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def kill_again_and_again(root: Path, *, ranks: int, kills: int, seed: int) -> Counter[str]:
    """Run a job undisturbed and the same with kills; asserts that they end alike. Returns {what was killed: times}."""
    (root / "text").mkdir()
    for number in range(6):
        text = "".join(f"{number}: line {line} of some text\n" for line in range(40))
        (root / "text" / f"{number}.txt").write_text(text)
    near = (kills + 1) // 2
    steps = (near + 1) * _STEPS_PER_LIFE

    def job(name: str, mode: str) -> JobConfig:
        return tiny_job(
            root, name, training__steps=steps, training__local_batch_size=16, checkpoint__enable=True,
            checkpoint__interval=2, checkpoint__keep_latest_k=2, checkpoint__async_mode=mode,
            checkpoint__last_save_in_hf=True,
        )  # fmt: skip

    undisturbed, killed = job("undisturbed", "disabled"), job("killed", "async")
    undisturbed.checkpoint.interval = steps
    start = time.monotonic()
    assert _Life(undisturbed, ranks, silent=False).exit_codes() == [0] * ranks
    lifetime = time.monotonic() - start  # of a life with all steps; those that follow have fewer left
    moments, count = random.Random(seed), Counter()
    for _ in range(near):
        count[_kill_near_a_save(killed, ranks, moments)] += 1
    for _ in range(kills - near):  # the first of them train the steps that are left, the later ones load and export
        count[_kill_anywhere(killed, ranks, moments, lifetime)] += 1
    assert _Life(killed, ranks, silent=False).exit_codes() == [0] * ranks
    ends = []
    for config in (undisturbed, killed):
        folder = Path(config.job.dump_folder)
        last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
        curve = re.findall(r'"(step|loss|grad_norm|lr)": ([^,}]+)', last)
        ends.append((curve, load_file(folder / "checkpoint" / f"step-{steps}-hf" / "model.safetensors")))
    assert ends[0][0] == ends[1][0]
    assert ends[0][1].keys() == ends[1][1].keys()
    assert all(torch.equal(ends[0][1][name], value) for name, value in ends[1][1].items())
    left = {name for name in _names(Path(killed.job.dump_folder) / "checkpoint") if not name.endswith("-hf")}
    assert left == {f"step-{steps - 2}", f"step-{steps}"}
    return count


@pytest.mark.parametrize(("ranks", "kills"), [(1, 20), (2, 3)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(tmp_path: Path, ranks: int, kills: int):
    count = kill_again_and_again(tmp_path, ranks=ranks, kills=kills, seed=42)
    assert sum(count.values()) == kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("--ranks", 1), ("--kills", 20), ("--seed", 42)):
        parser.add_argument(option, type=int, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(kill_again_and_again(Path(folder), **vars(arguments)))
