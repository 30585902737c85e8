"""`chiasm demo`: real weights, real pictures, both stages, a report: eyes for a language model in ten minutes."""

import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console

from chiasm import api, sources, vlm
from chiasm.comparison.cost import cost
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.report import write_report
from chiasm.evaluation.skills import to_table
from chiasm.training.log import read_log

SCENES, QUESTIONS = 1200, 6
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
        for alias in (vlm.DEFAULT_VISION, vlm.DEFAULT_LANGUAGE, "twemoji"):
            sources.pull(alias)
    with _phase("connect", seconds, console):
        model = vlm.connect(seed=seed)
    with _phase("train", seconds, console):
        trained = api.train(
            "demo",
            model,
            EmojiScenes("train", size=64 if quick else SCENES, seed=seed, questions_per_scene=QUESTIONS, form="both"),
            output,
            validation_data=EmojiScenes("validation", size=20 if quick else 100, seed=seed),
            overrides=QUICK if quick else (),
        )
    with _phase("evaluate", seconds, console):
        test = EmojiScenes("test", size=10 if quick else 300, seed=seed)
        result = api.evaluate(model, test, batch_size=25, max_new_tokens=8)
        result.save(output / "evaluation")
    with _phase("report", seconds, console):
        _report(output, model, result, test, seconds)
    console.print(to_table(result.summary, title="unseen scenes"))
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)
    console.print(f"talk to it: [bold]chiasm chat {shlex.quote(str(trained.model))} PICTURE[/bold]", soft_wrap=True)
    return {
        "summary": result.summary,
        "seconds": seconds,
        "model": str(trained.model),
        "report": str(output / "report.html"),
    }


def _report(output: Path, model: vlm.VLM, result: EvalResult, test: EmojiScenes, seconds: dict[str, float]) -> None:
    pictures = {sample.id: sample.images[0] for sample in test}
    costs = cost(model.model)
    info = {
        "title": "Chiasm demo",
        "vision": vlm.DEFAULT_VISION,
        "connector": model.model.config.connector["name"],
        "language": vlm.DEFAULT_LANGUAGE,
        "fusion": model.model.config.fusion,
        "parameters": costs.parameters,
        "visual_tokens": costs.visual_tokens,
        "timings": seconds,
        "data": "emoji scenes: trained on drawn pictures, tested on new ones",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": f"chiasm chat {shlex.quote(str(output / 'model'))} picture.jpg",
    }
    write_report(output / "report.html", read_log(output / "log.jsonl"), result, info, lambda i: pictures[i].load())


@contextmanager
def _phase(name: str, seconds: dict[str, float], console: Console) -> Iterator[None]:
    """Times a phase and says that it is over."""
    start = monotonic()
    yield
    seconds[name] = monotonic() - start
    console.print(f"[dim]{name}: {seconds[name]:.0f} s[/dim]")
