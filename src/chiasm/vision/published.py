"""How published encoders want their pictures: read from preprocessor_config.json, or from a table by model type."""

import os
from typing import Any

from PIL import Image
from transformers import ImageProcessingMixin, PreTrainedModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from chiasm.sources.files import read_json

BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)


def _fields(
    mean: list[float], std: list[float], resample: int, resize_mode: str, crop_fraction: float = 1.0
) -> dict[str, Any]:
    return {
        "image_mean": mean,
        "image_std": std,
        "resample": resample,
        "resize_mode": resize_mode,
        "crop_fraction": crop_fraction,
    }


_CLIP = _fields(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, BICUBIC, "crop")
_BLIP = _fields(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, BICUBIC, "squash")
_IMAGENET_CROP = _fields(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, BICUBIC, "crop", 224 / 256)
_IMAGENET_SQUASH = _fields(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, BICUBIC, "squash")
_DINOV3 = _fields(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, BILINEAR, "squash")
_HALF_SQUASH = _fields(IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, BILINEAR, "squash")
_MOBILENET = _fields(IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, BILINEAR, "crop", 224 / 256)

PUBLISHED: dict[str, dict[str, Any]] = {
    "aimv2_vision_model": _CLIP,
    "beit": _HALF_SQUASH,
    "blip_2_vision_model": _BLIP,
    "blip_vision_model": _BLIP,
    "chinese_clip_vision_model": _BLIP,
    "clip_vision_model": _CLIP,
    "convnext": _IMAGENET_CROP,
    "convnextv2": _IMAGENET_CROP,
    "data2vec-vision": _HALF_SQUASH,
    "deit": _IMAGENET_CROP,
    "dinov2": _IMAGENET_CROP,
    "dinov2_with_registers": _IMAGENET_CROP,
    "dinov3_convnext": _DINOV3,
    "dinov3_vit": _DINOV3,
    "efficientnet_lite": _fields([127 / 255] * 3, [128 / 255] * 3, BICUBIC, "crop", 224 / 256),
    "idefics2_vision": _HALF_SQUASH,
    "idefics3_vision": _HALF_SQUASH,
    "instructblip_vision_model": _BLIP,
    "metaclip_2_vision_model": _CLIP,
    "mlcd_vision_model": _CLIP,
    "mobilenet_v1": _MOBILENET,
    "mobilenet_v2": _MOBILENET,
    "regnet": _IMAGENET_CROP,
    "resnet": _IMAGENET_CROP,
    "siglip2_vision_model": _HALF_SQUASH,
    "siglip_vision_model": _HALF_SQUASH | {"resample": BICUBIC},
    "smolvlm_vision": _HALF_SQUASH,
    "swin": _IMAGENET_SQUASH,
    "swinv2": _IMAGENET_SQUASH,
    "vit": _HALF_SQUASH,
}
"""Model type → fields of `ChiasmImageProcessor` in the model's published checkpoints."""

COPIED = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")
OWN = (*COPIED, "resize_mode", "crop_fraction", "reducing_gap")
FOREIGN = ("do_flip_channel_order", "rescale_offset", "include_top")
"""Switches of transformers' image processors that change pixel values in ways that Chiasm's has not."""

SQUASH_FROM = 384
"""ConvNeXt's image processor crops smaller pictures and squashes from this size on."""


def read_published(source: str | os.PathLike | PreTrainedModel | None) -> dict[str, Any]:
    """Fields of `ChiasmImageProcessor` that the files beside an encoder's weights state; none if there are no files.

    Raises:
        ValueError: they ask for processing that Chiasm does not have, or one is damaged.
    """
    name = source.name_or_path if isinstance(source, PreTrainedModel) else source
    if not name:
        return {}
    try:
        # A loaded model only says where it came from: nothing is fetched for it.
        config, _ = ImageProcessingMixin.get_image_processor_dict(
            str(name), local_files_only=isinstance(source, PreTrainedModel)
        )
    except OSError:
        if os.path.isdir(name):
            read_json(name, "processor_config.json")
            read_json(name, "preprocessor_config.json")
        return {}
    if config.get("image_processor_type") == "ChiasmImageProcessor":
        return {key: config[key] for key in OWN if key in config}
    return fields_of(config, name)


def fields_of(config: dict[str, Any], name: str | os.PathLike) -> dict[str, Any]:
    """Fields of `ChiasmImageProcessor` that the settings of an image processor of transformers stand for.

    Raises:
        ValueError: they ask for processing that Chiasm does not have.
    """
    foreign = [switch for switch in FOREIGN if config.get(switch)]
    foreign += ["do_resize: false"] if config.get("do_resize") is False else []
    if foreign:
        raise ValueError(
            f"{name} wants {foreign[0]} in its image processing, which Chiasm does not have; "
            "make a ChiasmImageProcessor yourself and pass it as image_processor="
        )
    return {key: config[key] for key in COPIED if config.get(key) is not None} | _geometry(config, name)


def _geometry(config: dict[str, Any], name: str | os.PathLike) -> dict[str, Any]:
    """Which way transformers' image processor of this configuration reaches its size."""
    if config.get("do_pad") and config.get("image_processor_type") in (
        "LlavaImageProcessor",
        "LlavaImageProcessorFast",
    ):
        return {"resize_mode": "pad"}
    size = config.get("size")
    shortest = _shortest(size)
    if config.get("do_center_crop"):
        kept = _shortest(config.get("crop_size"))
        if kept and isinstance(size, dict) and kept == size.get("height") == size.get("width"):
            return {"resize_mode": "squash"}
        fraction = kept / shortest if kept and shortest else 1.0
        if fraction > 1 or (isinstance(size, dict) and size.get("height")):
            raise ValueError(
                f"{name} wants crop_size {config['crop_size']} of pictures of size {size}, which Chiasm does not have: "
                "it cuts no more than the shorter side out; make a ChiasmImageProcessor yourself and pass it as "
                "image_processor="
            )
        return {"resize_mode": "crop", "crop_fraction": fraction}
    if config.get("crop_pct") and shortest and shortest < SQUASH_FROM:
        return {"resize_mode": "crop", "crop_fraction": config["crop_pct"]}
    return {"resize_mode": "squash"}


def _shortest(size: Any) -> int | None:
    """Pixels of the shorter side that a size of any of transformers' spellings stands for."""
    if isinstance(size, dict):
        sides = [size[key] for key in ("shortest_edge", "height", "width") if size.get(key)]
        return min(sides) if sides else None
    return min(size) if isinstance(size, list | tuple) else size
