"""What a run's log tells as training goes on: answers per skill, and what the parts that were good before forget."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from chiasm.evaluation.format import percent

Event = Mapping[str, Any]
FEWEST = 2
"""Moments that make a curve."""


def skill_progress(log: Sequence[Event]) -> dict[str, list[tuple[int, float, int]]]:
    """Per skill, at every validation: the step in the whole run, the share of right answers, and how many there are.

    Only skills that were asked about more than once.
    """
    offsets = _offsets(log)
    found: dict[str, dict[int, tuple[float, int]]] = defaultdict(dict)
    for event in log:
        if event["event"] != "validation":
            continue
        by_skill: dict[str, list[bool]] = defaultdict(list)
        for answer in event.get("answers", []):
            if "skill" in answer:
                by_skill[answer["skill"]].append(answer["correct"])
        for skill, right in by_skill.items():
            found[skill][offsets[event["stage"]] + event["step"]] = sum(right) / len(right), len(right)
    return {
        skill: [(step, *moments[step]) for step in sorted(moments)]
        for skill, moments in found.items()
        if len(moments) >= FEWEST
    }


def forgetting_table(log: Sequence[Event]) -> dict[str, Any] | None:
    """Text perplexity and vision drift before the first and after every stage, as a table."""
    events = [event for event in log if event["event"] == "forgetting"]
    by_stage = {event.get("stage", "before"): event for event in events}
    if not by_stage:
        return None
    texts = list(dict.fromkeys(text for event in events for text in event["perplexity"]))
    pictures = any("cka" in event for event in events)
    heads = ["after stage", *(f"{text} perplexity" for text in texts)]
    heads += ["neighbours kept", "CKA"] if pictures else []
    rows = []
    for stage, event in by_stage.items():
        row = [stage, *(_with_change(event, text) for text in texts)]
        if pictures:
            row += [percent(event.get("knn_overlap")), f"{event['cka']:.4f}" if "cka" in event else "–"]
        rows.append(row)
    return {"heads": heads, "rows": rows}


def _with_change(event: Event, text: str) -> str:
    change = event["perplexity_change"].get(text)
    told = "" if "stage" not in event or change is None else (" (unchanged)" if change == 0 else f" ({change:+.2f})")
    return f"{event['perplexity'][text]:.2f}{told}" if text in event["perplexity"] else "–"


def _offsets(log: Sequence[Event]) -> dict[str, int]:
    """Steps of the run before each stage."""
    last: dict[str, int] = {}
    for event in log:
        if "stage" in event:
            last[event["stage"]] = max(last.get(event["stage"], 0), event.get("step", 0))
    offsets, total = {}, 0
    for stage, steps in last.items():
        offsets[stage] = total
        total += steps
    return offsets
