"""Fuyu checkpoints of transformers → the unified transformer with patches of raw pixels, with equal logits (2023)."""

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, FuyuConfig
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from chiasm.data.processor import ChiasmProcessor
from chiasm.data.unified import UnifiedProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.unified import UnifiedModel
from chiasm.interop.parts import finish, has_processor, table_of, text_settings
from chiasm.interop.weights import Table, assemble, read_weights
from chiasm.language.adapter import load_tokenizer
from chiasm.vision.patches import PatchConfig, PatchImageProcessor

PARTS = {"vision_embed_tokens": "vision.projection"}
"""The name up to v4.51; later ones have `model.` in front, and the language model without its own prefix and head."""

PATCH_TOKEN, ROW_TOKEN = "|SPEAKER|", "|NEWLINE|"
STEPS = ("do_resize", "do_pad", "do_rescale", "do_normalize")

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}{% endfor %}{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ eos_token if message['role'] == 'assistant' else '\x04' }}{% endfor %}"
)
"""Pictures, BOS, prompt, the byte that opens an answer, answer."""


def load_fuyu(source: str, dtype: torch.dtype | str = "auto") -> tuple[UnifiedModel, ChiasmProcessor | None]:
    """Model and processor of a Fuyu folder or hub id; no processor where its files are missing.

    Raises:
        ValueError: a weight is of a kind that Chiasm does not have; the message names it.
    """
    config = AutoConfig.from_pretrained(source)
    model = assemble(UnifiedModel, chiasm_config(config), read_weights(source), table(config), dtype=dtype)
    finish(model, source)
    return model, _processor(source, model) if has_processor(source) else None


def chiasm_config(config: FuyuConfig) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words; its decoder stays transformers' Persimmon."""
    if config.num_channels != 3:
        raise ValueError(f"num_channels in config.json is {config.num_channels}, expected 3: patches are of RGB pixels")
    size = config.image_size
    patches = PatchConfig(
        patch_size=config.patch_size, hidden_size=config.text_config.hidden_size, image_size=[size] * 2
    )
    return ChiasmConfig(
        vision_config=patches.to_dict(),
        text_config=text_settings(config),
        fusion="unified",
        image_token_id=config.image_token_id,
        direct_head=True,
        unified={},
        dtype=config.dtype,
    )


def table(config: FuyuConfig) -> Table:
    """Fuyu's names → ours, for files of any version."""
    return table_of(PARTS, config.text_config)


def _processor(source: str, model: UnifiedModel) -> UnifiedProcessor:
    tokenizer: Any = load_tokenizer(source)
    settings, _ = ChiasmProcessor.get_processor_dict(source)
    tokenizer.chat_template = settings.get("chat_template") or tokenizer.chat_template or TEMPLATE
    images = image_processor_of(source, model.vision.config.patch_size)
    return UnifiedProcessor(images, tokenizer, row_token=ROW_TOKEN, image_token=PATCH_TOKEN, text_is_message=True)


def image_processor_of(source: str, patch_size: int) -> PatchImageProcessor:
    """The reference's, whose pictures lie on almost black: it pads pixels before they become values from 0 to 1."""
    theirs = FuyuImageProcessorPil.from_pretrained(source)
    if off := [step for step in STEPS if not getattr(theirs, step)]:
        raise ValueError(f"{off[0]} in preprocessor_config.json is off, which is not known here")
    if theirs.padding_mode != "constant" or not 0 <= theirs.padding_value <= 255:
        padding = f"{theirs.padding_mode} {theirs.padding_value}"
        raise ValueError(
            f"padding {padding} in preprocessor_config.json is not known here, expected constant, 0 to 255"
        )
    largest = 255 * theirs.rescale_factor  # what white is before it is normalised; here it is 1
    mean, std = ((np.broadcast_to(v, 3) / largest).tolist() for v in (theirs.image_mean, theirs.image_std))
    size = {"height": theirs.size["height"], "width": theirs.size["width"]}
    shown = {"image_mean": mean, "image_std": std, "padding": theirs.padding_value, "resample": theirs.resample}
    return PatchImageProcessor(patch_size, max_patches=None, max_size=size, **shown)
