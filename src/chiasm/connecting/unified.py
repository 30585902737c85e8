"""`connect` for unified fusion: a language model, or only its sizes, becomes one transformer for words and pictures."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiasm.data.unified import UnifiedProcessor
from chiasm.fusion.unified import UnifiedModel
from chiasm.fusion.unified_build import build_unified
from chiasm.generation.decode import stop_at_end_of_turn
from chiasm.language.adapter import load_language, require_causal
from chiasm.language.byte_tokenizer import byte_tokenizer


def connect_unified(
    language: str | PreTrainedModel | dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    choices: dict[str, Any],
    chat_template: str | None = None,
    *,
    attention: str = "causal",
    seed: int = 0,
    dtype: torch.dtype | str = "auto",
) -> tuple[UnifiedModel, UnifiedProcessor | None]:
    """Model and processor; a decoder that starts from nothing reads bytes where no tokenizer is given.

    Args:
        choices: `image_input`, `positions` and `unified` of `chiasm.connect`, None where nothing was said.
    """
    if isinstance(language, dict):
        tokenizer = tokenizer or byte_tokenizer()
    else:
        language = load_language(language, dtype=dtype)
        require_causal(language, "fusion 'unified'")
    if tokenizer is not None:
        tokenizer.chat_template = chat_template or tokenizer.chat_template
    model, processor = build_unified(
        language,
        tokenizer,
        choices["image_input"] or "patches",
        choices["positions"] or "raster",
        attention,
        choices["unified"],
        seed,
        None if isinstance(dtype, str) else dtype,
    )
    if processor is not None:
        stop_at_end_of_turn(model, processor)
    return model, processor
