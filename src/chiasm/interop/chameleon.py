"""Chameleon checkpoints of transformers → the unified transformer with codes, with equal logits (arXiv 2405.09818)."""

from typing import Any

import torch
from transformers import AutoConfig, ChameleonConfig
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from chiasm.data.processor import ChiasmProcessor
from chiasm.data.unified import UnifiedProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.unified import UnifiedModel
from chiasm.fusion.unified_decoder import UnifiedDecoderConfig
from chiasm.interop.parts import finish, has_processor, unwrapped
from chiasm.interop.weights import Table, assemble, read_weights
from chiasm.language.adapter import load_tokenizer
from chiasm.vision.image_processor import ChiasmImageProcessor
from chiasm.vision.published import fields_of

TABLE: Table = {"model": "language.model", "model.vqmodel": "vision.model", "lm_head": "language.lm_head"}

SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("mlp_bias", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    "attention_dropout",
)
CODE, LETTERS = "IMGIMG", "ABCDEFGHIJ"
"""A code's word: `IMGIMG`, its decimal digits as letters, and a last letter."""
BEGIN, END = "<racm3:break>", "<eoss>"

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ sep_token }}{% endfor %}"
"""Turns, each with the separator behind it."""


def load_chameleon(source: str, dtype: torch.dtype | str = "auto") -> tuple[UnifiedModel, ChiasmProcessor | None]:
    """Model and processor of a Chameleon folder or hub id; no processor where its files are missing.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    config = AutoConfig.from_pretrained(source)
    model = assemble(UnifiedModel, chiasm_config(config), read_weights(source), TABLE, dtype=dtype)
    finish(model, source)
    return model, _processor(source, model) if has_processor(source) else None


def chiasm_config(config: ChameleonConfig) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words."""
    codes = code_tokens(config.vocabulary_map or {}, config.vq_config.num_embeddings)
    decoder = UnifiedDecoderConfig(
        **{name: getattr(config, name) for name in SHARED},
        query_bias=config.attention_bias,
        output_bias=config.attention_bias,
        qk_norm="layer",
        norm_order="post" if config.swin_norm else "pre",
    )
    return ChiasmConfig(
        vision_config=config.vq_config.to_dict(),
        text_config=decoder.to_dict(),
        fusion="unified",
        image_token_id=config.image_token_id,
        direct_head=True,
        unified={"code_ids": codes, "hide_codes": True, "z_loss": 1e-5},
        dtype=config.dtype,
    )


def code_tokens(words: dict[str, int], count: int) -> list[int]:
    """The token of every code, by the words of the vocabulary; behind them those of codes that nothing is read as,
    which the reference hides too.

    Raises:
        ValueError: a code has no word.
    """
    digits = {letter: str(digit) for digit, letter in enumerate(LETTERS)}
    found: dict[int, int] = {}
    for word, token in words.items():
        if word.startswith(CODE):
            found[int("".join(digits.get(letter, letter) for letter in word[len(CODE) : -1]))] = token
    missing = next((code for code in range(count) if code not in found), None)
    if missing is not None:
        raise ValueError(
            f"vocabulary_map in config.json has no word for code {missing} of {count}; it needs the words {CODE}..."
        )
    return [found[code] for code in sorted(found)]


def _processor(source: str, model: UnifiedModel) -> UnifiedProcessor:
    tokenizer: Any = load_tokenizer(source)
    settings, _ = ChiasmProcessor.get_processor_dict(source)
    own = settings.get("chat_template") or tokenizer.chat_template
    tokenizer.chat_template = unwrapped(own) or TEMPLATE
    fields = fields_of(ChameleonImageProcessorPil.from_pretrained(source).to_dict(), source)
    images = ChiasmImageProcessor(model.vision.image_size, **fields)
    return UnifiedProcessor(
        images,
        tokenizer,
        model.num_image_tokens,
        model.vision.grid,
        image_boundary=[BEGIN, END],
        add_special_tokens=True,
        text_is_message=unwrapped(own) != own or own is None,  # the reference ends every text as a turn
    )
