"""Whether a run goes on with the one that its folder holds: what must be the same, and what may change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chiasm.training.checkpoint import CHECKPOINTS, Position
from chiasm.training.fingerprint import differences
from chiasm.training.schema import AFTER_A_FAULT, WITHOUT_EFFECT, Recipe


def fingerprint_of(recipe: Recipe, model: str, data: str, pictures: str, processor: str) -> dict[str, Any]:
    """What must be the same for a run to go on: everything that a weight depends on."""
    plain = recipe.model_dump(mode="json", include={"stages"})
    stages = [{key: value for key, value in stage.items() if key not in WITHOUT_EFFECT} for stage in plain["stages"]]
    return {"stages": stages, "model": model, "data": data, "pictures": pictures, "processor": processor}


def what_changes(folder: Path, position: Position, fingerprint: dict[str, Any]) -> list[str]:
    """Holds a run against the one that it is to go on with, as far as that has come: later stages may change.

    Returns:
        What changes of the stage in which the run stands, of `AFTER_A_FAULT`.

    Raises:
        ValueError: something else differs.
    """
    names = [stage["name"] for stage in fingerprint["stages"]]
    reached = names.index(position.stage) + 1
    _refuse_gone(folder, names)
    before, now = _as_far_as(position.fingerprint, reached), _as_far_as(fingerprint, reached)
    changed: list[str] = []
    if not position.finished and len(before["stages"]) == reached:
        one, other = before["stages"][-1], now["stages"][-1]
        changed = [key for key in AFTER_A_FAULT if _all_of(one, key) != _all_of(other, key)]
        before["stages"][-1], now["stages"][-1] = (_without(stage, AFTER_A_FAULT) for stage in (one, other))
    found = differences(before, now)
    if not found:
        return changed
    shown = [line if line.startswith("stages") else f"the {_is(line.split(' ')[0])} not the same" for line in found]
    listed = "; ".join(shown[:3]) + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "")
    raise ValueError(
        f"{folder} holds another run: {listed}. Restore that to go on, choose another folder, "
        "or start anew in this one with --no-resume (resume=False)"
    )


def _refuse_gone(folder: Path, stages: list[str]) -> None:
    kept = (path.name.rpartition("-") for path in (folder / CHECKPOINTS).iterdir())
    gone = min((stage for stage, _, step in kept if step.isdigit() and stage not in stages), default=None)
    if gone is not None:
        raise ValueError(
            f"{folder} holds another run: it has reached the stage {gone!r}, which the recipe does not have. Restore "
            "that to go on, choose another folder, or start anew in this one with --no-resume (resume=False)"
        )


def _as_far_as(fingerprint: dict[str, Any], reached: int) -> dict[str, Any]:
    """The first stages alone; a run of an earlier version may name more settings that no weight depends on."""
    stages = [{key: stage[key] for key in stage if key not in WITHOUT_EFFECT} for stage in fingerprint["stages"]]
    return {**fingerprint, "stages": stages[:reached]}


def _without(value: Any, keys: Sequence[str]) -> Any:
    """A stage without some settings, which its parts and patterns may have too."""
    plans = {
        name: {label: {key: plan[key] for key in plan if key not in keys} for label, plan in value[name].items()}
        for name in ("parts", "patterns")
    }
    return {key: value[key] for key in value if key not in keys} | plans


def _all_of(stage: dict[str, Any], key: str) -> list[Any]:
    """A setting of a stage and, where they have it too, of its parts and patterns."""
    plans = [stage, *stage["parts"].values(), *stage["patterns"].values()]
    return [plan.get(key) for plan in plans]


def _is(key: str) -> str:
    return f"{key} are" if key.endswith("s") else f"{key} is"


def moved(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A note, where the machine or its software is another one."""
    found = differences(before, now)
    return (
        [f"this is not the machine or software of before ({'; '.join(found)}): results may differ in the last bits"]
        if found
        else []
    )
