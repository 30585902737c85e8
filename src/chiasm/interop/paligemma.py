"""PaliGemma checkpoints of transformers → early fusion with a linear projector and a prefix mask (arXiv 2407.07726)."""

import torch
from transformers import PaliGemmaConfig

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop.parts import (
    describe_features,
    load_headed,
    load_processor,
    table_of,
    text_settings,
)
from chiasm.interop.weights import Table

PARTS = {
    "vision_tower": "vision.model",
    "vision_tower.vision_model": "vision.model",
    "multi_modal_projector.linear": "connector.proj",
}
"""Names up to v4.51; later ones have `model.` in front, and the language model without its own prefix and head."""

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}{% endfor %}{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)
"""Pictures, BOS, prompt, line break, answer: what PaliGemma was trained on."""


def load_paligemma(source: str, dtype: torch.dtype | str = "auto") -> tuple[EarlyFusionModel, ChiasmProcessor | None]:
    """Model and processor of a PaliGemma folder or hub id; no processor where its files are missing.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    model = load_headed(source, chiasm_config, table, dtype)
    return model, load_processor(source, model, TEMPLATE, token_types=True, text_is_message=True)


def chiasm_config(config: PaliGemmaConfig) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words."""
    if config.projection_dim != config.text_config.hidden_size:
        raise ValueError(
            f"projection_dim is {config.projection_dim}, but the language model's hidden_size is "
            f"{config.text_config.hidden_size}; make them equal in config.json"
        )
    return ChiasmConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=text_settings(config),
        connector={"name": "linear", "bias": True},
        features=describe_features(config.vision_config, {"layers": ["last"], "prefix": "keep"}).to_dict(),
        attention="prefix",
        image_token_id=config.image_token_id,
        dtype=config.dtype,
    )


def table(config: PaliGemmaConfig) -> Table:
    """PaliGemma's names → ours, for files of any version."""
    return table_of(PARTS, config.text_config)
