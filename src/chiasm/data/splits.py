"""Parts of data: a stable division of what has none, by ids and not by the order; and some samples, evenly spread."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from chiasm.data.schema import Samples

SPLITS = ("train", "validation", "test")


@runtime_checkable
class HasIds(Protocol):
    """A sequence that knows its samples' ids without building the samples."""

    def ids(self) -> Any: ...


class Subset(Samples):
    """The samples of `samples` at `indices`, in that order."""

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self.samples, self.indices = samples, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Subset(self.samples, self.indices[index].tolist())
        return self.samples[int(self.indices[index])]

    def ids(self) -> list[str]:
        """Every sample's id, without building the samples where that is possible."""
        known = ids_of(self.samples)
        return [known[index] for index in self.indices]


def ids_of(samples: Samples) -> list[str]:
    """Every sample's id: from `samples.ids()` where there is one, else out of the samples themselves."""
    return list(samples.ids()) if isinstance(samples, HasIds) else [sample.id for sample in samples]


def spread(samples: Samples, limit: int | None) -> Samples:
    """At most `limit` samples, evenly spread over the data."""
    if limit is None or limit >= len(samples):
        return samples
    return Subset(samples, [index * len(samples) // limit for index in range(limit)])


def hold_out(samples: Samples, fraction: float = 0.05, at_most: int = 512, seed: int = 0) -> tuple[Subset, Subset]:
    """(samples to train on, samples held out): `fraction` of the ids by their hash, never more than `at_most` ids.

    An id stays on its side however the data grows or is reordered (while `at_most` is not reached), and all samples of
    one id stay together. At least one id is on either side. ValueError for data with a single id.
    """
    if not 0 < fraction < 1 or at_most < 1:
        raise ValueError(
            f"hold-out of fraction {fraction}, at most {at_most}: expected 0 < fraction < 1 and at least 1"
        )
    ids = ids_of(samples)
    order = sorted((stable_fraction(sample_id, seed), sample_id) for sample_id in set(ids))
    if len(order) < 2:
        raise ValueError(f"{len(order)} sample(s) with an id of their own: at least 2 are needed to hold one out")
    number = sum(place < fraction for place, _ in order)
    held_ids = {sample_id for _, sample_id in order[: min(max(number, 1), at_most, len(order) - 1)]}
    kept = [index for index, sample_id in enumerate(ids) if sample_id not in held_ids]
    held = [index for index, sample_id in enumerate(ids) if sample_id in held_ids]
    return Subset(samples, kept), Subset(samples, held)


def stable_fraction(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but `text` and `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:7], "big") / 2**56
