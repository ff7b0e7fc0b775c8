"""Where the same figures go besides the run's own files: TensorBoard and Weights & Biases, each where it is asked for.

Only the main rank opens trackers; their packages are optional, and `check_trackers_installed` says on every rank,
before anything else starts, which one is missing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

_PACKAGES = {
    # key: (what is imported, name of the package)
    "metrics.enable_tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "metrics.enable_wandb": ("wandb", "wandb"),
}
_RUN_ID_FILE = "wandb_run_id.txt"


class Tracker(Protocol):
    def write(self, prefix: str, step: int, figures: dict[str, float]) -> None:
        """Record figures of a step under `prefix`/name; a figure that is None is left out by the caller."""

    def close(self) -> None: ...


def check_trackers_installed(*, tensorboard: bool, wandb: bool) -> None:
    """Raise an ImportError that names the key and the package where one that is asked for is missing."""
    for key, asked_for in (("metrics.enable_tensorboard", tensorboard), ("metrics.enable_wandb", wandb)):
        if asked_for:
            _import(key)


def open_trackers(
    dump_folder: Path,
    *,
    tensorboard_folder: Path | None,
    wandb: bool,
    description: str,
    config: dict[str, Any],
    steps_done: int,
) -> list[Tracker]:
    """The trackers that were asked for.

    steps_done: optimizer steps of the checkpoint that the run resumed from, 0 for a new run. description, config: what
    W&B keeps beside the curves.
    """
    trackers: list[Tracker] = []
    if tensorboard_folder is not None:
        trackers.append(TensorBoard(tensorboard_folder, steps_done=steps_done))
    if wandb:
        trackers.append(WeightsAndBiases(dump_folder, description, config, steps_done=steps_done))
    return trackers


class TensorBoard:
    """Event files in `folder`. What an earlier run, or this one before it resumed, recorded there of later steps stays
    on the disk, and TensorBoard hides it."""

    def __init__(self, folder: Path, *, steps_done: int) -> None:
        module = _import("metrics.enable_tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(folder), purge_step=steps_done + 1)

    def write(self, prefix: str, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named like the dump folder, with job.description as its notes.

    Project, entity, account and mode are W&B's own settings (`wandb login`, WANDB_PROJECT, WANDB_MODE=offline ...). The
    run's id is kept in the dump folder, so that a resumed run goes on in the same one. W&B takes a step once: what a
    killed run had sent of steps after its checkpoint stays as it was.
    """

    def __init__(self, dump_folder: Path, description: str, config: dict[str, Any], *, steps_done: int) -> None:
        wandb = _import("metrics.enable_wandb")
        id_file = dump_folder / _RUN_ID_FILE
        known = id_file.read_text().strip() if steps_done and id_file.exists() else None
        try:
            self._run = wandb.init(
                id=known, resume="allow", name=dump_folder.resolve().name, notes=description or None,
                config=config, dir=str(dump_folder.resolve()),
                allow_val_change=True,  # a resumed run may be longer, or have another learning rate
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise ValueError(
                f"metrics.enable_wandb = true: W&B does not start ({error}). Log in with `wandb login`, set the "
                "environment variable WANDB_MODE=offline to send the run later with `wandb sync`, or set the key to "
                "false."
            ) from error
        id_file.write_text(f"{self._run.id}\n")

    def write(self, prefix: str, step: int, figures: dict[str, float]) -> None:
        self._run.log({f"{prefix}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _import(key: str) -> Any:
    name, package = _PACKAGES[key]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{key} = true needs the {package} package, which is not installed: `pip install {package}`, or set it to "
            "false (metrics.jsonl has the same numbers)."
        ) from error
