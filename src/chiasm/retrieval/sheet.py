"""A contact sheet of what was found: pictures, their places in the order, and their scores."""

from collections.abc import Sequence

from PIL import Image, ImageOps

from chiasm.generation.heatmap import SIDE, grid
from chiasm.retrieval.records import Hit

EMPTY = "#d9d9d9"


def contact_sheet(hits: Sequence[Hit]) -> Image.Image:
    """One picture of all hits; what is not where it was is a grey square.

    Raises:
        ValueError: nothing was found.
    """
    if not hits:
        raise ValueError("nothing was found, so there is nothing to show; leave out --sheet or --where")
    return grid([(_square(hit), f"{place}. {hit.score:.3f}  {hit.id}") for place, hit in enumerate(hits, 1)])


def _square(hit: Hit) -> Image.Image:
    try:
        return ImageOps.pad(hit.image().load(), (SIDE, SIDE), color="white")
    except ValueError:
        return Image.new("RGB", (SIDE, SIDE), EMPTY)
