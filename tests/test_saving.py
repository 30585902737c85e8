"""A model is saved whole or not at all, and an older one in its folder stays whole until then."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import chiasm
import tiny
from chiasm.vision.image_processor import ChiasmImageProcessor

FUSIONS = ("early", "late")


def connect(fusion: str, seed: int) -> Any:
    pictures = ChiasmImageProcessor(30, [0.5] * 3, [0.5] * 3)
    language = tiny.language() if fusion == "early" else tiny.bert()
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "image_processor": pictures, "seed": seed}
    return chiasm.connect(tiny.vision(), language, fusion=fusion, **options)


def same(folder: Path, saved: Any) -> bool:
    found, ours = chiasm.load(folder).model.state_dict(), saved.model.state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_older_model_stays_until_the_new_one_is_whole(
    fusion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = connect(fusion, 0), connect(fusion, 1)
    old.save_pretrained(tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(new.processor), "save_pretrained", interrupted)
        new.save_pretrained(tmp_path / "model")
    assert same(tmp_path / "model", old)
    for name in ("added_tokens.json", "notes.txt"):
        (tmp_path / "model" / name).write_text("{}")
    new.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model/added_tokens.json").exists() and (tmp_path / "model/notes.txt").exists()
    assert same(tmp_path / "model", new) and not same(tmp_path / "model", old)
    assert not list(tmp_path.rglob(".partial-*"))


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
import test_saving
model = test_saving.connect("early", 1)
type(model.processor).save_pretrained = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
model.save_pretrained(sys.argv[1])
"""


def test_a_kill_leaves_no_folder_that_looks_like_a_model(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(here)]
    assert subprocess.run(command, env=os.environ, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    connect("early", 1).save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
