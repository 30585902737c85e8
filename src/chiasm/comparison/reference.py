"""The plan's keys, written down from the code that reads them: docs/plan.md."""

from pydantic import BaseModel

from chiasm.comparison.schema import Axes, Base, Budget, CellSpec, Claim, Data, Evaluation, Plan, Training
from chiasm.training.reference import key_table

SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("Of the plan", "At the top of the file.", Plan),
    ("Of `base`", "", Base),
    ("Of `data`", "", Data),
    ("Of `budget`", "Exactly one of them.", Budget),
    ("Of `grid`", "", Axes),
    ("Of `cells`", "For each item.", CellSpec),
    ("Of `training`", "", Training),
    ("Of `evaluation`", "", Evaluation),
    ("Of `claims`", "For each item.", Claim),
]

INTRODUCTION = """\
# Every key of a plan

A plan is a YAML file; [Comparing](comparison.md) shows one, and says what comes of it. An unknown key or a wrong value
is refused with file and line.

This page is written by `chiasm recipe plan` from the code that reads plans.
"""


def markdown() -> str:
    """The text of docs/plan.md."""
    parts = [INTRODUCTION]
    for title, words, model in SECTIONS:
        table = key_table(model.model_fields).replace("](#", "](recipes.md#")
        parts.append(f"\n## {title}\n\n{words}{chr(10) * 2 if words else ''}{table}")
    return "".join(parts)
