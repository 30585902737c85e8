"""Chiasm's image processor → the one of transformers that does the same."""

from typing import Any

from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from chiasm.vision.image_processor import KEPT, ChiasmImageProcessor


def published_images(images: Any) -> BaseImageProcessor:
    """An image processor that a folder without Chiasm can hold; one of transformers' own stays as it is.

    Raises:
        ValueError: a crop or a padded picture that is no square.
    """
    if not isinstance(images, ChiasmImageProcessor):
        return images
    common: dict[str, Any] = {name: getattr(images, name) for name in KEPT} | {"do_convert_rgb": True}
    size = dict(images.size)
    if images.resize_mode == "squash":
        return SiglipImageProcessorPil(size=size, **common)
    side = size["height"]
    if side != size["width"]:
        raise ValueError(
            f"resize_mode {images.resize_mode!r} of pictures that are {side}×{size['width']} has no counterpart in "
            "transformers, which crops and pads to squares; connect with resize_mode='squash'"
        )
    if images.resize_mode == "pad":
        return LlavaImageProcessorPil(size=size, crop_size=size, do_pad=True, do_center_crop=False, **common)
    return CLIPImageProcessorPil(size={"shortest_edge": images.shortest(side)}, crop_size=size, **common)
