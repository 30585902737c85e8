"""What makes a finished or a begun cell the same one: its plan, its data, and the file of its connector."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chiasm.comparison.answer_length import LEAST
from chiasm.comparison.choices import Choice
from chiasm.comparison.inputs import INPUTS, inputs_of, require_same
from chiasm.comparison.schema import Plan
from chiasm.connectors import own_code
from chiasm.sources.locking import held
from chiasm.sources.writing import whole_file

CELLS, RESULT, RUN, BUDGET, CODE = "cells", "result.json", "run", "samples.json", "connector.sha256"
PLANNED, LOCK = "plan.sha256", ".lock"
LENGTH = "answer_tokens"
"""In a result, the tokens that an answer could have; older ones do not say."""
NEWER = (
    ("base", "language_layers"),
    ("data", "test_captions"),
    ("evaluation", "retrieval"),
    ("training", "forgetting"),
)
"""Keys that older plans have not: where they say nothing, cells that were finished without them stay finished."""
Say = Callable[[str], None]


class CellTakenError(ValueError):
    """Another process is at work on the cell."""


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Keeps other processes from the cell in this folder.

    Raises:
        CellTakenError: another one has it.
    """
    with held(folder / LOCK, CellTakenError(f"another process is at work on {folder}; wait for it")):
        yield


def finished(plan: Plan, choice: Choice, output: Path) -> dict[str, Any] | None:
    """The result of a cell that is done; None for one that is not, or whose connector is another since its file was
    changed."""
    path = output / CELLS / choice.name / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    known = identity(plan, choice) if LENGTH in result else older_identity(plan, choice)
    if result["identity"] != known:
        raise ValueError(
            f"{path.parent} holds this cell under another plan (data, budget, base or training differ); "
            "choose another folder with -o, or remove that one"
        )
    require_same(path.parent, result.get("inputs"), inputs_of(plan, choice, output))
    return result if result.get("code", "") == code_of(choice) else None


def identity(plan: Plan, choice: Choice) -> str:
    """A digest of everything in the plan that a cell's result follows from."""
    return _of_plan(plan, choice, plan.evaluation.max_new_tokens)


def older_identity(plan: Plan, choice: Choice) -> str:
    """The digest of results that do not say how long an answer could be: they took no length for the least."""
    return _of_plan(plan, choice, plan.evaluation.max_new_tokens or LEAST)


def trained_by(plan: Plan, choice: Choice) -> str:
    """A digest of what a cell's training follows from, so that questions may be asked otherwise."""
    kept = _sections(plan, {"base", "data", "budget", "training"})
    kept["data"] = {name: source for name, source in kept["data"].items() if not name.startswith("test")}
    return _of_sections(plan, choice, kept | {"finds": plan.evaluation.retrieval is not None})


def _of_plan(plan: Plan, choice: Choice, length: int | None) -> str:
    kept = _sections(plan, {"base", "data", "budget", "training", "evaluation"})
    kept["evaluation"]["max_new_tokens"] = length
    return _of_sections(plan, choice, kept)


def _sections(plan: Plan, names: set[str]) -> dict[str, Any]:
    kept = plan.model_dump(mode="json", include=names)
    for section, key in NEWER:
        if section in kept and kept[section][key] is None:
            del kept[section][key]
    return kept


def _of_sections(plan: Plan, choice: Choice, kept: dict[str, Any]) -> str:
    strategy = {name: part.model_dump(mode="json") for name, part in plan.strategies.get(choice.tune, {}).items()}
    return _digest(json.dumps([kept, strategy, choice.to_dict()], sort_keys=True, default=str))


def code_of(choice: Choice) -> str:
    """A digest of the file of a connector from outside the package; empty for others."""
    code = own_code((choice.connector or {}).get("name", ""))
    return _digest(code) if code else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def forget_another(folder: Path, plan: Plan, choice: Choice, inputs: dict[str, str], say: Say) -> None:
    """A run that was begun by another plan, with another file of the connector, or on other data, is no beginning of
    this one."""
    for name, what, now, before in (
        (CODE, "its connector's file", code_of(choice), ""),
        (INPUTS, "its data", json.dumps(inputs), None),
        (PLANNED, "the plan", trained_by(plan, choice), None),
    ):
        noted = folder / name
        then = noted.read_text(encoding="utf-8") if noted.is_file() else before
        if then is not None and then != now and (folder / RUN).exists():
            say(f"{choice.name}: begins anew, since {what} has changed")
            shutil.rmtree(folder / RUN, ignore_errors=True)
        if then is not None and then != now:
            (folder / BUDGET).unlink(missing_ok=True)
        if then != now:
            whole_file(noted, now)
