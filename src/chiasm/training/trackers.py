"""Where a run's numbers go beside `log.jsonl`: TensorBoard, Weights & Biases (offline by default) and trackio.

The packages are extras, imported only when a recipe names them under `logs`.
"""

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EVENTS = ("step", "validation", "forgetting")
"""Events of the log whose numbers are drawn as curves."""
NOT_CURVES = ("event", "time", "stage", "step", "seconds", "samples", "pictures")


class Tracker(ABC):
    """A place for numbers by name and step."""

    package: str
    """What must be installed."""
    extra: str
    """The extra of Chiasm that installs it."""

    @abstractmethod
    def __init__(self, folder: Path, resumed: tuple[str, int] | None) -> None:
        """Opens the place for the run in this folder; one that goes on adds to it.

        Args:
            resumed: the stage and step after which the run goes on; what was told of later steps is told again.
        """

    @abstractmethod
    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one event."""

    @abstractmethod
    def close(self) -> None:
        """Ends the run."""


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard, a folder for every stage: `tensorboard --logdir RUN`.

    Steps that are taken again are hidden from a step on in all that a folder holds, and every stage counts its own.
    """

    package, extra = "tensorboard", "tensorboard"

    def __init__(self, folder: Path, resumed: tuple[str, int] | None) -> None:
        self.folder, self.resumed = folder / "tensorboard", resumed
        self.writers: dict[str, Any] = {}

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self.writers:
            self.writers[stage] = self._opened(stage)
        for name, value in values.items():
            self.writers[stage].add_scalar(f"{stage}/{name}", value, step)

    def _opened(self, stage: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        first = self.resumed[1] + 1 if self.resumed is not None and self.resumed[0] == stage else 0
        return SummaryWriter(str(self.folder / stage), purge_step=first)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class Wandb(Tracker):
    """Weights & Biases in RUN/wandb, offline unless WANDB_MODE says otherwise: `wandb sync RUN/wandb/offline-run-*`.

    A run that goes on is the same one there: its id is kept in RUN/wandb.id.
    """

    package, extra = "wandb", "wandb"

    def __init__(self, folder: Path, resumed: tuple[str, int] | None) -> None:
        import wandb

        kept = folder / "wandb.id"
        if resumed is None or not kept.is_file():
            kept.write_text(secrets.token_hex(8))
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        project = os.environ.get("WANDB_PROJECT", "chiasm")
        settings = wandb.Settings(silent=True, console="off")
        known = {"id": kept.read_text(), "resume": "allow", "name": folder.name, "dir": str(folder)}
        self.run = wandb.init(project=project, mode=mode, settings=settings, **known)
        self.stages: set[str] = set()

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio(Tracker):
    """trackio's database in its own cache (TRACKIO_DIR): `trackio show --project chiasm`."""

    package, extra = "trackio", "trackio"

    def __init__(self, folder: Path, resumed: tuple[str, int] | None) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "chiasm")
        self.run: Any = trackio.init(project=project, name=folder.resolve().name, resume="allow", embed=False)

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": float(step)})

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def require_trackers(names: Sequence[str]) -> None:
    """Refuses a recipe whose trackers are not installed, before anything is opened.

    Raises:
        ValueError: a package is missing.
    """
    for name in names:
        if find_spec(TRACKERS[name].package) is None:
            extra = TRACKERS[name].extra
            raise ValueError(
                f"logs: {name} needs the package {TRACKERS[name].package}, which is not installed; "
                f"pip install 'chiasm[{extra}]', or leave it out: log.jsonl is always written"
            )


def open_trackers(names: Sequence[str], folder: Path, resumed: tuple[str, int] | None = None) -> list[Tracker]:
    """The trackers of a recipe, open for the run in this folder, which goes on after a step of a stage or is new."""
    require_trackers(names)
    return [TRACKERS[name](folder, resumed) for name in names]


def curves(fields: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event by name: `lr/connector`, `perplexity/english`; texts and lists are left out."""
    return dict(_numbers({key: value for key, value in fields.items() if key not in NOT_CURVES}))


def _numbers(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
