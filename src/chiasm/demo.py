"""`chiasm demo`: real weights, real pictures, both stages, a report: eyes for a language model in ten minutes."""

import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from chiasm import api, sources, vlm
from chiasm.comparison.cost import cost
from chiasm.connecting.connect import DEFAULT_LANGUAGE, DEFAULT_VISION, connect
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.data.schema import Sample
from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.report import write_report
from chiasm.evaluation.skills import to_table
from chiasm.training.log import read_log
from chiasm.training.pace import seconds_per_sample
from chiasm.training.precision import choose_dtype
from chiasm.training.recipe import load_recipe
from chiasm.training.reporter import progress_bar
from chiasm.training.run import LOG

FEATURES = {"layers": ["stage5", "head"], "grid": [2, 2], "reduce": "pool"}
"""Four visual tokens, one for each corner: an object is one token, as a word is, so that counting is soon learned."""
REGIONS = (2, 2)
"""Corners by name, in front of their tokens: words for places are learned from far fewer pictures than coordinates."""
SKILLS = {"naming": 0.8, "counting": 1.0, "position": 1.2, "colour": 0.3}
"""How often each skill is asked about. Reading needs finer patches and more than minutes."""
CAPTIONS, QUESTIONS, TESTS = 400, 4, 300
MINUTES, MOST_SCENES = 6.5, 8000
"""How long the second stage may take, and how many scenes are enough on a faster machine."""
SCENE = "scene.png"
"""A picture that the model has not seen, to ask it about."""
QUICK = ("stages.align.steps=2", "stages.instruct.steps=3")


def run_demo(output: Path, quick: bool = False, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Connects, trains, measures and reports; returns the summary per skill and the time of each phase.

    Args:
        output: folder of the run; one that was stopped is resumed.
        quick: a handful of steps and questions, which shows that everything works but not that it learns.
    """
    console = console or Console()
    seconds: dict[str, float] = {}
    with _phase("fetch", seconds, console):
        for alias in (DEFAULT_VISION, DEFAULT_LANGUAGE, "twemoji"):
            sources.pull(alias)
    with _phase("connect", seconds, console):
        device = vlm.best_device()
        options: dict[str, Any] = {"features": FEATURES, "regions": REGIONS, "chat_template": "lean"}
        model = connect(**options, dtype=_weights(device), seed=seed)
        model.to(device)
    share = 0.02 if quick else 1.0
    held_out = EmojiScenes("validation", size=max(20, int(100 * share)), seed=seed, weights=SKILLS)
    with _phase("time", seconds, console):
        scenes = int(MOST_SCENES * share) if quick else scenes_in_time(model, output, seed)
        console.print(f"[dim]this machine goes through {scenes:,} scenes in {MINUTES:g} minutes[/dim]")
    with _phase("train", seconds, console):
        trained = api.train(
            "demo",
            model,
            training_data(seed, int(CAPTIONS * share), scenes),
            output,
            validation_data=held_out,
            overrides=QUICK if quick else (),
        )
    test = EmojiScenes("test", size=max(12, int(TESTS * share)), seed=seed, weights=SKILLS)
    with _phase("evaluate", seconds, console), progress_bar("answering", console) as update:
        result = api.evaluate(model, test, batch_size=50, max_new_tokens=8, progress=update)
        result.save(output / "evaluation")
    scene = output / SCENE
    test[0].images[0].load().save(scene)
    with _phase("report", seconds, console):
        _report(output, model, result, [*test, *held_out], seconds)
    console.print(to_table(result.summary, title="unseen scenes"))
    console.print(f"report: {output / 'report.html'}", markup=False, soft_wrap=True)
    console.print(f"talk to it: [bold]{escape(_command(output))}[/bold]", soft_wrap=True)
    return {
        "summary": result.summary,
        "seconds": seconds,
        "model": str(trained.model),
        "report": str(output / "report.html"),
        "scene": str(scene),
    }


def scenes_in_time(model: vlm.VLM, output: Path, seed: int) -> int:
    """Scenes that the second stage goes through in `MINUTES` on this machine; a resumed run keeps its number."""
    log = read_log(output / LOG) if (output / LOG).is_file() else []
    if (begun := next((entry["samples"] for entry in log if entry["event"] == "start"), 0)) > CAPTIONS:
        return begun - CAPTIONS
    stage = load_recipe("demo").stages[-1]
    samples = questions(seed, 6 * stage.batch_size)
    pace = seconds_per_sample(model.model, model.processor, stage, list(samples))
    return max(1, min(MOST_SCENES, int(60 * MINUTES / pace)))


def training_data(seed: int, captions: int, scenes: int) -> list[Sample]:
    """Captions, from which the connector starts, and questions about other pictures."""
    return [*EmojiScenes("train", size=captions, seed=seed + 1000, form="caption"), *questions(seed, scenes)]


def questions(seed: int, scenes: int) -> EmojiScenes:
    return EmojiScenes("train", size=scenes, seed=seed, questions_per_scene=QUESTIONS, weights=SKILLS)


def _weights(device: torch.device) -> torch.dtype | str:
    """The checkpoints' own, but for their bfloat16 where it is multiplied in software, many times slower."""
    return torch.float32 if choose_dtype("auto", device) == torch.float32 else "auto"


def _report(output: Path, model: vlm.VLM, result: EvalResult, shown: list[Sample], seconds: dict[str, float]) -> None:
    pictures = {sample.id: sample.images[0] for sample in shown}
    costs = cost(model.model)
    info = {
        "title": "Chiasm demo",
        "vision": DEFAULT_VISION,
        "connector": model.model.config.connector["name"],
        "language": DEFAULT_LANGUAGE,
        "fusion": model.model.config.fusion,
        "parameters": costs.parameters,
        "visual_tokens": costs.visual_tokens,
        "timings": seconds,
        "data": "emoji scenes: trained on drawn pictures, tested on new ones",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": _command(output),
    }
    write_report(output / "report.html", read_log(output / LOG), result, info, lambda i: pictures[i].load())


def _command(output: Path) -> str:
    return f"chiasm chat {shlex.quote(str(output / 'model'))} {shlex.quote(str(output / SCENE))}"


@contextmanager
def _phase(name: str, seconds: dict[str, float], console: Console) -> Iterator[None]:
    """Times a phase and says that it is over."""
    start = monotonic()
    yield
    seconds[name] = monotonic() - start
    console.print(f"[dim]{name}: {seconds[name]:.0f} s[/dim]")
