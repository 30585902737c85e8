"""`report.html`, one page on a run: what was connected, how it learned, what it can do, how to talk to it.

Self-contained: no script, no network (a content security policy forbids both), light and dark, for phone and paper too.
"""

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.format import amount, count, percent, percent_range
from chiasm.evaluation.learning import cost_table, learning_of
from chiasm.evaluation.page import write_page
from chiasm.evaluation.plots import MAX_PICTURES, Pictures, embedded, skill_curves, skill_intervals, thumbnail
from chiasm.evaluation.progress import Event, forgetting_table, skill_progress
from chiasm.evaluation.skills import ALL, Row

TEMPLATE = Path(__file__).parent / "report.html.j2"
ANSWERED = "contains"
"""What the summary of questions has, and that of retrieval, labels and drawings has not."""

INFO: dict[str, str] = {
    "title": "the run's name",
    "vision": "the vision encoder's name",
    "connector": "the connector's name",
    "language": "the language model's name",
    "fusion": "early, intermediate, late or unified",
    "parameters": "part -> number of parameters",
    "visual_tokens": "visual tokens per image",
    "stages": "a list of dicts with the keys of STAGE, in order",
    "timings": "phase -> seconds",
    "data": "what it was trained and tested on",
    "machine": "what it ran on",
    "command": "the command line to chat",
}
STAGE: dict[str, str] = {
    "name": "the stage's name, as in the log",
    "parts": "part -> what happens to it, such as 'frozen', 'finetune 1e-3', 'LoRA r=16'",
    "trainable": "number of trainable parameters",
    "steps": "planned steps",
    "objectives": "text",
    "data": "text",
}
_FOLLOWED = 4
_MOMENTS = 6


def write_report(
    path: str | Path,
    log: Sequence[Event],
    result: EvalResult | None,
    info: Mapping[str, Any],
    images: Pictures = lambda sample_id: None,
    drawn: Image.Image | None = None,
) -> Path:
    """Write the page to `path` and return it.

    Args:
        log: the lines of `log.jsonl`; any part of it may be missing.
        result: what `evaluate` gave, or None.
        info: any of the keys of `INFO`.
        images: a sample's id → its picture, or None where it has none. One that cannot be read leaves a blank.
        drawn: pictures that the model drew, beside the true ones; by default those of the result.

    Raises:
        ValueError: `info` has an unknown key.
    """
    path = Path(path)
    _refuse_unknown("info", info, INFO)
    stages = info.get("stages") or [_planned(event) for event in log if event["event"] == "plan" and "parts" in event]
    for stage in stages:
        _refuse_unknown("info['stages']", stage, STAGE)
    learning = learning_of(log)
    drawn = result.sheet if result and result.sheet else drawn
    answered = bool(result and result.summary and ANSWERED in result.summary[-1])
    fields = {
        "info": {key: info.get(key) for key in INFO},
        "command": info.get("command") or f"chiasm chat {shlex.quote(str(path.parent / 'model'))} picture.jpg",
        "chain": _chain(info),
        "whole": _whole(info),
        "plan": _plan(stages),
        "learning": learning,
        "costs": cost_table(learning),
        "skills_over_time": Markup(skill_curves(skill_progress(log)) or ""),
        "forgotten": forgetting_table(log),
        "summary": result.summary if result else [],
        "answered": answered,
        "total": result.summary[-1] if result and answered else None,
        "verdict": _verdict(result.summary[-1]) if result and answered else None,
        "drawn": None if drawn is None else embedded(drawn, drawn.width),
        "notes": _notes(result) if result else [],
        "skills_plot": Markup(skill_intervals(result.summary) or "") if result else "",
        "percent_range": percent_range,
        "wall": _wall(result.rows, images) if result and answered else [],
        "followed": _followed(log, images),
        "timings": _timings(info.get("timings") or {}),
    }
    return write_page(path, TEMPLATE, fields)


def _refuse_unknown(name: str, given: Mapping[str, Any], known: Mapping[str, str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{name} has the unknown key {unknown[0]!r}, expected some of {', '.join(known)}")


def _planned(event: Event) -> dict[str, Any]:
    stage = {key: event[key] for key in STAGE if key in event}
    return stage | ({"name": event["stage"]} if "stage" in event else {})


def _chain(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the picture goes through, in order, with a line on each."""
    chain = []
    for part, label in (("vision", "vision encoder"), ("connector", "connector"), ("language", "language model")):
        if info.get(part):
            size = (info.get("parameters") or {}).get(part)
            facts = [f"{count(size)} parameters"] if size is not None else []
            if part == "connector" and info.get("visual_tokens"):
                facts.append(f"{count(info['visual_tokens'])} visual tokens per image")
            chain.append({"label": label, "name": info[part], "facts": facts})
    return chain


def _whole(info: Mapping[str, Any]) -> str:
    parameters = info.get("parameters") or {}
    facts = [f"{info['fusion']} fusion"] if info.get("fusion") else []
    facts += [f"{count(sum(parameters.values()))} parameters in all"] if parameters else []
    shown = ("vision", "connector", "language")
    facts += [
        f"{count(size)} in {part}" for part, size in parameters.items() if part not in shown or not info.get(part)
    ]
    return " · ".join(facts)


def _plan(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The freeze plan as a table: a row per stage, a column per part and per further key that any stage has."""
    parts = list(dict.fromkeys(part for stage in stages for part in stage.get("parts", {})))
    further = [key for key in STAGE if key not in ("name", "parts") and any(key in stage for stage in stages)]
    rows = []
    for number, stage in enumerate(stages, start=1):
        row = [stage.get("name", str(number)), *(stage.get("parts", {}).get(part, "–") for part in parts)]
        rows.append(row + [_cell(stage.get(key)) for key in further])
    return {"heads": ["stage", *parts, *further], "rows": rows} if stages else None


def _cell(value: Any) -> str:
    return count(value) if value is None or isinstance(value, int | float) else str(value)


def _verdict(total: Row) -> str | None:
    """Whether the right picture helps, in one sentence that says no more than the interval does."""
    if total["gain"] is None:
        return None
    gain, low, high = (f"{100 * total[key]:.1f}".replace("-", "−") for key in ("gain", "gain_low", "gain_high"))
    measured = f"the right picture adds {gain} points (95 % interval {low} to {high})"
    if total["gain_low"] > 0:
        return f"The model looks: {measured}."
    if total["gain_high"] < 0:
        return f"The right picture misleads the model: {measured}."
    return f"No evidence that the model looks: {measured}."


def _notes(result: EvalResult) -> list[str]:
    """The result's own notes, and what its numbers mean that a reader could miss."""
    notes = list(result.notes)
    if result.loss is not None and result.shuffled_loss is not None:
        notes.append(f"Loss {amount(result.loss, 3)} with the picture, {amount(result.shuffled_loss, 3)} with another.")
    metrics = {row["metric"] for row in result.rows}
    if "token_f1" in metrics:
        notes.append("Captions are scored by token F1, from 0 to 100; an answer counts as right from 50 on.")
    if "vqa_accuracy" in metrics:
        notes.append("Questions with ten annotators are scored by VQA accuracy.")
    controlled = [row for row in result.summary if row["skill"] != ALL and row.get("gain_low") is not None]
    unseen = [row["skill"] for row in controlled if row["gain_low"] <= 0]
    if unseen:
        notes.append(f"No evidence yet that the picture helps with: {', '.join(unseen)}.")
    total = result.summary[-1] if result.summary else None
    if total and total.get(ANSWERED, 0) > total["accuracy"] + 0.05:
        share = percent(total["contains"])
        notes.append(f"{share} of the answers contain the expected words: some of those counted wrong only say more.")
    return notes


def _wall(rows: Sequence[Row], images: Pictures) -> list[dict[str, Any]]:
    """Up to `MAX_PICTURES` questions, the first of every skill in the order of the test, whatever the answers."""
    by_skill: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_skill[row["skill"]].append(row)
    quota = _share(MAX_PICTURES, [len(group) for group in by_skill.values()])
    shown = sum(quota)
    return [
        {
            "skill": skill,
            "n": len(group),
            "cards": [row | {"picture": thumbnail(images, row["sample"], shown)} for row in group[:number]],
        }
        for (skill, group), number in zip(by_skill.items(), quota, strict=True)
        if number
    ]


def _share(places: int, wanted: Sequence[int]) -> list[int]:
    """`places` dealt out one by one in turn, nobody getting more than wanted."""
    given = [0] * len(wanted)
    while places and given != list(wanted):
        for index, limit in enumerate(wanted):
            if places and given[index] < limit:
                given[index] += 1
                places -= 1
    return given


def _followed(log: Sequence[Event], images: Pictures) -> list[dict[str, Any]]:
    """A few questions of the validation events with the answers that they got as training went on."""
    moments = [event for event in log if event["event"] == "validation" and event.get("answers")]
    if len(moments) > _MOMENTS:
        moments = [moments[round(i * (len(moments) - 1) / (_MOMENTS - 1))] for i in range(_MOMENTS)]
    asked = {answer["id"]: answer for event in moments for answer in event["answers"]}
    followed = []
    for sample_id, question in list(asked.items())[:_FOLLOWED]:
        given = [(event, answer) for event in moments for answer in event["answers"] if answer["id"] == sample_id]
        answers = [{"stage": event.get("stage"), "step": event.get("step"), **answer} for event, answer in given]
        picture = thumbnail(images, sample_id)
        followed.append({**question, "picture": picture, "answers": answers})
    return followed


def _timings(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    longest = max(seconds.values(), default=0) or 1
    return [{"phase": phase, "seconds": value, "share": 100 * value / longest} for phase, value in seconds.items()]
