"""The READMEs say what is there: every path exists, every verb is one, both languages show the same commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.ko.md")


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "docs/papers.md"])
def test_paths_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    inside = "src/chiasm/" if name == "docs/papers.md" else ""
    paths = re.findall(r"`((?:src|tests|recipes|benchmarks|docs|connectors|fusion|vision|positions)/[\w/.-]+)`", text)
    paths += re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert paths
    for path in paths:
        places = [ROOT / path, ROOT / inside / path, (ROOT / name).parent / path]
        assert any(place.exists() for place in places), path


def test_the_tree_is_the_tree() -> None:
    block = re.search(r"```\nsrc/chiasm/\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    shown = {line.split()[0] for line in block.group(1).splitlines() if line.startswith("  ")}
    package = ROOT / "src" / "chiasm"
    there = {f"{p.name}/" for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert {name for name in shown if name.endswith("/")} == there - {"recipes/"}
    assert all((package / name).exists() for name in shown)


@pytest.mark.parametrize("name", READMES)
def test_verbs_exist(name: str) -> None:
    from chiasm.cli import app, data_app

    verbs = {c.name or c.callback.__name__ for group in (app, data_app) for c in group.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"^chiasm (?:data )?(\w+)", (ROOT / name).read_text(), re.MULTILINE)) <= verbs
