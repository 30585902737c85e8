"""A data set without the samples that cannot be used, which are named: what `chiasm eval --skip-bad` asks about."""

from collections.abc import Callable, Sequence

from chiasm.data.check import WARNINGS, check
from chiasm.data.schema import Samples
from chiasm.data.splits import Subset
from chiasm.evaluation.skills import Row

NAMED = 5
"""Skipped samples that a note names; a result has all of them."""


def usable(samples: Samples, progress: Callable[[int, int], None] | None = None) -> tuple[Samples, list[Row]]:
    """The samples that can be used, and `id` and `reason` of each other one.

    Every picture is decoded here, and again when it is shown: the samples that there are decide whose picture is the
    wrong one for whom, so all must be known before the first question, and decoded pictures of a whole data set are
    more than memory holds.

    Raises:
        ValueError: none can be used.
    """
    reasons: dict[int, Row] = {}
    for found in check(samples, progress=progress).findings:
        if found.kind not in WARNINGS:
            reason = f"{found.file} {found.reason}" if found.file else found.reason
            reasons.setdefault(found.index, {"id": found.id, "reason": reason})
    kept = Subset(samples, [index for index in range(len(samples)) if index not in reasons])
    if reasons and not len(kept):
        first = next(iter(reasons.values()))
        raise ValueError(
            f"nothing to evaluate: none of the {len(samples)} samples can be used, the first being {first['id']!r}: "
            f"{first['reason']}; chiasm data check lists every one"
        )
    return kept, list(reasons.values())


def skipped_note(skipped: Sequence[Row], total: int) -> list[str]:
    """How many samples were skipped, the first of them by name; no note if there are none."""
    named = "; ".join(f"{row['id']!r}: {row['reason']}" for row in skipped[:NAMED])
    more = "; ..." if len(skipped) > NAMED else ""
    return [f"{len(skipped)} of {total} samples cannot be used and were skipped ({named}{more})"] if skipped else []


def of_one_picture(samples: Samples) -> tuple[Samples, list[str]]:
    """The samples that show exactly one picture, which two towers score against a text, and a note on the others.

    Raises:
        ValueError: none is left.
    """
    kept = Subset(samples, [index for index, sample in enumerate(samples) if len(sample.images) == 1])
    left_out = len(samples) - len(kept)
    if left_out and not len(kept):
        raise ValueError(f"none of the {left_out} samples has exactly one picture, which a model of two towers needs")
    note = f"samples left out, since they do not have exactly one picture: {left_out}"
    return kept, [note] if left_out else []
