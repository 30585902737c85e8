"""Tiny random models and a tiny tokenizer: every architecture the tests need, with no weights and no network."""

from typing import Any

import torch
from PIL import Image
from transformers import (
    BartConfig,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
)

from chiasm.language.adapter import build_language
from chiasm.language.byte_tokenizer import CHATML, plain_byte_tokenizer


def tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and four special tokens, 260 in all."""
    fast = plain_byte_tokenizer()
    fast.add_tokens(["<|im_start|>"], special_tokens=True)
    fast.chat_template = chat_template
    return fast


def _language_config(family: str) -> PreTrainedConfig:
    common = {"vocab_size": 261, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    decoder = common | {
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    pair = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in (("layers", 2), ("ffn_dim", 52), ("attention_heads", 6))
    }
    configs = {
        "llama": lambda: LlamaConfig(**decoder, tie_word_embeddings=False),
        "qwen2": lambda: Qwen2Config(**decoder, tie_word_embeddings=True),
        "gemma3": lambda: Gemma3TextConfig(**decoder, head_dim=10, sliding_window=8),
        "gpt2": lambda: GPT2Config(**common, n_embd=36, n_layer=3, n_head=6, n_positions=1024),
        "t5": lambda: T5Config(
            **common, d_model=36, d_ff=52, d_kv=7, num_layers=2, num_heads=5, decoder_start_token_id=258
        ),
        "bart": lambda: BartConfig(**common, **pair, d_model=36, decoder_start_token_id=257),
    }
    return configs[family]()


LANGUAGE_FAMILIES = ("llama", "qwen2", "gemma3", "gpt2")
ENCODER_DECODERS = ("t5", "bart")


def language(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A language model with two or three layers, width 36 and a vocabulary of 261."""
    torch.manual_seed(seed)
    return build_language(_language_config(family)).eval()


def bert(seed: int = 2) -> PreTrainedModel:
    """A text encoder with two layers, width 24 and a vocabulary of 261."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=261, **sizes)).eval()


def _vision_model(family: str) -> PreTrainedModel:
    vit = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 30,
        "patch_size": 10,
    }
    models_by_family = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**vit)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**vit)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**vit)),
        "convnext": lambda: ConvNextModel(
            ConvNextConfig(image_size=64, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])
        ),
    }
    return models_by_family[family]()


VISION_FAMILIES = ("clip", "siglip", "dinov2", "convnext")


def vision(family: str = "clip", seed: int = 1) -> PreTrainedModel:
    """A vision encoder on 30 × 30 pictures (ConvNeXt: 64 × 64) with patch size 10 and width 24."""
    torch.manual_seed(seed)
    return _vision_model(family).eval()


def picture(seed: int = 0) -> Image.Image:
    """A picture of random pixels, 30 wide and 40 high."""
    pixels = torch.randint(0, 256, (40, 30, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def ask(prompt: str, images: int = 1) -> list[dict[str, Any]]:
    """A conversation of one question about so many pictures."""
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": prompt}]}]


CONNECTOR_OPTIONS: dict[str, dict[str, Any]] = {
    "c_abstractor": {"width": 14, "depth": 2},
    "token_packer": {"heads": 3, "head_dim": 5},
    "perceiver_resampler": {"num_latents": 5, "depth": 2, "heads": 3, "head_dim": 7},
    "qformer": {"num_queries": 5, "width": 24, "depth": 3, "heads": 3},
    "idefics2_resampler": {"num_latents": 5, "depth": 2, "heads": 6, "key_value_heads": 2, "head_dim": 7},
}
"""Options that make connectors small whose defaults are heavy; the others are tested as they are."""


def connector(name: str, **options: Any) -> dict[str, Any]:
    """Settings of a small connector of this kind."""
    return {"name": name, **CONNECTOR_OPTIONS.get(name, {}), **options}
