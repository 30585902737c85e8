"""Qwen2-VL checkpoints of transformers → packed early fusion with M-RoPE, with equal logits (arXiv 2409.12191)."""

from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, Qwen2VLConfig

from chiasm.data.chat import IMAGE_TOKEN
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.unified import UnifiedProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.packed import PackedFusionModel
from chiasm.fusion.unified_start import decoder_config
from chiasm.interop.parts import finish, has_processor, unwrapped
from chiasm.interop.weights import Table, assemble, read_weights
from chiasm.language.adapter import load_tokenizer

VISION = {
    "visual": "vision.model",
    "visual.merger.ln_q": "connector.norm",
    "visual.merger.mlp.0": "connector.merge",
    "visual.merger.mlp.2": "connector.out",
}
"""Names up to v4.51, where the decoder is `model`; later ones have `model.` in front of both."""

TABLE: Table = {
    **VISION,
    **{f"model.{theirs}": ours for theirs, ours in VISION.items()},
    "model": "language.model",
    "model.language_model": "language.model",
    "lm_head": "language.lm_head",
}
PATCH_TOKEN, BEGIN, END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"


def load_qwen2_vl(source: str, dtype: torch.dtype | str = "auto") -> tuple[PackedFusionModel, ChiasmProcessor | None]:
    """Model and processor of a Qwen2-VL folder or hub id; no processor where its files are missing.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    config = AutoConfig.from_pretrained(source)
    model = assemble(PackedFusionModel, chiasm_config(config), read_weights(source), TABLE, dtype=dtype)
    finish(model, source)
    return model, _processor(source, model) if has_processor(source) else None


def chiasm_config(config: Qwen2VLConfig) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words."""
    text: Any = config.text_config
    sections = text.rope_parameters.get("mrope_section", [16, 24, 24])
    decoder = decoder_config(text, positions="mrope", rope_sections=list(sections))
    decoder.tie_word_embeddings = config.tie_word_embeddings
    return ChiasmConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=decoder.to_dict(),
        connector={"name": "patch_merger", "factor": config.vision_config.spatial_merge_size},
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        direct_head=True,
        dtype=config.dtype,
    )


def _processor(source: str, model: PackedFusionModel) -> UnifiedProcessor:
    """The reference's own image processor, and its chat template with `<image>` where it frames a picture itself."""
    tokenizer: Any = load_tokenizer(source)
    settings, _ = ChiasmProcessor.get_processor_dict(source)
    template = unwrapped(settings.get("chat_template") or tokenizer.chat_template)
    tokenizer.chat_template = template and template.replace(f"{BEGIN}{PATCH_TOKEN}{END}", IMAGE_TOKEN)
    images = AutoImageProcessor.from_pretrained(source)
    options: dict[str, Any] = {"image_token": PATCH_TOKEN, "image_boundary": [BEGIN, END]}
    return UnifiedProcessor(images, tokenizer, merge=model.vision.merge, **options)
