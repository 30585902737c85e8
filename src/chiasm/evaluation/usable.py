"""Which samples of a data set can be scored: broken ones stop an evaluation, or are left out and counted."""

from collections import Counter

from chiasm.data.schema import ImageError, Sample, SampleError, Samples


def without_bad(samples: Samples) -> tuple[Samples, list[str]]:
    """The samples that are whole and whose pictures can be decoded, and a note on the others.

    Raises:
        ValueError: none is left.
    """
    kept: list[Sample] = []
    reasons: list[str] = []
    kinds: Counter[str] = Counter()
    for index in range(len(samples)):
        try:
            sample = samples[index].validate()
            for image in sample.images:
                image.load()
            kept.append(sample)
        except SampleError as error:
            kinds[error.problems[0].kind] += 1
            reasons.append(str(error))
        except ImageError as error:
            kinds[error.kind] += 1
            reasons.append(str(error))
    if not reasons:
        return samples, []
    counts = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common())
    if not kept:
        raise ValueError(f"none of the {len(reasons)} samples can be used ({counts}), the first being {reasons[0]}")
    return kept, [
        f"samples left out, since they cannot be used: {len(reasons)} ({counts}); chiasm data check names them"
    ]


def of_one_picture(samples: Samples) -> tuple[Samples, list[str]]:
    """The samples that show exactly one picture, which two towers score against a text, and a note on the others.

    Raises:
        ValueError: none is left.
    """
    kept = [sample for sample in samples if len(sample.images) == 1]
    left_out = len(samples) - len(kept)
    if samples and not kept:
        raise ValueError(f"none of the {left_out} samples has exactly one picture, which retrieval needs")
    note = f"samples left out, since they do not have exactly one picture: {left_out}"
    return kept, [note] if left_out else []
