"""The folder of a run: its lock, its log, and where it stands.

RUN/recipe.yaml   log.jsonl   checkpoints/<stage>-<step>/   <stage>/ (a model)   model/ (the result)

The weights in `model/` are hard links to the last stage's where the disk has them; Chiasm writes none in place.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from chiasm.sources.locking import held
from chiasm.sources.writing import whole_file
from chiasm.training.card import write_card
from chiasm.training.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Position,
    Saved,
    newest_checkpoint,
    open_checkpoint,
    remove_unfinished,
    save_checkpoint,
    whole_folder,
)
from chiasm.training.log import RunLog
from chiasm.training.recipe import to_yaml
from chiasm.training.reporter import Reporter
from chiasm.training.same_run import moved, what_changes
from chiasm.training.schema import Recipe
from chiasm.training.team import Team
from chiasm.training.tensor_files import SUFFIX
from chiasm.training.termination import Terminated
from chiasm.training.trackers import open_trackers, require_trackers

RECIPE, LOG, MODEL, LOCK = "recipe.yaml", "log.jsonl", "model", ".lock"
DRAWN = "drawn.png"
"""Pictures that the last validation drew, beside the true ones."""
FactsOf = Callable[[PreTrainedModel], dict[str, str]]
"""More rows of a model card."""


@dataclass
class Run:
    """An open run, in one of its processes."""

    folder: Path
    stages: list[str]
    log: RunLog
    fingerprint: dict[str, Any]
    environment: dict[str, Any]
    resumed: Saved | None
    team: Team = field(default_factory=Team)
    facts_of: FactsOf = lambda model: {}
    keeps_models: bool = True

    def is_done(self, stage: str) -> bool:
        """Whether the stage's weights are final in the checkpoint that the run goes on from."""
        if self.resumed is None:
            return False
        position = self.resumed.position
        reached = self.stages.index(position.stage) + (1 if position.finished else 0)
        return self.stages.index(stage) < reached

    def resumed_in(self, stage: str) -> Saved | None:
        """The checkpoint, if the run goes on within this stage."""
        if self.resumed is None or self.resumed.position.finished or self.resumed.position.stage != stage:
            return None
        return self.resumed

    def save(
        self, stage: str, step: int, finished: bool, weights: dict[str, Tensor], moments: dict[str, Tensor], keep: int
    ) -> None:
        """Writes a checkpoint; all processes call this."""
        position = Position(stage, step, finished, self.log.num_bytes(), self.fingerprint, self.environment)
        checkpoint = Checkpoint(position, weights, moments)
        save_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.stages, keep, self.team)
        self.log.write("checkpoint", stage, step, finished=finished)

    def save_stage(self, stage: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        """A finished stage as a model folder."""
        self.team.first_does(lambda: self._write(self.folder / stage, model, processor))

    def save_result(self, stage: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        """The run's model, if the stage is its last: that of the stage's folder, or beside a retrieval model the one
        whose connector it trained."""
        place, result = self.folder / stage, self.folder / MODEL

        def write() -> None:
            if stage != self.stages[-1] or result.is_dir():
                return
            if json.loads((place / "config.json").read_text(encoding="utf-8"))["model_type"] == model.config.model_type:
                with whole_folder(result) as unfinished:
                    _copy(place, unfinished)
            else:
                self._write(result, model, processor)

        self.team.first_does(write)

    def _write(self, place: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        if place.is_dir():
            return
        with whole_folder(place) as unfinished, without_progress_bars():
            model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            write_card(unfinished, model, self.folder, self.facts_of(model))


@contextmanager
def open_run(
    folder: Path,
    recipe: Recipe,
    fingerprint: dict[str, Any],
    environment: dict[str, Any],
    resume: bool,
    reporter: Reporter,
    team: Team | None = None,
) -> Iterator[Run]:
    """Opens a folder for a new run, or goes on with the one that it holds. Of several processes the first does so.

    Raises:
        ValueError: the folder holds something else, a run of another recipe, model or data, or a run that is going on.
    """
    require_trackers(recipe.logs)
    team = team or Team()
    with ExitStack() as opened:

        def open_first() -> Run:
            return opened.enter_context(_open(folder, recipe, fingerprint, environment, resume, reporter, team))

        run = team.first_does(open_first)
        going_on = team.told(run.resumed.path if run is not None and run.resumed is not None else None)[0]
        if run is None:
            stages = [stage.name for stage in recipe.stages]
            resumed = open_checkpoint(going_on) if going_on is not None else None
            log = RunLog(Path(os.devnull))
            run = Run(folder, stages, log, fingerprint, environment, resumed, team)
        yield run


@contextmanager
def _open(
    folder: Path,
    recipe: Recipe,
    fingerprint: dict[str, Any],
    environment: dict[str, Any],
    resume: bool,
    reporter: Reporter,
    team: Team,
) -> Iterator[Run]:
    folder.mkdir(parents=True, exist_ok=True)
    refusal = ValueError(f"another process is training in {folder}; wait for it or choose another folder")
    with held(folder / LOCK, refusal):
        stages = [stage.name for stage in recipe.stages]
        _prepare(folder, resume)
        resumed, notes = newest_checkpoint(folder / CHECKPOINTS, stages)
        changed: list[str] = []
        if resumed is not None:
            changed = what_changes(folder, resumed.position, fingerprint)
            notes += moved(resumed.position.environment, environment)
            done = stages.index(resumed.position.stage) + resumed.position.finished
            if done < len(stages):
                _discard(folder, stages[done:])
        else:
            _discard(folder, stages)
        whole_file(folder / RECIPE, to_yaml(recipe))
        position = resumed.position if resumed is not None else None
        trackers = open_trackers(recipe.logs, folder, (position.stage, position.step) if position is not None else None)
        log = RunLog(folder / LOG, position.log_bytes if position is not None else 0, trackers)
        log.listeners.append(reporter.dashboard.hear)
        try:
            run = Run(folder, stages, log, fingerprint, environment, resumed, team)
            _tell(run, notes, changed, reporter)
            yield run
        except KeyboardInterrupt:
            reporter.note(f"stopped; the same command goes on from the last checkpoint in {folder}")
            raise
        except Terminated as ended:
            reporter.last_words(ended.words)
            raise
        finally:
            log.close()


def _copy(folder: Path, to: Path) -> None:
    """A model folder once more; its weights take no space where the disk has hard links."""
    for file in folder.rglob("*"):
        if file.is_file():
            target = to / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix != SUFFIX or not _link(file, target):
                shutil.copyfile(file, target)


def _link(file: Path, target: Path) -> bool:
    try:
        target.hardlink_to(file)
    except OSError:
        return False
    return True


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every file that it writes; the run has its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _prepare(folder: Path, resume: bool) -> None:
    strange = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if strange and not (folder / RECIPE).is_file():
        raise ValueError(f"{folder} is not empty and holds no run (found {strange[0]}); choose another folder")
    remove_unfinished(folder)
    if (folder / CHECKPOINTS).is_dir():
        remove_unfinished(folder / CHECKPOINTS)
        if not resume:
            shutil.rmtree(folder / CHECKPOINTS)


def _discard(folder: Path, stages: list[str]) -> None:
    """A run keeps nothing of stages that it is yet to train."""
    for name in (*stages, MODEL):
        shutil.rmtree(folder / name, ignore_errors=True)


def _tell(run: Run, notes: list[str], changed: list[str], reporter: Reporter) -> None:
    for note in notes:
        reporter.note(note)
        run.log.write("note", text=note)
    if run.resumed is not None:
        position = run.resumed.position
        reporter.note(f"going on after step {position.step} of stage {position.stage}")
        run.log.write("resume", position.stage, position.step)
        if changed:
            text = f"goes on with another {' and '.join(changed)}: not the run that it would have been"
            run.log.write("warning", position.stage, position.step, text=text)
            reporter.note(f"warning: stage {position.stage}: {text}")
