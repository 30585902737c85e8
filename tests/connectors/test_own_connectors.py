"""A connector in a file outside the package: read by its table, used by its name in every process, refused in words."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import chiasm
import tiny
from chiasm.comparison.choices import Choice, expand
from chiasm.comparison.plan import load_plan
from chiasm.comparison.same_cell import code_of
from chiasm.connectors import CONNECTORS, Connector, connector_settings
from chiasm.connectors.own import own_connectors
from chiasm.connectors.trial import try_out
from contracts import check_connector

GUIDE = Path(__file__).parents[2] / "docs"
EXAMPLE = GUIDE / "window.py"


SLOTS = """
import torch
from torch import nn

from chiasm.connectors import Connector


class Slots(Connector):
    num_tokens = {num_tokens}
    output = None

    def __init__(self, vision_width, language_width, grid):
        super().__init__(vision_width, language_width, grid)
        D = vision_width
        self.queries, self.last = nn.Parameter(torch.randn(3, D)), {last}

    def flops(self):
        return 1

    def forward(self, features):
        return self.last((self.queries @ features.mT).softmax(-1) @ features) * {scale}


CONNECTORS = {{"slots": Slots}}
"""


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> type[Connector]:
    """The guide's connector, in the table."""
    kind = own_connectors(str(EXAMPLE), {})["window"]
    monkeypatch.setitem(CONNECTORS, "window", kind)
    return kind


def test_the_guides_connector_keeps_the_contract(window: type[Connector]) -> None:
    check_connector(lambda grid: window(20, 36, grid, windows=[1, grid[1]], heads=4), 20, 36)  # type: ignore[call-arg]
    connector = window(20, 36, (2, 6), windows=[1, 3])  # type: ignore[call-arg]
    assert connector.num_tokens == 3
    features = torch.randn(1, 12, 20)
    before = connector(features)
    features.unflatten(1, (2, 6))[:, :, 2:4] += 1.0
    moved = (connector(features) - before).abs().sum(dim=2)[0]
    assert moved[1] > 0 and moved[0] == moved[2] == 0


def test_a_connector_of_ones_own_is_used_by_its_name(window: type[Connector], tmp_path: Path) -> None:
    settings = {"name": "window", "windows": [3, 1]}
    vlm = chiasm.connect(tiny.vision(), tiny.language(), settings, tokenizer=tiny.tokenizer())
    vlm.save_pretrained(tmp_path / "model")
    answer = vlm.chat(tiny.picture(), "What?")
    assert chiasm.load(tmp_path / "model").chat(tiny.picture(), "What?") == answer
    code = f"import chiasm; print(chiasm.load({str(tmp_path / 'model')!r}).cost(images=1, text_tokens=4).visual_tokens)"
    environment = os.environ | {"CHIASM_CONNECTORS": str(EXAMPLE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


WRONG = {
    "another number": (
        "num_tokens = 4",
        r"connector 'slots' makes \(2, 3, 36\) of features \(2, 9, 24\), expected \(2, 4",
    ),
    "another width": ("last = nn.Linear(D, 5)", r"makes \(2, 3, 5\) of features"),
    "no numbers": ("scale = float('nan')", "makes visual tokens of .* that are not finite"),
    "an error": ("scale = None", "fails on features .*: TypeError: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_connector_says_of_itself_is_tried_when_it_is_connected(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = WRONG[name]
    settings = {"num_tokens": "3", "scale": "1.0", "last": "nn.Linear(D, language_width)"}
    key, _, value = change.partition(" = ")
    settings[key] = value
    path = tmp_path / "slots.py"
    path.write_text(SLOTS.format(**settings))
    monkeypatch.setitem(CONNECTORS, "slots", own_connectors(str(path), {})["slots"])
    with pytest.raises(ValueError, match=said):
        chiasm.connect(tiny.vision(), tiny.language(), "slots", tokenizer=tiny.tokenizer())


def test_the_guides_shortest_connector_keeps_the_contract(tmp_path: Path) -> None:
    page = (GUIDE / "new_connector.md").read_text(encoding="utf-8")
    path = tmp_path / "row_means.py"
    path.write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    kind = own_connectors(str(path), {})["row_means"]
    check_connector(lambda grid: kind(20, 36, grid), 20, 36)


def test_the_guide_shows_the_file_that_is_tested() -> None:
    assert EXAMPLE.read_text() in (GUIDE / "new_connector.md").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r'mine.py has no table CONNECTORS = {"name": Class}'),
        ("CONNECTORS = {'mlp': object}", "names a connector 'mlp', which is taken"),
        ("CONNECTORS = {'mine': dict}", "'mine' is <class 'dict'>, expected a class that extends"),
        ("\n1 / 0", r"mine.py, line 2, cannot be imported: ZeroDivisionError"),
        (
            "from chiasm.connectors import Connector\nclass Mine(Connector): pass\nCONNECTORS = {'mine': Mine}",
            "Mine does not say its flops, forward, num_tokens, output",
        ),
    ],
)
def test_a_file_that_holds_no_connector_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ValueError, match="CHIASM_CONNECTORS: ") as error:
        own_connectors(str(path), CONNECTORS)
    assert said in str(error.value)


def test_a_place_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no file {tmp_path}/no.py"):
        own_connectors(f"{tmp_path}/no.py", CONNECTORS)
    with pytest.raises(ValueError, match=r"nowhere.to.be.found cannot be imported: ModuleNotFoundError"):
        own_connectors("nowhere.to.be.found", CONNECTORS)
    assert own_connectors("", CONNECTORS) == {}


def test_a_class_is_not_a_name(window: type[Connector]) -> None:
    with pytest.raises(
        ValueError, match=r'neither a name nor a mapping with one; .* chiasm.connectors.CONNECTORS\["mine"\]'
    ):
        chiasm.connect(tiny.vision(), tiny.language(), window)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'windows' is unknown; .* CHIASM_CONNECTORS"):
        chiasm.connect(tiny.vision(), tiny.language(), "windows")


def test_an_option_without_a_default_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wanting(CONNECTORS["avg_pool"]):  # type: ignore[misc, name-defined]
        def __init__(self, vision_width: int, language_width: int, grid: tuple[int, int], *, size: int) -> None:
            super().__init__(vision_width, language_width, grid, output_size=size)

    monkeypatch.setitem(CONNECTORS, "wanting", Wanting)
    with pytest.raises(ValueError, match="connector 'wanting' wants size, which has no default"):
        connector_settings("wanting")
    assert connector_settings({"name": "wanting", "size": 2})["size"] == 2


def test_a_number_of_tokens_is_asked_of_the_class_and_not_guessed(
    window: type[Connector], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"data": {"train": "a", "test": "b"}, "budget": {"samples": 8}, "grid": {"connector": ["window"]}}
    plan["grid"] |= {"tokens": [3]}
    _, skipped = expand(load_plan(plan), lambda: (3, 3))
    assert skipped[0].reason.startswith("window does not say which option sets its tokens; leave tokens null")

    def windows(tokens: int, grid: tuple[int, int]) -> dict[str, Any]:
        return {"windows": [1, tokens]}

    monkeypatch.setattr(window, "options_for", windows)
    choices, skipped = expand(load_plan(plan), lambda: (3, 3))
    assert not skipped and choices[0].connector == connector_settings({"name": "window", "windows": [1, 3]})


def _line(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "ab"[number % 2]}]
    return {"id": str(number), "image": "0.png", "conversations": turns}


def test_training_starts_it_from_captions_and_learns(window: type[Connector], tmp_path: Path) -> None:
    tiny.picture().save(tmp_path / "0.png")
    (tmp_path / "data.json").write_text(json.dumps([_line(number) for number in range(8)]))
    settings = {"name": "window", "windows": [1, 3]}
    vlm = chiasm.connect(tiny.vision(), tiny.language(), settings, tokenizer=tiny.tokenizer())
    before = {name: p.clone() for name, p in vlm.model.connector.named_parameters()}
    stage = {"name": "align", "parts": {"connector": "full", "*": "frozen"}, "lr": 1e-2, "steps": 2, "batch_size": 4}
    recipe = {"stages": [stage | {"validation": {"samples": 0}}], "forgetting": {"text": False, "pictures": 0}}
    chiasm.train(recipe, model=vlm, data=str(tmp_path / "data.json"), output=tmp_path / "run")
    after = dict(chiasm.load(tmp_path / "run" / "model").model.connector.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in before.items() if "in_proj_bias" not in name)


def test_a_changed_file_is_another_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from chiasm.connectors.mlp import MLPProjector\n\n\nclass Mine(MLPProjector):\n    pass\n\n\n"
        'CONNECTORS = {"mine": Mine}\n'
    )
    monkeypatch.setitem(CONNECTORS, "mine", own_connectors(str(file), {})["mine"])
    choices = [Choice(name, {"name": name}, "early", None, "lora", "auto") for name in ("mine", "mlp")]
    before = [code_of(choice) for choice in choices]
    file.write_text(file.read_text() + "# changed\n")
    after = [code_of(choice) for choice in choices]
    assert after[0] != before[0] and after[1] == before[1] == ""


def test_a_trial_leaves_a_connector_and_random_numbers_as_they_were() -> None:
    """Also parts that their author keeps in evaluation mode."""
    connector: Any = CONNECTORS["mlp"](24, 36, (3, 3))
    connector.layers[0].eval()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    try_out("mlp", connector)
    assert connector.training and not connector.layers[0].training and torch.equal(torch.rand(3), expected)
