"""CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343) and fixed-resolution SigLIP 2 (arXiv 2502.14786) of transformers ↔
Chiasm's late fusion, exactly in both directions."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
)

from chiasm.data.captions import CaptionProcessor
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.late_config import LateFusionConfig
from chiasm.interop.parts import describe_features, has_processor
from chiasm.interop.weights import assemble, read_weights
from chiasm.language.adapter import load_tokenizer
from chiasm.vision.image_processor import ChiasmImageProcessor, image_processor_for
from chiasm.vision.pooling import ALL_TOKENS

CLIP = {
    "vision_model": "vision.model",
    "text_model": "language",
    "visual_projection": "connector.image_projection",
    "text_projection": "connector.text_projection",
    "logit_scale": "connector.logit_scale",
}
SIGLIP = {
    "vision_model": "vision.model",
    "text_model": "language",
    "logit_scale": "connector.logit_scale",
    "logit_bias": "connector.logit_bias",
}
SCALARS = ("logit_scale", "logit_bias")
"""Weights that SigLIP keeps as vectors of length 1."""


def load_clip(source: str, dtype: torch.dtype | str = "auto") -> tuple[LateFusionModel, CaptionProcessor | None]:
    """Model and processor of a CLIP folder or hub id; no processor where its files are missing."""
    config = AutoConfig.from_pretrained(source)
    connector = {"name": "linear", "space": config.projection_dim, "logit_scale": config.logit_scale_init_value}
    ours = _config(config, connector, config.vision_config.hidden_size, config.text_config.hidden_size)
    model = assemble(LateFusionModel, ours, read_weights(source), CLIP, dtype=dtype)
    return model, _processor(source, model, as_siglip=False)


def load_siglip(source: str, dtype: torch.dtype | str = "auto") -> tuple[LateFusionModel, CaptionProcessor | None]:
    """Model and processor of a SigLIP folder or hub id; no processor where its files are missing."""
    config = AutoConfig.from_pretrained(source)
    if not getattr(config.vision_config, "vision_use_head", True):
        raise ValueError(
            f"{source} is a SigLIP without the head that makes one vector of a picture (vision_use_head: false in its "
            "config.json), so transformers cannot score with it either; connect its towers anew with fusion='late', "
            "pooling={'vision': 'mean'}"
        )
    connector = {"name": "none", "logit_bias": 0.0}
    ours = _config(config, connector, config.vision_config.hidden_size, config.text_config.projection_size)
    scalars = {SIGLIP[name]: torch.Tensor.squeeze for name in SCALARS}
    model = assemble(LateFusionModel, ours, read_weights(source), SIGLIP, scalars, dtype=dtype)
    return model, _processor(source, model, as_siglip=True)


def _config(config: Any, connector: dict[str, Any], image_width: int, text_width: int) -> LateFusionConfig:
    return LateFusionConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict(),
        features=describe_features(config.vision_config, ALL_TOKENS).to_dict(),
        vision_pooling="own",
        text_pooling="own",
        image_width=image_width,
        text_width=text_width,
        connector=connector,
        dtype=config.dtype,
    )


def _processor(source: str, model: LateFusionModel, as_siglip: bool) -> CaptionProcessor | None:
    if not has_processor(source):
        return None
    text: Any = model.config.text_config
    longest = text.max_position_embeddings
    images, tokenizer = image_processor_for(source, model.vision), load_tokenizer(source)
    options: dict[str, Any] = {"text_length": longest, "fixed_length": as_siglip, "lowercase": as_siglip}
    return CaptionProcessor(images, tokenizer, frame="own", **options)


def export_late(model: LateFusionModel, processor: CaptionProcessor | None, folder: str | Path) -> PreTrainedModel:
    """Writes a late-fusion model with CLIP's or SigLIP's towers as transformers' own checkpoint.

    Raises:
        ValueError: it has other towers, another pooling, picture size or projection, or adapters that are not merged.
    """
    kind, config, table = _reference(model)
    back = {ours: name for name, ours in table.items()}
    renamed = {_back(name, back): tensor.cpu() for name, tensor in model.state_dict().items()}
    vectors = {name: _vector for name in SCALARS if kind is SiglipModel}
    pictures = None if processor is None else _preprocessing(processor.image_processor, config.model_type)
    theirs = assemble(kind, config, renamed, {}, vectors)
    theirs.save_pretrained(folder)
    if processor is not None:
        _tokenizer(processor).save_pretrained(folder)
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2) + "\n", encoding="utf-8")
    return theirs


def _reference(model: LateFusionModel) -> tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, str]]:
    """The class of transformers that computes what ours does, its configuration, and the table of names."""
    config: Any = model.config
    kinds = (config.vision_config.model_type, config.text_config.model_type)
    own = config.vision_pooling == config.text_pooling == "own"
    if config.adapters:
        raise ValueError("the model has LoRA adapters; merge them first (chiasm.fusion.adapters.merge_adapters)")
    if config.answer_head is not None:
        raise ValueError("the model has an answer head, which transformers' CLIP and SigLIP do not have")
    if model.vision.features.interpolate_positions:
        height, width = model.vision.image_size
        raise ValueError(
            f"the vision encoder's positions are stretched to {height}×{width} pixels, and transformers' CLIP and "
            "SigLIP have positions for squares alone; connect with a square image_size"
        )
    towers: Any = {"vision_config": config.vision_config.to_dict(), "text_config": config.text_config.to_dict()}
    connector = model.connector
    plain = config.connector["name"] == "linear" and not config.connector["bias"] and connector.logit_bias is None
    if kinds == ("clip_vision_model", "clip_text_model") and own and plain:
        space = {"projection_dim": config.connector["space"], "logit_scale_init_value": connector.logit_scale.item()}
        theirs: Any = CLIPConfig(**towers, **space)
        found: tuple[type[PreTrainedModel], dict[str, str]] = (CLIPModel, CLIP)
    elif (
        kinds == ("siglip_vision_model", "siglip_text_model")
        and own
        and config.connector["name"] == "none"
        and connector.logit_bias is not None
    ):
        theirs, found = SiglipConfig(**towers), (SiglipModel, SIGLIP)
    else:
        raise ValueError(
            f"transformers has no class for late fusion of {kinds[0]} and {kinds[1]} with projections "
            f"{config.connector['name']!r} (logit_bias {config.connector['logit_bias']}); it has CLIP (its own towers, "
            "linear projections without bias) and SigLIP (its own towers, connector none, a logit_bias)"
        )
    theirs.dtype = connector.dtype
    return found[0], theirs, found[1]


def _back(name: str, table: dict[str, str]) -> str:
    prefix = next(ours for ours in table if name == ours or name.startswith(f"{ours}."))
    return table[prefix] + name.removeprefix(prefix)


def _vector(scalar: Tensor) -> Tensor:
    return scalar.reshape(1)


def _tokenizer(processor: CaptionProcessor) -> PreTrainedTokenizerBase:
    """The tokenizer that gives by itself what the processor makes of a text."""
    words: Any = copy.deepcopy(processor.tokenizer)
    told: dict[str, Any] = {"model_max_length": processor.text_length, "padding_side": "right"}
    told |= {"model_input_names": ["input_ids"]} if processor.fixed_length else {}
    if words.pad_token is None:
        words.pad_token = words.convert_ids_to_tokens(0)
    for name, value in told.items():
        setattr(words, name, value)
        words.init_kwargs[name] = value  # which is what is saved
    if processor.lowercase and words("A").input_ids != words("a").input_ids:
        backend = words.backend_tokenizer
        given = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *given])
    return words


def _preprocessing(images: ChiasmImageProcessor, kind: str) -> dict[str, Any]:
    """What `preprocessor_config.json` says to transformers' own image processor.

    Raises:
        ValueError: it reaches its size in a way that transformers' has not.
    """
    height, width = images.size["height"], images.size["width"]
    if images.resize_mode == "pad" or (images.resize_mode == "crop" and height != width):
        raise ValueError(f"transformers' image processors do not {images.resize_mode} to {height}×{width}; use squash")
    plain: dict[str, Any] = {
        "image_processor_type": {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[kind],
        "processor_class": {"clip": "CLIPProcessor", "siglip": "SiglipProcessor"}[kind],
        "do_resize": True,
        "do_rescale": images.do_rescale,
        "rescale_factor": images.rescale_factor,
        "do_normalize": images.do_normalize,
        "do_convert_rgb": True,
        "resample": images.resample,
        "image_mean": images.image_mean,
        "image_std": images.image_std,
        "size": {"height": height, "width": width},
        "do_center_crop": False,
    }
    if images.resize_mode == "crop":
        crop = {"height": height, "width": width}
        plain |= {"size": {"shortest_edge": images.shortest(height)}, "do_center_crop": True, "crop_size": crop}
    return plain
