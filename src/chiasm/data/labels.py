"""Labels: which tokens are learned, and how many of them are predicted."""

IGNORE = -100


def last_answer(labels: list[int]) -> list[int]:
    """The last run of supervised labels: what an encoder–decoder's decoder says."""
    end = max(place for place, label in enumerate(labels) if label != IGNORE) + 1
    start = next((place for place in range(end, 0, -1) if labels[place - 1] == IGNORE), 0)
    return labels[start:end]


def num_predicted(labels: list[int], encoder_decoder: bool) -> int:
    """Supervised tokens that are predicted: all of a decoder's that starts from a mark, else all but the first."""
    return sum(label != IGNORE for label in labels[0 if encoder_decoder else 1 :])
