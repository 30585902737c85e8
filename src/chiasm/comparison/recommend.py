"""A recommendation in words: which way of connecting to take here, why, and what the numbers do not tell.

Only ways that look are chosen of: those that answer measurably better than beside another sample's picture.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chiasm.comparison.differences import Difference, Way, beyond_control, from_best
from chiasm.comparison.ways import FEW_SHOT, by_way, mean_of
from chiasm.evaluation.format import operations, percent

Row = Mapping[str, Any]
MARGIN = 0.1
"""A way that costs less by no more than this share is not cheaper."""


@dataclass(frozen=True)
class Recommendation:
    """`way` is None where the numbers allow none. `best`: the most accurate way that looks. `alike`, `worse`: others,
    without a measurable difference from it and measurably worse; `blind`: those that nothing shows to look."""

    way: str | None
    best: str
    alike: list[str]
    worse: list[str]
    blind: list[str]
    sentences: list[str]


def ways_of(results: Sequence[Row], answers: Mapping[str, Sequence[Row]]) -> list[Way]:
    """Cells that differ only in their seed, put together.

    Args:
        answers: name of a cell -> the rows of its evaluation.
    """
    made = []
    for name, group in by_way(results).items():
        rows = {result["choice"]["seed"]: answers[result["name"]] for result in group}
        first = next(iter(rows.values()))
        scores, controls = (
            {
                seed: {row["id"]: float(row[key]) for row in asked if row[key] is not None}
                for seed, asked in rows.items()
            }
            for key in ("score", "control_score")
        )
        cost, words = _cost(group[0])
        made.append(
            Way(
                name,
                scores,
                {row["id"]: row["sample"] for row in first},
                controls if all(controls.values()) else {},
                cost,
                words,
                {row["id"]: row["skill"] for row in first},
                _perplexity(group),
            )
        )
    return made


def to_first_token(closed: Mapping[str, Any]) -> int | None:
    """FLOPs from a picture and its question to the first token of the answer; None of what makes no token."""
    parts = [closed.get(f"{part}_flops") for part in ("encode", "connect", "prefill")]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _cost(result: Row) -> tuple[float, str]:
    """FLOPs to the first token decide, encoding included; of late fusion, those of the picture's vector."""
    closed = result["closed_form"]
    flops, kept = to_first_token(closed), closed.get("kv_cache_bytes_per_image")
    if flops is None or kept is None:
        encoding = closed.get("encode_flops") or 0
        return float(encoding), f"{operations(encoding)} to a picture's vector, no place in a language model's context"
    return float(flops), f"{operations(flops)} to the first token and {kept / 1024:,.0f} KiB of KV cache a picture"


def _perplexity(cells: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Of every text, after training and before, over seeds."""
    found = {}
    for text in (cells[0]["forgetting"] or {}).get("perplexity", {}):
        now, change = (mean_of(cells, "forgetting", key, text) for key in ("perplexity", "perplexity_change"))
        if now is not None:
            found[text] = (now, now - (change or 0.0))
    return found


def recommend(ways: Sequence[Way], budget: str, named: Collection[str] = ()) -> Recommendation:
    """What to take of ways that were asked the same questions; those that were asked again behind solved examples, as
    late fusion cannot be, do not count.

    Args:
        budget: the budget in words.
        named: ways that have names of regions in front of their visual tokens.
    """
    said_of_skills, ways = _skills(ways), [way.without(FEW_SHOT) for way in ways]
    gains = {way.name: beyond_control(way, len(ways)) for way in ways}
    looking = [way for way in ways if (gain := gains[way.name]) is None or gain.low > 0]
    blind = [way for way in ways if way not in looking]
    best = max(looking or ways, key=lambda way: (way.accuracy, -way.cost))
    found = from_best(best, ways)
    alike = [way for way in looking if way is not best and not found[way.name].measurable]
    worse = sorted((way for way in ways if way is not best and found[way.name].low > 0), key=lambda way: -way.accuracy)
    lists = [way.name for way in alike], [way.name for way in worse], [way.name for way in blind]
    doubts = [*_names(ways, named), *_doubts(ways)]
    if not looking:
        none = (
            f"No way can be recommended: the best one, {best.name}, is right in {percent(best.accuracy)} of the "
            f"answers and in {percent(best.control)} with another sample's picture, which is no measurable difference. "
            f"Nothing shows that it looks; {budget} is too little here."
        )
        return Recommendation(None, best.name, *lists, [none, *doubts])
    least = min(way.cost for way in [best, *alike])
    chosen = max((way for way in [best, *alike] if way.cost <= (1 + MARGIN) * least), key=lambda way: way.accuracy)
    said = [
        f"Take {chosen.name} for this data and {budget}: {percent(chosen.accuracy)} right, {chosen.cost_words}.",
        *_why(best, chosen, alike, worse, found, everyone=len(worse) == len(ways) - 1),
        *_not_looking(blind),
        *said_of_skills,
        *_forgetting(chosen),
    ]
    return Recommendation(chosen.name, best.name, *lists, said + doubts)


def _why(
    best: Way,
    chosen: Way,
    alike: Sequence[Way],
    worse: Sequence[Way],
    found: Mapping[str, Difference],
    everyone: bool,
) -> list[str]:
    """How the chosen way stands to the others."""
    said = []
    if chosen is not best:
        said.append(
            f"{best.name} has the highest score, {percent(best.accuracy)}, but there is no measurable difference "
            f"between the two here ({found[chosen.name].words}), and {chosen.name} is cheaper."
        )
    if rest := [way.name for way in alike if way is not chosen]:
        most = f"{chosen.name} is the most accurate of those that cost least"
        cheap = "none of them is cheaper by more than a tenth" if chosen is best else most
        said.append(f"No measurable difference between {best.name} and {listed(rest)} here; {cheap}.")
    if everyone and worse:
        said.append("It is measurably better than every other way.")
    if worse:
        told = "; ".join(f"{way.name} by {found[way.name].words}" for way in worse)
        said.append(f"{best.name} beats these measurably: {told}.")
    return said


def _not_looking(blind: Sequence[Way]) -> list[str]:
    if not blind:
        return []
    told = listed([f"{way.name} ({percent(way.accuracy)}; {percent(way.control)})" for way in blind])
    return [
        f"Not to be chosen, because nothing shows that it looks: {told}. Beside another sample's picture, the second "
        "number, there is no measurable difference."
    ]


def _skills(ways: Sequence[Way]) -> list[str]:
    """Skills in which no way is better than beside another picture."""
    skills = list(dict.fromkeys(skill for way in ways for skill in way.skills.values()))
    if len(skills) < 2:
        return []
    blind = []
    for skill in skills:
        questions = {q for way in ways for q, kind in way.skills.items() if kind == skill}
        gains = (beyond_control(way, len(ways), among=questions.__contains__) for way in ways)
        known = [gain for gain in gains if gain is not None]
        if known and not any(gain.low > 0 for gain in known):
            blind.append(skill)
    if not blind:
        return []
    return [f"In {listed(blind)} no way is measurably better than beside another picture: none learned it."]


def _forgetting(chosen: Way) -> list[str]:
    """What training cost the chosen way's language model."""
    if not chosen.perplexity:
        return []
    moved = [f"{text} from {old:.2f} to {now:.2f}" for text, (now, old) in chosen.perplexity.items() if now != old]
    if not moved:
        return [f"{chosen.name} reads texts without pictures as it did before training."]
    return [f"Training changed how {chosen.name} reads texts without pictures: perplexity of {listed(moved)}."]


def _names(ways: Sequence[Way], named: Collection[str]) -> list[str]:
    with_names = [way.name for way in ways if way.name in named]
    without = [way.name for way in ways if way.name not in named]
    if not with_names or not without:
        return []
    return [
        f"Names of a picture's regions stand in front of the visual tokens of {listed(with_names)}, and not of "
        f"{listed(without)}, which can have none. So ways with names are compared with ways without: "
        "a difference between the two kinds is one of the names too."
    ]


def _doubts(ways: Sequence[Way]) -> list[str]:
    """What the reader must not take from the numbers."""
    seeds, pictures = min(len(way.scores) for way in ways), len(set(ways[0].groups.values()))
    pairs = len(ways) * (len(ways) - 1) // 2
    at_once = f", and hold for all {pairs} pairs of ways at once, because the same answers picked the best"
    said = [f"Intervals come from {pictures} pictures, resampled{at_once if pairs > 1 else ''}."]
    if any(not way.controls for way in ways):
        said.append("Nothing was asked beside another picture, so nothing shows which ways look.")
    if seeds == 1:
        said.append(
            "Every way was trained with one seed only: how much luck there is in a training run is not in the "
            "intervals. More seeds tell."
        )
    else:
        said.append(f"At least {seeds} seeds of every way are resampled with the pictures.")
    return said


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
