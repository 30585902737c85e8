"""Cost as patches, pictures and text grow, in closed form: where one way of connecting overtakes another.

A model is reduced to a few numbers (`Shape`), so that curves need no model and reach sizes that were never built.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from chiasm.comparison.cost import kv_bytes_per_token, language_flops
from chiasm.connectors import Connector, build_connector
from chiasm.fusion.base import FusionModel
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.fusion.sequence import PositionedModel
from chiasm.fusion.unified import UnifiedModel

PATCHES = (49, 100, 196, 256, 400, 576, 784, 1024, 1296, 1600, 1936, 2304)
IMAGES = (1, 2, 3, 4, 5, 6, 7, 8)
MOST_IMAGES = 64
"""Up to which cross-attention may overtake the sequence."""
LARGE = 576
"""Patches of the pictures whose number grows."""
TEXT = 64


@dataclass(frozen=True)
class Shape:
    """What the costs of a prompt follow from.

    Args:
        tokens: places of a picture of `patches` patches: its visual tokens, and unified fusion's ends of rows.
        grows: whether they grow with the patches; None where the connector does not say.
        in_sequence: whether they stand in the sequence, or only cross-attention looks at them.
        matrices: elements that every token of the sequence is multiplied with.
        pair: FLOPs of one token attending to one other in all layers.
        cross_token, cross_look: FLOPs of a token in the gated blocks, and of its look at one visual token.
        cross_keys, cross_kept: FLOPs and bytes of a visual token's keys and values in them.
        names: further places of a picture in the sequence, of names of its regions and marks around it.
        counts: sizes of pictures in patches and the tokens of each, None where the connector does not say; without
            any, tokens that grow are in proportion to the patches.
    """

    tokens: int
    patches: int
    grows: bool | None
    in_sequence: bool
    matrices: int
    head: int
    pair: int
    kv_bytes: int
    cross_token: int = 0
    cross_look: int = 0
    cross_keys: int = 0
    cross_kept: int = 0
    names: int = 0
    counts: Sequence[tuple[int, int | None]] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def visual_tokens(self, patches: int) -> int | None:
        """Tokens of a picture: those that the connector tells, on a line between two of its sizes; None where it does
        not say."""
        counts = self.counts or ((self.patches, self.tokens),)
        at = bisect_left([size for size, _ in counts], patches)
        (low, fewer), (high, more) = counts[max(at - 1, 0)], counts[min(at, len(counts) - 1)]
        if high == patches:
            return more
        if self.grows is None or fewer is None or more is None:
            return None
        if low == high:  # smaller or larger than all that was asked for
            return max(1, round(more * patches / high)) if self.grows else more
        return round(fewer + (more - fewer) * (patches - low) / (high - low))

    def prompt(self, patches: int, images: int, text: int) -> tuple[int, int] | None:
        """Visual tokens that a prompt's text looks at, and places of the prompt; None where they are not known."""
        tokens = self.visual_tokens(patches)
        if tokens is None:
            return None
        return images * tokens, text + images * (self.names + (tokens if self.in_sequence else 1))


def shape_of(model: FusionModel, names: int = 0) -> Shape:
    """The shape of a decoder-only model.

    Args:
        names: tokens of a picture in the prompt that are neither visual tokens nor unified fusion's marks.
    """
    one, two = (language_flops(model, new=1, context=context, logits=0) for context in (1, 2))
    pair = two - one
    head = 2 * model.language.get_output_embeddings().weight.numel()
    common: dict[str, Any] = {"matrices": one - pair, "head": head, "pair": pair, "kv_bytes": kv_bytes_per_token(model)}
    common["names"] = names
    if isinstance(model, PositionedModel):
        rows, columns = model.vision.grid
        places = model.picture_places if isinstance(model, UnifiedModel) else lambda rows, columns: rows * columns
        sides = {patches: math.isqrt(patches) for patches in PATCHES}
        known = {patches: places(side, side) for patches, side in sides.items()}
        known |= {rows * columns: places(rows, columns)}
        return Shape(places(rows, columns), rows * columns, True, True, counts=_sorted(known), **common)
    connector: Connector = model.connector
    counts = _counts(connector, model.config.connector)
    tokens, patches = connector.num_tokens, model.vision.num_patches
    told = {count for _, count in counts if count is not None}
    grows = None if len([count for _, count in counts if count is not None]) < 2 else len(told) > 1
    shape = Shape(tokens, patches, grows, True, counts=counts, **common)
    if not isinstance(model, IntermediateFusionModel):
        return shape
    part = model.cross_attention
    here = part.settings
    kept = 2 * len(here.layers) * here.kv_heads * here.head_dim * part.blocks[0].k_proj.weight.dtype.itemsize
    return replace(
        shape,
        in_sequence=False,
        cross_token=part.flops(1, 0),
        cross_look=part.flops(1, 1) - part.flops(1, 0),
        cross_keys=part.keys_values_flops(1),
        cross_kept=kept,
    )


def _counts(connector: Connector, settings: dict[str, Any]) -> tuple[tuple[int, int | None], ...]:
    """Tokens that the same settings give on every grid of `PATCHES`, and on the connector's own."""
    found: dict[int, int | None] = {size: _tokens_on(connector, settings, math.isqrt(size)) for size in PATCHES}
    rows, columns = connector.grid
    return _sorted(found | {rows * columns: connector.num_tokens})


def _tokens_on(connector: Connector, settings: dict[str, Any], side: int) -> int | None:
    """Tokens on a square grid; None of a connector that is not made for it, whatever it raises.

    It is built without weights where it can be: its code may be anybody's, and may look at them.
    """
    built = connector.vision_width, connector.language_width, (side, side), connector.num_prefix
    for device in ("meta", "cpu"):
        with torch.random.fork_rng(), torch.device(device):
            try:
                return int(build_connector(settings, *built).num_tokens)
            except Exception:
                continue
    return None


def _sorted(counts: Mapping[int, int | None]) -> tuple[tuple[int, int | None], ...]:
    return tuple(sorted(counts.items()))


def cache_bytes(shape: Shape, patches: int, images: int = 1, text: int = TEXT) -> int | None:
    """Bytes that a prompt keeps for the answer; None where its places are not known, here and below."""
    if (prompt := shape.prompt(patches, images, text)) is None:
        return None
    seen, places = prompt
    return shape.kv_bytes * places + (0 if shape.in_sequence else shape.cross_kept * seen)


def prefill_flops(shape: Shape, patches: int, images: int = 1, text: int = TEXT) -> int | None:
    """FLOPs from visual tokens and words to the first token of the answer."""
    if (prompt := shape.prompt(patches, images, text)) is None:
        return None
    seen, places = prompt
    reading = places * (shape.matrices + shape.pair * places) + shape.head
    if shape.in_sequence:
        return reading
    return reading + seen * shape.cross_keys + places * (shape.cross_token + seen * shape.cross_look)


def decode_flops(shape: Shape, patches: int, images: int = 1, text: int = TEXT) -> int | None:
    """FLOPs of one more token of the answer."""
    if (prompt := shape.prompt(patches, images, text)) is None:
        return None
    seen, places = prompt
    beside = 0 if shape.in_sequence else shape.cross_token + seen * shape.cross_look
    return shape.matrices + shape.head + shape.pair * (places + 1) + beside


MEASURES: dict[str, Callable[[Shape, int, int, int], int | None]] = {
    "KV cache": cache_bytes,
    "prefill": prefill_flops,
    "decoding": decode_flops,
}


@dataclass(frozen=True)
class Crossing:
    """From `at` patches, or pictures, on `dear` costs more than `cheap`; 1 is everywhere, None nowhere."""

    measure: str
    dear: str
    cheap: str
    along: str
    at: int | None


def unknown(shapes: Mapping[str, Shape]) -> list[str]:
    """Ways that do not say how many tokens a picture of some size takes."""
    return [name for name, shape in shapes.items() if None in map(shape.visual_tokens, PATCHES)]


def crossings(shapes: Mapping[str, Shape], images: int = 1, text: int = TEXT) -> list[Crossing]:
    """For every way whose tokens grow in the sequence and every other that does not: from how many patches on the
    former costs more, by every measure; and for every way in the sequence against cross-attention, from how many
    pictures of `LARGE` patches on. Of ways whose tokens are not known there, nothing."""
    told = {name: shape for name, shape in shapes.items() if shape.visual_tokens(PATCHES[-1]) is not None}
    growing = [name for name, shape in told.items() if shape.grows and shape.in_sequence]
    others = [name for name, shape in told.items() if not (shape.grows and shape.in_sequence)]
    large = {name: shape for name, shape in shapes.items() if shape.visual_tokens(LARGE) is not None}
    inside, outside = ([name for name, shape in large.items() if shape.in_sequence == here] for here in (True, False))
    found = []
    for measure, costs in MEASURES.items():
        for dear, cheap in product(growing, others):
            first = _first(PATCHES[-1], partial(_dearer, costs, shapes[dear], shapes[cheap], text, images=images))
            found.append(Crossing(measure, dear, cheap, "patches", first))
        for dear, cheap in product(inside, outside):
            first = _first(MOST_IMAGES, partial(_dearer, costs, shapes[dear], shapes[cheap], text, patches=LARGE))
            found.append(Crossing(measure, dear, cheap, "pictures", first))
    return found


def _dearer(
    costs: Callable[[Shape, int, int, int], int | None],
    dear: Shape,
    cheap: Shape,
    text: int,
    number: int,
    patches: int | None = None,
    images: int | None = None,
) -> bool:
    """Whether the first costs more, as far as that is known; `number` is of what is not told."""
    size = (patches or number, images or number, text)
    here, there = costs(dear, *size), costs(cheap, *size)
    return here is not None and there is not None and here > there


def _first(most: int, exceeds: Callable[[int], bool]) -> int | None:
    """The number, from 1 on, from which on it always exceeds; None if it does not at the end."""
    if not exceeds(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if exceeds(middle) else (middle + 1, high)
    return low
