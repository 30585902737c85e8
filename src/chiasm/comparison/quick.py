"""A quick comparison: so little training, so few questions and layers that all of it is seen to work in seconds."""

from typing import Any

from chiasm.comparison.plan import load_plan
from chiasm.comparison.schema import Plan

QUICK: dict[str, Any] = {"samples": 4, "captions": 4, "limit": 8, "drawn": 120, "layers": 4}
"""How little it trains, asks, and keeps of the language model: not enough to tell which way is better."""


def quickened(plan: Plan) -> Plan:
    """The plan with so little training and so few questions that a cell takes seconds."""
    raw = plan.model_dump(mode="json", exclude_unset=True)
    few = {"caption_samples": QUICK["captions"], "validations": 1, "validation_samples": 4}
    few |= {"init": "keep", "forgetting": False}
    asked = {"limit": QUICK["limit"], "repeats": 0, "pictures": 10}
    if plan.evaluation.retrieval is not None:
        asked |= {"retrieval": min(QUICK["limit"], plan.evaluation.retrieval)}
    raw |= {"budget": {"samples": QUICK["samples"]}, "seeds": plan.seeds[:1]}
    for name, source in raw["data"].items():
        if isinstance(source, dict) and "size" in source:
            raw["data"][name] = source | {"size": min(QUICK["drawn"], source["size"])}
    raw |= {"base": {**raw.get("base", {}), "language_layers": _enough_layers(plan)}}
    raw |= {"training": {**raw.get("training", {}), **few}, "evaluation": {**raw.get("evaluation", {}), **asked}}
    return load_plan(raw)


def _enough_layers(plan: Plan) -> int:
    """Layers for a quick comparison: not fewer than the plan itself counts."""
    blocks = plan.base.cross_attention or {}
    tuned = [part.from_layer for parts in plan.strategies.values() for part in parts.values()]
    named = [layer + 1 for layer in (*blocks.get("layers", ()), *tuned) if isinstance(layer, int)]
    every = blocks.get("every")
    enough: int = max(QUICK["layers"], *named, every if isinstance(every, int) else 0)
    return min(enough, plan.base.language_layers or enough)


def warning_of(plan: Plan) -> str:
    """What the report says first where the language model was cut; else nothing."""
    count = plan.base.language_layers
    if count is None:
        return ""
    kept = "the first layer" if count == 1 else f"the first {count} layers"
    return f"No more than {kept} of the language model took part: all of it works, and the numbers mean nothing."
