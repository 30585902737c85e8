"""What makes a finished or a begun cell the same one: its plan, its data, and the file of its connector."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chiasm.comparison.answer_length import LEAST
from chiasm.comparison.choices import Choice
from chiasm.comparison.inputs import INPUTS, inputs_of, require_same
from chiasm.comparison.schema import Plan
from chiasm.connectors import own_code
from chiasm.sources.writing import whole_file

CELLS, RESULT, RUN, BUDGET, CODE = "cells", "result.json", "run", "samples.json", "connector.sha256"
NEWER = (
    ("base", "language_layers"),
    ("data", "test_captions"),
    ("evaluation", "retrieval"),
    ("training", "forgetting"),
)
"""Keys that older plans have not: where they say nothing, cells that were finished without them stay finished."""
Say = Callable[[str], None]


def finished(plan: Plan, choice: Choice, output: Path) -> dict[str, Any] | None:
    """The result of a cell that is done; None for one that is not, or whose connector is another since its file was
    changed."""
    path = output / CELLS / choice.name / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if result["identity"] != identity(plan, choice):
        raise ValueError(
            f"{path.parent} holds this cell under another plan (data, budget, base or training differ); "
            "choose another folder with -o, or remove that one"
        )
    require_same(path.parent, result.get("inputs"), inputs_of(plan, choice, output))
    return result if result.get("code", "") == code_of(choice) else None


def identity(plan: Plan, choice: Choice) -> str:
    """A digest of everything in the plan that a cell's result follows from."""
    kept = plan.model_dump(mode="json", include={"base", "data", "budget", "training", "evaluation"})
    for section, key in NEWER:
        if kept[section][key] is None:
            del kept[section][key]
    kept["evaluation"]["max_new_tokens"] = plan.evaluation.max_new_tokens or LEAST
    strategy = {name: part.model_dump(mode="json") for name, part in plan.strategies.get(choice.tune, {}).items()}
    return _digest(json.dumps([kept, strategy, choice.to_dict()], sort_keys=True, default=str))


def code_of(choice: Choice) -> str:
    """A digest of the file of a connector from outside the package; empty for others."""
    code = own_code((choice.connector or {}).get("name", ""))
    return _digest(code) if code else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def forget_another(folder: Path, choice: Choice, inputs: dict[str, str], say: Say) -> None:
    """A run that was begun with another file of the connector, or on other data, is no beginning of this one."""
    for name, now, before in ((CODE, code_of(choice), ""), (INPUTS, json.dumps(inputs), None)):
        noted = folder / name
        then = noted.read_text(encoding="utf-8") if noted.is_file() else before
        if then is not None and then != now and (folder / RUN).exists():
            what = "its connector's file" if name == CODE else "its data"
            say(f"{choice.name}: begins anew, since {what} has changed")
            shutil.rmtree(folder / RUN, ignore_errors=True)
            (folder / BUDGET).unlink(missing_ok=True)
        if then != now:
            whole_file(noted, now)
