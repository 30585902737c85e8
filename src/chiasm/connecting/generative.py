"""`connect` for early and intermediate fusion: a vision encoder, a new connector, a language model that answers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiasm.data.chat import ENCODER_DECODER_TEMPLATE
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.tiles import TiledProcessor
from chiasm.fusion.base import FusionModel
from chiasm.fusion.build import build_fusion
from chiasm.fusion.start import start_of
from chiasm.generation import decode
from chiasm.language.adapter import load_language
from chiasm.language.generation_settings import change
from chiasm.presets import Preset
from chiasm.vision.encoder import load_vision
from chiasm.vision.image_processor import ChiasmImageProcessor, image_processor_for
from chiasm.vision.tiles import tile_processor
from chiasm.vision.towers import CONVOLUTIONAL
from chiasm.vlm import read_config

HABITS = ("forced_bos_token_id", "forced_eos_token_id", "no_repeat_ngram_size")
"""What a summariser's configuration (BART) adds to every answer, and the labels of a new pair do not have."""


def connect_generative(
    vision: str | PreTrainedModel,
    language: str | PreTrainedModel,
    words: PreTrainedTokenizerBase | None,
    chosen: Preset,
    connector: str | dict[str, Any] | None,
    fusion: str,
    *,
    image_processor: ChiasmImageProcessor | None,
    chat_template: str | None,
    features: dict[str, Any] | None,
    image_size: int | tuple[int, int] | None,
    resize_mode: str | None,
    patch_positions: str,
    regions: tuple[int, int] | None,
    tiles: Sequence[tuple[int, int]] | None,
    cross_attention: dict[str, Any] | None,
    attention: str,
    dtype: torch.dtype | str,
    seed: int,
) -> tuple[FusionModel, ChiasmProcessor | None]:
    """Model and processor; arguments are those of `chiasm.connect`, its names resolved."""
    if tiles is not None and resize_mode is not None:
        raise ValueError(
            f"resize_mode={resize_mode!r} is not for tiles: the whole picture is squashed and its tiles are padded"
        )
    start = start_of(chosen.connector if connector is None else connector)
    features = features or _preset_features(chosen, vision)
    encoder = load_vision(vision, features=features, image_size=image_size, dtype=dtype)
    language_model = load_language(language, dtype=dtype)
    if language_model.config.is_encoder_decoder:
        change(language_model.generation_config, **dict.fromkeys(HABITS))
    processor = None
    image_token_id = language_model.config.get_text_config().vocab_size
    if words is not None:
        pair = language_model.config.is_encoder_decoder
        words.chat_template = chat_template or words.chat_template or (ENCODER_DECODER_TEMPLATE if pair else None)
        pictures = image_processor or image_processor_for(vision, encoder, resize_mode=resize_mode)
        options = {"token_types": attention == "prefix", "regions": regions, "encoder_decoder": pair}
        if tiles is None:
            processor = start.processor(pictures, words, **options)
        else:
            processor = TiledProcessor(tile_processor(pictures, tiles), words, **options)
        image_token_id = processor.image_token_id
    new: dict[str, Any] = {"patch_positions": patch_positions, "seed": seed, "cross_attention": cross_attention}
    new |= {"attention": attention, "regions": regions, "tiles": tiles}
    new |= {"initialise": start.initialise if start.encoder else None}
    model = build_fusion(encoder, language_model, start.settings, image_token_id, fusion, **new)
    if processor is not None:
        processor.num_image_tokens = model.num_image_tokens
        if isinstance(processor, TiledProcessor):
            processor.token_grid = list(model.connector.token_grid or ())
        decode.stop_at_end_of_turn(model, processor)
    return model, processor


def _preset_features(preset: Preset, vision: Any) -> dict[str, Any] | None:
    """A preset's layers are those of a ViT; the grids of a convolutional encoder are another matter."""
    if preset.features is None:
        return None
    kind = read_config(vision)["model_type"] if isinstance(vision, str) else vision.config.model_type
    return None if kind in CONVOLUTIONAL else preset.features
