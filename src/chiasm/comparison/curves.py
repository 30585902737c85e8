"""Cost as patches, pictures and text grow, in closed form: where one way of connecting overtakes another.

A model is reduced to a few numbers (`Shape`), so that curves need no model and reach sizes that were never built.
"""

from collections.abc import Callable
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
        tokens: visual tokens of a picture of `patches` patches; they grow with the patches where `grows`.
        in_sequence: whether they stand in the sequence, or only cross-attention looks at them.
        matrices: elements that every token of the sequence is multiplied with.
        pair: FLOPs of one token attending to one other in all layers.
        cross_token, cross_look: FLOPs of a token in the gated blocks, and of its look at one visual token.
        cross_keys, cross_kept: FLOPs and bytes of a visual token's keys and values in them.
    """

    tokens: int
    patches: int
    grows: bool
    in_sequence: bool
    matrices: int
    head: int
    pair: int
    kv_bytes: int
    cross_token: int = 0
    cross_look: int = 0
    cross_keys: int = 0
    cross_kept: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def visual_tokens(self, patches: int) -> int:
        return max(1, round(self.tokens * patches / self.patches)) if self.grows else self.tokens


def shape_of(model: FusionModel) -> Shape:
    """The shape of a decoder-only model."""
    one, two = (language_flops(model, new=1, context=context, logits=0) for context in (1, 2))
    pair = two - one
    head = 2 * model.language.get_output_embeddings().weight.numel()
    common: dict[str, Any] = {"matrices": one - pair, "head": head, "pair": pair, "kv_bytes": kv_bytes_per_token(model)}
    if isinstance(model, PositionedModel):
        rows, columns = model.vision.grid
        return Shape(rows * columns, rows * columns, True, True, **common)
    connector: Connector = model.connector
    settings: dict[str, Any] = model.config.connector
    shape = Shape(connector.num_tokens, model.vision.num_patches, _grows(connector, settings), True, **common)
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


def _grows(connector: Connector, settings: dict[str, Any]) -> bool:
    """Whether the same settings give more tokens on a grid twice as fine; a connector that refuses it is fixed."""
    widths, (rows, columns) = (connector.vision_width, connector.language_width), connector.grid
    with torch.random.fork_rng():
        try:
            finer = build_connector(settings, *widths, (2 * rows, 2 * columns), connector.num_prefix)
        except ValueError:
            return False
    return finer.num_tokens > connector.num_tokens


def cache_bytes(shape: Shape, patches: int, images: int = 1, text: int = TEXT) -> int:
    """Bytes that a prompt keeps for the answer."""
    seen = images * shape.visual_tokens(patches)
    places = text + (seen if shape.in_sequence else images)
    return shape.kv_bytes * places + (0 if shape.in_sequence else shape.cross_kept * seen)


def prefill_flops(shape: Shape, patches: int, images: int = 1, text: int = TEXT) -> int:
    """FLOPs from visual tokens and words to the first token of the answer."""
    seen = images * shape.visual_tokens(patches)
    places = text + (seen if shape.in_sequence else images)
    reading = places * (shape.matrices + shape.pair * places) + shape.head
    if shape.in_sequence:
        return reading
    return reading + seen * shape.cross_keys + places * (shape.cross_token + seen * shape.cross_look)


def decode_flops(shape: Shape, patches: int, images: int = 1, text: int = TEXT) -> int:
    """FLOPs of one more token of the answer."""
    seen = images * shape.visual_tokens(patches)
    places = text + (seen if shape.in_sequence else images) + 1
    beside = 0 if shape.in_sequence else shape.cross_token + seen * shape.cross_look
    return shape.matrices + shape.head + shape.pair * places + beside


MEASURES: dict[str, Callable[[Shape, int, int, int], int]] = {
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


def crossings(shapes: dict[str, Shape], images: int = 1, text: int = TEXT) -> list[Crossing]:
    """For every way whose tokens grow in the sequence and every other that does not: from how many patches on the
    former costs more, by every measure; and for every way in the sequence against cross-attention, from how many
    pictures of `LARGE` patches on."""
    growing = [name for name, shape in shapes.items() if shape.grows and shape.in_sequence]
    others = [name for name, shape in shapes.items() if not (shape.grows and shape.in_sequence)]
    inside, outside = ([name for name, shape in shapes.items() if shape.in_sequence == here] for here in (True, False))
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
    costs: Callable[[Shape, int, int, int], int],
    dear: Shape,
    cheap: Shape,
    text: int,
    number: int,
    patches: int | None = None,
    images: int | None = None,
) -> bool:
    """Whether the first costs more; `number` is of what is not told."""
    size = (patches or number, images or number, text)
    return costs(dear, *size) > costs(cheap, *size)


def _first(most: int, exceeds: Callable[[int], bool]) -> int | None:
    """The number, from 1 on, from which on it always exceeds; None if it does not at the end."""
    if not exceeds(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if exceeds(middle) else (middle + 1, high)
    return low
