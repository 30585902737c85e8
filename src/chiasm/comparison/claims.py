"""Claims about ways of connecting, judged by numbers: supported, not supported, or no difference at this scale."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from chiasm.comparison.differences import Way, beyond_control, difference
from chiasm.comparison.recommend import ways_of
from chiasm.comparison.schema import Claim
from chiasm.comparison.ways import Row, by_way, interval, mean_of
from chiasm.evaluation.format import latency, percent

SUPPORTED, AGAINST, EQUAL, OPEN = "supported", "not supported", "no difference at this scale", "not measured"
BLIND, ONCE = "opened, but does not look yet", "one run: not decided"
OPENED = 0.005
"""How far gates are open that count as opened: more than a few steps of an optimizer move any parameter."""


@dataclass(frozen=True)
class Verdict:
    """A claim, what the numbers say of it, and the numbers."""

    text: str
    verdict: str
    numbers: str


def judge(claims: Sequence[Claim], results: Sequence[Row], answers: Mapping[str, Sequence[Row]]) -> list[Verdict]:
    """A verdict on every claim; one whose ways are not finished is not measured."""
    ways = {way.name: way for way in ways_of(results, answers)}
    cells = by_way(results)
    verdicts = []
    for claim in claims:
        missing = [name for name in claim.ways if name not in ways]
        if missing:
            verdicts.append(Verdict(claim.text, OPEN, f"{missing[0]} is not among the finished cells"))
        elif claim.than is None:
            verdicts.append(_by_gates(claim, cells[claim.better], ways[claim.better]))
        elif claim.measure == "accuracy":
            verdicts.append(_by_answers(claim, ways[claim.better], ways[claim.than]))
        else:
            verdicts.append(_BY[claim.measure](claim, cells[claim.better], cells[claim.than]))
    return verdicts


def _by_answers(claim: Claim, better: Way, than: Way) -> Verdict:
    """By the questions of the claim's skills, and whether both ways look at the picture that they are about."""
    wanted = claim.skills or list(dict.fromkeys(better.skills.values()))
    questions = [question for question, skill in better.skills.items() if skill in wanted and question in than.groups]
    if not questions:
        return Verdict(claim.text, OPEN, f"the test asks nothing about {', '.join(wanted)}")
    about = f" about {', '.join(claim.skills)}" if claim.skills else ""
    found = _by_pairs(claim, better, than, questions, f"{len(questions)} questions{about}")
    blind = [words for way in (better, than) if (words := _not_looking(way, set(questions)))]
    return replace(found, numbers="; ".join([found.numbers, *blind]))


def _not_looking(way: Way, questions: set[str]) -> str | None:
    """In words, that a way answers these questions no better than about another picture."""
    gain = beyond_control(way, among=questions.__contains__)
    if gain is None or gain.low > 0:
        return None
    other = fmean(score for one in way.controls.values() for question, score in one.items() if question in questions)
    return f"{way.name} is not measurably better than with another picture ({percent(other)})"


def _by_retrieval(claim: Claim, better: Sequence[Row], than: Sequence[Row]) -> Verdict:
    """By the captions whose picture stands first."""
    for cells in (better, than):
        if not all(cell.get("retrieval") for cell in cells):
            return Verdict(claim.text, OPEN, f"{cells[0]['way']} was not asked to find pictures")
    here, there = _finder(better), _finder(than)
    return _by_pairs(claim, here, there, list(here.groups), f"{len(here.groups)} captions, recall@1")


def _finder(cells: Sequence[Row]) -> Way:
    """A way whose questions are captions, right where the picture stands first."""
    places = {cell["choice"]["seed"]: cell["retrieval"]["places"] for cell in cells}
    scores = {seed: {caption: float(place == 0) for caption, place in found.items()} for seed, found in places.items()}
    captions = {caption: caption for caption in cells[0]["retrieval"]["places"]}
    return Way(cells[0]["way"], scores, captions)


def _by_pairs(claim: Claim, better: Way, than: Way, questions: Sequence[str], counted: str) -> Verdict:
    """By the same questions, answered by both."""
    found = difference(better, than, among=set(questions).__contains__)
    verdict = SUPPORTED if found.low > 0 else AGAINST if found.high < 0 else EQUAL
    here, there = (percent(_mean(way, questions)) for way in (better, than))
    seeds = min(len(better.scores), len(than.scores))
    counted += f", {seeds} seed{'s' * (seeds > 1)}"
    return Verdict(claim.text, verdict, f"{better.name} {here}, {than.name} {there}: {found.words}; {counted}")


def _mean(way: Way, questions: Sequence[str]) -> float:
    return fmean(answers[question] for answers in way.scores.values() for question in questions)


def _by_gates(claim: Claim, cells: Sequence[Row], way: Way) -> Verdict:
    """Whether gates were closed before training, so that the model was the language model alone, and are open after,
    and what comes through them is of use."""
    gates = [cell["training"].get("gates") for cell in cells]
    if not all(gates):
        return Verdict(claim.text, OPEN, f"{claim.better} has no gates")
    first, last = [one[0] for one in gates], [one[-1] for one in gates]
    opened = not any(first) and min(last) >= OPENED
    blind = _not_looking(way, set(way.groups))
    verdict = AGAINST if not opened else SUPPORTED if blind is None else BLIND
    seeds = f"{len(gates)} seed{'s' * (len(gates) > 1)}"
    told = f"open by {fmean(first):.3f} before training, {fmean(last):.3f} after ({OPENED} counts as open); {seeds}"
    return Verdict(claim.text, verdict, "; ".join([told, *([blind] if blind else [])]))


def _by_cache(claim: Claim, better: Sequence[Row], than: Sequence[Row]) -> Verdict:
    """By the exact bytes that a picture keeps."""
    here, there = (mean_of(cells, "closed_form", claim.measure) for cells in (better, than))
    if here is None or there is None:
        return Verdict(claim.text, OPEN, "one of them keeps no cache")
    verdict = SUPPORTED if here < there else EQUAL if here == there else AGAINST
    return Verdict(claim.text, verdict, f"{here / 1024:,.0f} KiB a picture against {there / 1024:,.0f} KiB")


def _by_forgetting(claim: Claim, better: Sequence[Row], than: Sequence[Row]) -> Verdict:
    """By the change of perplexity through training, of the first text."""
    sides = [
        [next(iter(((cell["forgetting"] or {}).get("perplexity_change") or {}).values()), None) for cell in cells]
        for cells in (better, than)
    ]
    return _by_less(
        claim, sides, "text was not read before and after", "perplexity {} against {}", "{:+.2f}".format, lucky=True
    )


def _by_seconds(claim: Claim, better: Sequence[Row], than: Sequence[Row]) -> Verdict:
    """By the time that one more caption takes against all pictures."""
    sides = [[(cell.get("retrieval") or {}).get(claim.measure) for cell in cells] for cells in (better, than)]
    missing = "one of them was not asked to find pictures"
    return _by_less(claim, sides, missing, "{} a caption against {}", latency, lucky=False)


_BY = {
    "retrieval": _by_retrieval,
    "seconds_per_query": _by_seconds,
    "kv_cache_bytes_per_image": _by_cache,
    "perplexity_change": _by_forgetting,
}


def _by_less(
    claim: Claim,
    sides: Sequence[Sequence[float | None]],
    missing: str,
    told: str,
    words: Callable[[float], str],
    lucky: bool,
) -> Verdict:
    """By measured numbers of every seed, of which less is better, with an interval where there are several.

    Args:
        lucky: whether training's luck is in a number, so that one run decides nothing, unless a side is exactly 0 as
            a frozen language model's forgetting is.
    """
    known = [[value for value in side if value is not None] for side in sides]
    if not all(known):
        return Verdict(claim.text, OPEN, missing)
    (low, high), (other_low, other_high) = (_spread(side) for side in known)
    means = [fmean(side) for side in known]
    said = told.format(*map(words, means))
    if min(map(len, known)) < 2:
        verdict = SUPPORTED if means[0] < means[1] else EQUAL if means[0] == means[1] else AGAINST
        decided = verdict == EQUAL or 0 in means or not lucky
        return Verdict(claim.text, verdict if decided else ONCE, f"{said}; one seed, so without an interval")
    verdict = SUPPORTED if high < other_low else AGAINST if low > other_high else EQUAL
    between = f"{words(low)} to {words(high)} and {words(other_low)} to {words(other_high)}"
    return Verdict(claim.text, verdict, f"{said}; over seeds {between}")


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return interval(values, [(value, value) for value in values], bounded=False)


def to_markdown(verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """The verdicts of several comparisons, by their titles, as a page."""
    lines = []
    for title, found in verdicts.items():
        lines += [f"## {title}", "", "| claim | verdict | numbers |", "|---|---|---|"]
        cells = ([text.replace("|", "\\|") for text in (one.text, f"**{one.verdict}**", one.numbers)] for one in found)
        lines += [f"| {' | '.join(row)} |" for row in cells]
        lines.append("")
    return "\n".join(lines)
