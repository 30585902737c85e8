"""The guide to connectors says what is there: costs are those of the cost model, and what any page names exists."""

import re
import runpy
from pathlib import Path

import pytest

from chiasm.connectors import CONNECTORS, connector_settings
from chiasm.presets import PRESETS

GUIDE = Path(__file__).parents[1] / "docs" / "connectors"
PAGES = sorted(path.stem for path in GUIDE.glob("*.md") if path.stem != "README")


def test_costs_are_those_of_the_cost_model() -> None:
    for path, text in runpy.run_path(str(GUIDE / "costs.py"))["pages"]().items():
        assert path.read_text() == text, f"{path.name} is out of date; run docs/connectors/costs.py --write"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_about_its_connector(name: str) -> None:
    text = (GUIDE / f"{name}.md").read_text()
    assert name in CONNECTORS
    options = re.search(r"## Options\n\n(.*?)\n\n", text, re.DOTALL)
    assert options is not None
    for option in set(connector_settings(name)) - {"name"}:
        assert f"`{option}" in options.group(1), f"{option} is not explained"


@pytest.mark.parametrize("name", [*PAGES, "README"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (GUIDE / f"{name}.md").read_text())
    assert links and all((GUIDE / link).exists() for link in links)


def test_the_guide_names_every_preset() -> None:
    assert all(f"`{name}`" in (GUIDE / "README.md").read_text() for name in PRESETS)


def test_pages_name_targets_that_make_knows_and_tasks_that_need_no_download() -> None:
    root = GUIDE.parents[1]
    pages = [root / "CONTRIBUTING.md", root / "README.md", *(root / "docs").glob("*.md")]
    said = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    known = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", said, re.MULTILINE))
    assert "test-lmms-eval" in named and named <= known
    assert all("--include_path" in line for line in said.splitlines() if line.strip().startswith("lmms-eval "))
