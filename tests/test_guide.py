"""The guide is one program that runs from top to bottom; its Korean page is the same program."""

import re
from pathlib import Path

import pytest

import tiny
from chiasm.language.byte_tokenizer import plain_byte_tokenizer

GUIDE = Path(__file__).parents[1] / "docs"
MODELS = re.compile(r"^vision, language, text = .*$", re.MULTILINE)
TINY = 'vision, language, text = "clip", "llama", "bert"'


def program(name: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (GUIDE / name).read_text(encoding="utf-8"), re.DOTALL))


def test_both_languages_are_one_program() -> None:
    assert program("guide.ko.md") == program("guide.md")


def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.vision("convnext").save_pretrained("clip")
    tiny.language().save_pretrained("llama")
    tiny.bert().save_pretrained("bert")
    tiny.tokenizer().save_pretrained("llama")
    plain_byte_tokenizer().save_pretrained("bert")
    text, replaced = MODELS.subn(TINY, program("guide.md"))
    assert replaced == 1
    names: dict = {}
    exec(compile(text, "guide.md", "exec"), names)
    assert names["tokens"].shape == (1, names["vlm"].cost().visual_tokens, 36)
    assert names["scores"].shape == (2, 2) and names["drawn"].size == (32, 32)
    assert isinstance(names["answer"], str) and Path("looked.png").is_file()
