"""The recipe `unified` trains an image tokenizer, then a decoder that reads and draws; patches train as well."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from PIL import Image

import chiasm
from chiasm.data.drawing import drawn
from chiasm.data.schema import ImageRef, Sample
from chiasm.evaluation.run_report import report_run
from chiasm.training.log import read_log
from chiasm.training.recipe import load_recipe

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}
SMALL = ["batch_size=8", "validation.samples=6", "validation.every=20", "validation.drawings=3"]


def samples(drawings: bool = True, size: tuple[int, int] = (20, 20)) -> list[Sample]:
    made = []
    for index in range(64):
        name = list(COLOURS)[index % 4]
        shown = [ImageRef.of(Image.new("RGB", (size[0] + index % 3, size[1]), COLOURS[name]), name)]
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]}
        told = [asked, {"role": "assistant", "content": name}]
        draws = drawings and index % 8 < 4
        made.append(Sample(f"s{index}", drawn(name) if draws else told, shown))
    return made


def log(result: Any, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(result.log).read_text().splitlines()]
    return [line for line in lines if kind in line.values()]


def test_both_stages(tmp_path: Path) -> None:
    vlm = helpers.unified(helpers.VQ)
    steps = [
        "stages.tokenizer.steps=60",
        "stages.tokenizer.parts.vision.lr=1e-2",
        "stages.unified.steps=60",
        "stages.unified.parts.language.lr=5e-3",
    ]
    before = {name: parameter.clone() for name, parameter in vlm.model.named_parameters()}
    result = chiasm.train("unified", vlm, samples(), tmp_path / "run", overrides=SMALL + steps, quiet=True)
    told = log(result, "validation")
    first = [line for line in told if line["stage"] == "tokenizer"]
    assert first[-1]["psnr"] > first[0]["psnr"] + 3 and 0 < first[-1]["codes_used"] <= first[-1]["codes"] == 125
    last = [line for line in told if line["stage"] == "unified"]
    assert last[-1]["loss"] < 0.7 * last[0]["loss"] and last[-1]["loss"] < last[-1]["shuffled_loss"]
    assert not any("drawn_recall" in line for line in first)
    assert all(0 < line["drawn"] <= 3 and line["drawn_chance"] == 1 / line["drawn"] for line in last)
    assert all(0 <= line["drawn_recall"] <= 1 and line["drawn_psnr"] > 0 for line in last)
    tokenizer = chiasm.load(result.stages["tokenizer"]).model
    model = chiasm.load(result.model).model
    for name, parameter in model.named_parameters():
        assert torch.equal(tokenizer.get_parameter(name), before[name]) == name.startswith("language.")
        assert torch.equal(parameter, tokenizer.get_parameter(name)) == name.startswith("vision.")
    assert chiasm.load(result.model).draw("red", seed=0).size == (16, 16)
    page = report_run(tmp_path / "run").read_text(encoding="utf-8")
    assert "Drawn pictures" in page and 'class="drawn" src="data:image/webp' in page


RESUMED = ["checkpoint_every=1", "validation.every=5", "stages.tokenizer.steps=40", "stages.unified.steps=30"]
KILLABLE = "import sys, pathlib, test_unified_stages as test; test.run(pathlib.Path(sys.argv[1]))"


def run(folder: Path) -> None:
    """Both stages with a checkpoint behind every step."""
    torch.manual_seed(0)
    chiasm.train("unified", helpers.unified(helpers.VQ), samples(), folder, overrides=SMALL + RESUMED, quiet=True)


@pytest.mark.slow
def test_a_kill_in_either_stage_changes_nothing(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    for stage in ("tokenizer", "unified"):
        killed_in(stage, folder)
    run(folder)
    run(whole)
    assert [event["stage"] for event in read_log(folder / "log.jsonl") if event["event"] == "resume"] == [
        "tokenizer",
        "unified",
    ]
    assert told(folder) == told(whole)
    ours, theirs = (helpers.weights(chiasm.load(place / "model")) for place in (folder, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def killed_in(stage: str, folder: Path) -> None:
    """Starts the run, or lets it go on, and ends it by SIGKILL somewhere behind the first checkpoint of `stage`."""
    log, process = folder / "log.jsonl", helpers.started(KILLABLE, folder)
    while process.poll() is None:
        if log.exists() and any(e["event"] == "step" and e["stage"] == stage and e["step"] > 1 for e in read_log(log)):
            time.sleep(time.time_ns() % 150 / 1000)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, error.decode()


def told(folder: Path) -> list[list[Any]]:
    """Every loss and measure in a run's log."""
    measures = ("event", "stage", "step", "loss", "shuffled_loss", "psnr", "codes_used", "answers", "drawn_psnr")
    events = [event for event in read_log(folder / "log.jsonl") if event["event"] in ("step", "validation")]
    return [[event.get(measure) for measure in measures] for event in events]


def test_patches_of_different_shapes(tmp_path: Path) -> None:
    vlm = helpers.unified({"name": "patches", "patch_size": 8})
    stage = {"name": "read", "steps": 30, "parts": {"vision": {"tune": "full", "lr": 3e-3}, "language": "full"}}
    recipe = {"lr": 3e-3, "batch_size": 8, "validation": {"samples": 6, "answers": 0}, "stages": [stage]}
    result = chiasm.train(load_recipe(recipe), vlm, samples(drawings=False), tmp_path / "run", quiet=True)
    told = log(result, "validation")
    assert told[-1]["loss"] < told[0]["loss"] and told[-1]["loss"] < told[-1]["shuffled_loss"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 'tokenizer': reconstruction trains an image tokenizer, which"):
        chiasm.train("unified", helpers.unified("patches"), samples(), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="reconstruction trains an image tokenizer alone: make two stages"):
        load_recipe("unified", ["stages.tokenizer.objectives=[reconstruction, next_token]"])
