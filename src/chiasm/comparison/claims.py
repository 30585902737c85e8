"""Claims about ways of connecting, judged by numbers: supported, not supported, or no difference at this scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from chiasm.comparison.plan import Claim
from chiasm.comparison.recommend import Way, difference, ways_of
from chiasm.comparison.ways import Row, by_way, interval, mean_of
from chiasm.evaluation.format import percent

SUPPORTED, AGAINST, EQUAL, OPEN = "supported", "not supported", "no difference at this scale", "not measured"


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
            verdicts.append(_by_gates(claim, cells[claim.better]))
        elif claim.measure == "accuracy":
            skill_of = {row["id"]: row["skill"] for row in answers[cells[claim.better][0]["name"]]}
            verdicts.append(_by_answers(claim, ways[claim.better], ways[claim.than], skill_of))
        else:
            verdicts.append(_by_numbers(claim, cells[claim.better], cells[claim.than]))
    return verdicts


def _by_answers(claim: Claim, better: Way, than: Way, skill_of: Mapping[str, str]) -> Verdict:
    wanted = claim.skills or list(dict.fromkeys(skill_of.values()))
    questions = [question for question, skill in skill_of.items() if skill in wanted]
    if not questions:
        return Verdict(claim.text, OPEN, f"the test asks nothing about {', '.join(wanted)}")
    found = difference(better, than, among=set(questions).__contains__)
    verdict = SUPPORTED if found.low > 0 else AGAINST if found.high < 0 else EQUAL
    about = f" about {', '.join(claim.skills)}" if claim.skills else ""
    here, there = (percent(_mean(way, questions)) for way in (better, than))
    seeds = min(len(better.scores), len(than.scores))
    counted = f"{len(questions)} questions{about}, {seeds} seed{'s' * (seeds > 1)}"
    return Verdict(claim.text, verdict, f"{better.name} {here}, {than.name} {there}: {found.words}; {counted}")


def _mean(way: Way, questions: Sequence[str]) -> float:
    return fmean(answers[question] for answers in way.scores.values() for question in questions)


def _by_gates(claim: Claim, cells: Sequence[Row]) -> Verdict:
    """Whether gates were closed before training, so that the model was the language model alone, and are open after."""
    gates = [cell["training"].get("gates") for cell in cells]
    if not all(gates):
        return Verdict(claim.text, OPEN, f"{claim.better} has no gates")
    first, last = [one[0] for one in gates], [one[-1] for one in gates]
    verdict = SUPPORTED if not any(first) and all(last) else AGAINST
    seeds = f"{len(gates)} seed{'s' * (len(gates) > 1)}"
    return Verdict(claim.text, verdict, f"open by {fmean(first):.3f} before training, {fmean(last):.3f} after; {seeds}")


def _by_numbers(claim: Claim, better: Sequence[Row], than: Sequence[Row]) -> Verdict:
    """By a number of which less is better: exact for costs, with an interval over seeds for what training did."""
    if claim.measure == "kv_cache_bytes_per_image":
        here, there = (mean_of(cells, "closed_form", claim.measure) for cells in (better, than))
        if here is None or there is None:
            return Verdict(claim.text, OPEN, "one of them keeps no cache")
        verdict = SUPPORTED if here < there else EQUAL if here == there else AGAINST
        return Verdict(claim.text, verdict, f"{here / 1024:,.0f} KiB a picture against {there / 1024:,.0f} KiB")
    sides = [[_change(cell) for cell in cells] for cells in (better, than)]
    known = [[value for value in side if value is not None] for side in sides]
    if not all(known):
        return Verdict(claim.text, OPEN, "text was not read before and after")
    (low, high), (other_low, other_high) = (_spread(side) for side in known)
    means = [fmean(side) for side in known]
    told = f"perplexity {means[0]:+.2f} against {means[1]:+.2f}"
    if min(map(len, known)) < 2:
        verdict = SUPPORTED if means[0] < means[1] else EQUAL if means[0] == means[1] else AGAINST
        return Verdict(claim.text, verdict, f"{told}; one seed, so without an interval")
    verdict = SUPPORTED if high < other_low else AGAINST if low > other_high else EQUAL
    between = f"{low:+.2f} to {high:+.2f} and {other_low:+.2f} to {other_high:+.2f}"
    return Verdict(claim.text, verdict, f"{told}; over seeds {between}")


def _change(cell: Row) -> float | None:
    """The change of perplexity by training, of the first text."""
    return next(iter(((cell["forgetting"] or {}).get("perplexity_change") or {}).values()), None)


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
