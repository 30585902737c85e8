"""`connect` for late fusion: a vision encoder and a text tower with new projections into one space."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiasm.data.captions import CaptionProcessor
from chiasm.dual_encoder import DualEncoder
from chiasm.fusion.late_build import build_late
from chiasm.language.text_tower import load_text
from chiasm.vision.encoder import load_vision
from chiasm.vision.image_processor import ChiasmImageProcessor, image_processor_for
from chiasm.vision.pooling import features_for, pooling_of
from chiasm.vision.towers import vision_type

TEXT_LENGTH = 64
"""Tokens of the longest text, where the tower's own limit is not lower."""

AS_SIGLIP = ("siglip_text_model",)
"""Text towers that were trained on lower-case texts, filled up to the longest, whose fill they read."""


def connect_late(
    vision: str | PreTrainedModel,
    language: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    connector: str | dict[str, Any],
    *,
    pooling: dict[str, str] | None = None,
    image_processor: ChiasmImageProcessor | None = None,
    features: dict[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize_mode: str | None = None,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
) -> DualEncoder:
    """A dual encoder of two towers; arguments are those of `chiasm.connect`."""
    pooling = dict(pooling or {})
    if unknown := sorted(set(pooling) - {"vision", "text"}):
        raise ValueError(f"pooling has an unknown key {unknown[0]!r}; write {{'vision': ..., 'text': ...}}")
    how = pooling_of(vision_type(vision), pooling.get("vision", "auto"))
    read = {**features_for(how), **(features or {})}
    encoder = load_vision(vision, features=read, image_size=image_size, dtype=dtype)
    tower, text_pooling = load_text(language, pooling.get("text", "auto"), dtype)
    model = build_late(encoder, tower, connector, how, text_pooling, seed)
    if tokenizer is None:
        return DualEncoder(model, None)
    pictures = image_processor or image_processor_for(vision, encoder, resize_mode=resize_mode)
    return DualEncoder(model, text_processor(pictures, tokenizer, tower, text_pooling))


def text_processor(pictures: Any, tokenizer: PreTrainedTokenizerBase, tower: PreTrainedModel, pooling: str) -> Any:
    """The processor for a text tower: texts of a causal one end with a token of their own, which is what is read."""
    as_siglip = tower.config.model_type in AS_SIGLIP
    longest = getattr(tower.config, "max_position_embeddings", TEXT_LENGTH)
    length = longest if pooling == "own" else min(TEXT_LENGTH, longest)
    options: dict[str, Any] = {"text_length": length, "fixed_length": as_siglip, "lowercase": as_siglip}
    return CaptionProcessor(pictures, tokenizer, frame="both" if pooling == "last" else "own", **options)
