"""The shuffled-image control: for every sample another one, whose pictures are shown in place of its own."""

from collections import defaultdict
from random import Random
from typing import Any

from chiasm.data.schema import Samples


def wrong_pictures(samples: Samples, seed: int = 0) -> tuple[dict[int, int], list[str]]:
    """For every sample with images another one whose pictures stand in for them, and notes on those without.

    The other has the same number of images and shares none of them (by content). It is of the same skill where that has
    one to offer, so that the control sees the usual kind of picture; and nobody's pictures serve twice if possible.
    """
    keys = {number: frozenset(ref.key() for ref in sample.images) for number, sample in enumerate(samples)}
    with_images = [number for number in keys if keys[number]]
    donors: dict[int, int] = {}
    for level in (True, False):
        groups: dict[Any, list[int]] = defaultdict(list)
        for number in with_images:
            groups[len(samples[number].images), samples[number].skill if level else None].append(number)
        for group in groups.values():
            found = _derange(group, keys, Random(seed))
            donors |= {number: donor for number, donor in found.items() if number not in donors}
    missing = [samples[number].id for number in with_images if number not in donors]
    if not missing:
        return donors, []
    listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    reason = "no other sample has as many images, all of them different"
    return donors, [
        f"no shuffled-image control for {len(missing)} of {len(with_images)} samples with images: {reason} ({listed})"
    ]


def _derange(numbers: list[int], keys: dict[int, frozenset[str]], random: Random) -> dict[int, int]:
    """Hand every member of a group another's pictures: those with the same picture stand side by side in a random ring,
    and everyone takes from as far on as the largest such set is long. Who still meets their own takes any other's."""
    same: dict[frozenset[str], list[int]] = defaultdict(list)
    for number in random.sample(numbers, len(numbers)):
        same[keys[number]].append(number)
    ring = [number for members in same.values() for number in members]
    shift = max(len(members) for members in same.values())
    donors: dict[int, int] = {}
    for place, number in enumerate(ring):
        donor = ring[(place + shift) % len(ring)]
        if keys[number] & keys[donor]:
            strangers = [other for other in ring if not keys[number] & keys[other]]
            if not strangers:
                continue
            donor = random.choice(strangers)
        donors[number] = donor
    return donors
