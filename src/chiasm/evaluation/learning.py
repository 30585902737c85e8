"""What a run's log tells of each stage: its curves, where its losses ended, and what it took."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from chiasm.evaluation.format import amount, count, duration
from chiasm.evaluation.plots import gate_openness, loss_curves
from chiasm.evaluation.progress import Event


def learning_of(log: Sequence[Event]) -> list[dict[str, Any]]:
    """Per stage, in order: its curves and what they cost."""
    by_stage: dict[str, list[Event]] = defaultdict(list)
    for event in log:
        if "stage" in event:
            by_stage[event["stage"]].append(event)
    learning = []
    for number, (name, events) in enumerate(by_stage.items()):
        steps = _once([event for event in events if event["event"] == "step"])
        validations = _once([event for event in events if event["event"] == "validation"])
        train = [(event["step"], event["loss"]) for event in steps if event.get("loss") is not None]
        plot = loss_curves(train, validations, f"loss{number}")
        if plot is None:
            continue
        last = validations[-1] if validations else {}
        moments = [event["gates"] for event in events if event.get("gates")]
        learning.append(
            {
                "name": name,
                "plot": Markup(plot),
                "gates": Markup(gate_openness(moments, f"gates{number}") or ""),
                "steps": max((event["step"] for event in steps), default=None),
                "seconds": _seconds(events),
                "samples_per_second": _middle(steps, "samples_per_second"),
                "tokens_per_second": _middle(steps, "tokens_per_second"),
                "peak_memory": max((event.get("peak_memory_bytes") or 0 for event in steps), default=0) or None,
                "train_loss": fmean(loss for _, loss in train[-20:]) if train else None,
                "loss": last.get("loss"),
                "shuffled_loss": last.get("shuffled_loss"),
            }
        )
    return learning


def cost_table(learning: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What every stage took and where its losses ended, as a table."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "stage": lambda stage: stage["name"],
        "steps": lambda stage: count(stage["steps"]),
        "time": lambda stage: duration(stage["seconds"]),
        "samples/s": lambda stage: amount(stage["samples_per_second"], 1),
        "tokens/s": lambda stage: count(stage["tokens_per_second"]),
        "peak memory": lambda stage: f"{stage['peak_memory'] / 1e9:.2f} GB" if stage["peak_memory"] else "–",
        "training loss": lambda stage: amount(stage["train_loss"], 3),
        "validation loss": lambda stage: amount(stage["loss"], 3),
        "another picture": lambda stage: amount(stage["shuffled_loss"], 3),
    }
    return {"heads": list(columns), "rows": [[cell(stage) for cell in columns.values()] for stage in learning]}


def _once(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Events by step, the last word on each: a resumed run may have logged some steps twice."""
    by_step = {event["step"]: dict(event) for event in events}
    return [by_step[step] for step in sorted(by_step)]


def _seconds(events: Sequence[Event]) -> float | None:
    """What the end of the stage says it took, else the time from its first to its last event."""
    told = [event["seconds"] for event in events if event["event"] == "stage_end" and "seconds" in event]
    times = [event["time"] for event in events if "time" in event]
    return float(told[-1]) if told else float(max(times) - min(times)) if times else None


def _middle(steps: Iterable[Event], key: str) -> float | None:
    values = [step[key] for step in steps if step.get(key) is not None]
    return float(median(values)) if values else None
