"""A unified transformer and its processor from a language model, or from nothing but sizes."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiasm.data.chat import IMAGE_TOKEN
from chiasm.data.unified import BEGIN_TOKEN, END_TOKEN, MARKERS, ROW_TOKEN, UnifiedProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.unified import UnifiedModel
from chiasm.fusion.unified_decoder import UnifiedDecoderForCausalLM
from chiasm.fusion.unified_settings import UnifiedSettings
from chiasm.fusion.unified_start import OPTIONS, decoder_from, new_decoder
from chiasm.language.adapter import embedding_scale
from chiasm.vision.image_processor import ChiasmImageProcessor
from chiasm.vision.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from chiasm.vision.patches import PatchConfig, PatchEmbedding, PatchImageProcessor

INPUTS: dict[str, tuple[str, ...]] = {
    "patches": ("patch_size", "max_patches", "image_size"),
    "vq": ("image_size", "factor", "levels", "width", "depth", "resize_mode"),
}
"""Image input → its options."""


def input_settings(wanted: str | dict[str, Any]) -> dict[str, Any]:
    """An image input's name and options, checked.

    Raises:
        ValueError: an unknown name or option; the message lists the known ones.
    """
    given: dict[str, Any] = {"name": wanted} if isinstance(wanted, str) else dict(wanted)
    name = given.get("name")
    if name not in INPUTS:
        raise ValueError(f"image_input {name!r} is unknown; choose one of {', '.join(INPUTS)}")
    if unknown := sorted(set(given) - {"name", *INPUTS[name]}):
        raise ValueError(f"image_input {name}: unknown option {unknown[0]!r}; known ones are {', '.join(INPUTS[name])}")
    if isinstance(given.get("image_size"), int):
        given["image_size"] = [given["image_size"]] * 2
    return given


def build_unified(
    language: PreTrainedModel | dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    image_input: str | dict[str, Any] = "patches",
    positions: str = "raster",
    attention: str = "causal",
    options: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[UnifiedModel, UnifiedProcessor | None]:
    """A model whose new weights are drawn from `seed`; on text it computes what the language model does.

    Args:
        language: a Llama-shaped language model, or fields of `UnifiedDecoderConfig` to start from nothing; `vocab_size`
            is among them only where there is no tokenizer.
        tokenizer: its words; without one there is no processor.
        image_input: `patches` or `vq`, or a dictionary with its `name` and options.
        positions: a word of `chiasm.positions.sequence.POSITIONS`.
        options: `qk_norm`, `norm_order` and `rope_sections` of the decoder, `z_loss`, and `weights`: `pretrained`, or
            `random` for a language model's sizes and words alone.

    Raises:
        ValueError: a word, an option or a language model that is not known here.
    """
    wanted = input_settings(image_input)
    given = dict(options or {})
    known = {*OPTIONS, "z_loss", "weights"} - {"positions"}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"unified option {unknown[0]!r} is unknown; known ones are {', '.join(sorted(known))}")
    z_loss, weights = given.pop("z_loss", 1e-5), given.pop("weights", None)
    words = len(tokenizer) if tokenizer is not None else 0
    if isinstance(language, dict) and tokenizer is None:
        language = dict(language)
        words = language.pop("vocab_size", words)
    if isinstance(language, PreTrainedModel):
        words = max(words, language.config.get_text_config().vocab_size) if tokenizer is None else words
    vq = wanted["name"] == "vq"
    tokens = _token_ids(tokenizer, words, [IMAGE_TOKEN, *(mark for mark in MARKERS if not (vq and mark == ROW_TOKEN))])
    table = language.config.get_text_config().vocab_size if isinstance(language, PreTrainedModel) else 0
    first_code = max(table, *(token + 1 for token in tokens.values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer_part = _image_tokenizer(wanted) if vq else None
    codes = 0 if tokenizer_part is None else tokenizer_part.num_codes
    decoder = _decoder(language, tokenizer, first_code + codes, seed, weights, {"positions": positions, **given})
    decoder.to(dtype or decoder.dtype)
    vision = tokenizer_part or _patch_embedding(wanted, decoder, seed)
    settings = {
        "row_token_id": None if vq else tokens[ROW_TOKEN],
        "begin_token_id": tokens[BEGIN_TOKEN],
        "end_token_id": tokens[END_TOKEN],
        "code_ids": first_code if vq else None,
        "z_loss": z_loss,
    }
    UnifiedSettings.of(settings)
    config = ChiasmConfig(
        vision_config=vision.config.to_dict(),
        text_config=decoder.config.to_dict(),
        fusion="unified",
        attention=attention,
        image_token_id=tokens[IMAGE_TOKEN],
        direct_head=True,
        unified=settings,
        dtype=decoder.dtype,
    )
    model = UnifiedModel(config, vision=vision.to(decoder.device, decoder.dtype), language=decoder)
    if isinstance(language, PreTrainedModel) and language.generation_config is not None:
        model.generation_config = language.generation_config
    return model.eval(), None if tokenizer is None else _processor(wanted, model, tokenizer)


def _token_ids(tokenizer: PreTrainedTokenizerBase | None, words: int, names: list[str]) -> dict[str, int]:
    """The placeholder and the marks of pictures, which are added to the tokenizer, or stand behind the words."""
    if tokenizer is None:
        return {name: words + index for index, name in enumerate(names)}
    tokenizer.add_tokens(names, special_tokens=True)
    return {name: tokenizer.convert_tokens_to_ids(name) for name in names}


def _decoder(
    language: PreTrainedModel | dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    seed: int,
    weights: str | None,
    options: dict[str, Any],
) -> UnifiedDecoderForCausalLM:
    """The decoder of a language model, or of sizes alone, with a table of so many words and codes."""
    if not isinstance(language, dict):
        return decoder_from(language, vocabulary, seed, weights or "pretrained", **options)
    if weights not in (None, "random"):
        raise ValueError(f"unified option weights is {weights!r}, but language={{...}} has sizes alone: leave it out")
    names = [] if tokenizer is None else ["bos_token_id", "eos_token_id", "pad_token_id"]
    marks = {name: getattr(tokenizer, name) for name in names}
    return new_decoder(marks | language, vocabulary, seed, **options)


def _image_tokenizer(wanted: dict[str, Any]) -> ImageTokenizer:
    known = {name: value for name, value in wanted.items() if name not in ("name", "resize_mode")}
    return ImageTokenizer(ImageTokenizerConfig(**known))


@torch.no_grad()
def _patch_embedding(wanted: dict[str, Any], decoder: UnifiedDecoderForCausalLM, seed: int) -> PatchEmbedding:
    """Patches are as loud as words, measured on noise."""
    options = {name: wanted[name] for name in ("patch_size", "image_size") if wanted.get(name)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = PatchEmbedding(PatchConfig(hidden_size=decoder.config.hidden_size, **options))
        vision.projection.bias.zero_()
        noise = torch.randn(64, 3 * vision.config.patch_size**2)
        loudness = vision(noise).square().mean().sqrt()
        vision.projection.weight.mul_(embedding_scale(decoder) / loudness)
    return vision


def _processor(wanted: dict[str, Any], model: UnifiedModel, tokenizer: PreTrainedTokenizerBase) -> UnifiedProcessor:
    common: dict[str, Any] = {
        "num_image_tokens": model.num_image_tokens,
        "image_boundary": [BEGIN_TOKEN, END_TOKEN],
        "token_types": model.config.attention == "prefix",
    }
    if wanted["name"] == "vq":
        half, mode = [0.5, 0.5, 0.5], wanted.get("resize_mode", "squash")
        images = ChiasmImageProcessor(model.vision.image_size, half, half, resize_mode=mode)
        return UnifiedProcessor(images, tokenizer, grid=model.vision.grid, **common)
    size = wanted.get("image_size")
    fixed = None if size is None else {"height": size[0], "width": size[1]}
    limits = {"max_patches": wanted["max_patches"]} if "max_patches" in wanted else {}
    patches = PatchImageProcessor(model.vision.config.patch_size, size=fixed, **limits)
    return UnifiedProcessor(patches, tokenizer, row_token=ROW_TOKEN, **common)
