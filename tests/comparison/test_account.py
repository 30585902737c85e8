"""What a report says was done, and the command that does it again."""

from pathlib import Path
from typing import Any

import pytest

from chiasm.comparison.account import account, repeated
from chiasm.comparison.choices import Choice, expand
from chiasm.comparison.plan import load_plan
from chiasm.connectors import CONNECTORS
from chiasm.connectors.own import own_connectors

PLAN: dict[str, Any] = {"data": {"train": "emoji-scenes:train", "test": {"path": "emoji-scenes:test", "size": 3}}}
PLAN |= {"seeds": [0, 1]}
PLAN |= {"budget": {"samples": 360}, "grid": {"connector": ["mlp", "qformer"], "tune": ["lora", "frozen"]}}


def choices(plan: dict[str, Any]) -> list[Choice]:
    return expand(load_plan(plan), lambda: (4, 4))[0]


def test_data_strategies_and_rates_are_told_in_words() -> None:
    rows = {"mlp-early-seed0": [{"sample": "a"}, {"sample": "a"}, {"sample": "b"}]}
    done = dict(account(load_plan(PLAN), choices(PLAN), [{"samples": 360}], rows, range(8000)))
    assert done["learned from"] == "emoji-scenes:train: 360 of its 8,000 samples in each cell"
    assert done["asked"] == "emoji-scenes:test (size 3): 3 questions, 2 samples"
    assert done["strategy lora"] == "language: LoRA, rank 16, learning rate 0.0015; vision: frozen"
    assert done["strategy frozen"] == "vision: frozen; language: frozen"
    assert done["new in early fusion"].startswith("the connector at learning rate 0.0001, or 0.001 where")
    assert done["seeds"] == "0, 1" and "torch" in done["versions"]


def test_ways_whose_tokens_have_places_have_names() -> None:
    plan = PLAN | {"base": {"regions": [2, 2]}, "cells": [{"fusion": "intermediate"}]}
    named = {choice.way for choice in choices(plan) if choice.regions(load_plan(plan).base)}
    assert named == {"mlp-early", "mlp-early-frozen"}


def test_the_command_writes_into_a_new_folder_and_names_own_connectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    lines = ["from chiasm.connectors.linear import LinearProjector", "class Mine(LinearProjector): ..."]
    file.write_text("\n".join([*lines, "CONNECTORS = {'mine': Mine}", ""]))
    monkeypatch.setenv("CHIASM_CONNECTORS", str(file))
    told = repeated(choices(PLAN), Path("runs/a/plan.yaml"), Path("runs/a"))
    assert told == "chiasm compare runs/a/plan.yaml -o runs/a-again"
    monkeypatch.chdir(tmp_path)
    assert repeated(choices(PLAN), Path("plan.yaml"), Path(".")).endswith(f" -o {tmp_path}-again")
    for name, kind in own_connectors(str(file), {}).items():
        monkeypatch.setitem(CONNECTORS, name, kind)
    own = choices(PLAN | {"grid": {"connector": ["mine"]}})
    assert repeated(own, Path("runs/a/plan.yaml"), Path("runs/a")) == f"CHIASM_CONNECTORS={file} {told}"
