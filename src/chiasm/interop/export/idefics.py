"""Intermediate fusion with Idefics' kind of blocks → Idefics checkpoints of transformers (arXiv 2306.16527)."""

from typing import Any

from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.asking import PIECES_NOTE, by_pieces
from chiasm.interop.export.parts import (
    Exported,
    generation,
    require,
    require_plain,
    require_same,
    rows,
    tied,
    weights,
)
from chiasm.interop.export.prompts import portable_template, portable_tokenizer
from chiasm.interop.idefics import BOUNDARY, DECOUPLED, TEXT_SETTINGS, chiasm_config, table
from chiasm.interop.weights import counterpart, rename
from chiasm.language.adapter import vocabulary
from chiasm.vision.image_processor import ChiasmImageProcessor
from chiasm.vision.towers import CLIP_SIZES


def export_idefics(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' Idefics.

    Raises:
        ValueError: Idefics cannot hold it; the message says why and what would fit.
    """
    require_plain(model, "Idefics")
    text, tower = model.config.text_config, model.config.vision_config
    require(
        text.model_type == "llama" and text.num_key_value_heads == text.num_attention_heads,
        f"Idefics is a Llama with as many key-value heads as heads, this language model is of type "
        f"{text.model_type!r} with {getattr(text, 'num_key_value_heads', None)}",
        "use Chiasm's own server, or connect with fusion='early'",
    )
    require(
        tower.model_type == "clip_vision_model",
        f"Idefics has a CLIP encoder, this model one of type {tower.model_type!r}",
        "connect a clip_vision_model",
    )
    bare = processor is None and vocabulary(model.language) <= model.config.image_token_id
    config = _config(model, bare)
    back = chiasm_config(config)
    end = (model.config.cross_attention or {}).get("end_of_text")  # Idefics' processor knows it, its model does not
    end = end if processor is None else processor.tokenizer.eos_token_id
    back.cross_attention = {**(back.cross_attention or {}), "end_of_text": end}
    require_same(model, back, "Idefics")
    names, _ = table(config)
    shape = (1, 1, -1) if config.alpha_type == "vector" else (1,)
    shaped = dict.fromkeys(_gates(config), lambda tensor: tensor.reshape(shape))
    idefics = counterpart(IdeficsForVisionText2Text, config, _decoupled(model, config), names, shaped)
    idefics.generation_config = generation(model)
    if processor is None:
        return Exported(idefics, None)
    return Exported(idefics, _processor(model, processor), notes=(PIECES_NOTE,), ask=by_pieces)


def _config(model: FusionModel, bare: bool) -> IdeficsConfig:
    """
    Args:
        bare: no text of the model will hold its placeholder, which has no row in the table.
    """
    text, tower = model.config.text_config, model.config.vision_config
    blocks, connector = model.config.cross_attention or {}, model.config.connector
    layers = blocks["layers"]
    perceiver: dict[str, Any] = {}
    if connector["name"] == "perceiver_resampler":
        perceiver = {
            "resampler_n_latents": connector["num_latents"],
            "resampler_depth": connector["depth"],
            "resampler_n_heads": connector["heads"],
            "resampler_head_dim": connector["head_dim"],
            "qk_layer_norms_perceiver": connector["qk_norm"],
        }
    sizes = {name: getattr(tower, name) for name in CLIP_SIZES}
    settings = {name: getattr(text, name) for name in TEXT_SETTINGS} | {"tie_word_embeddings": tied(model)}
    count = vocabulary(model.language) if bare else rows(model)
    own = count if bare else model.config.image_token_id - 1  # the second added word is the placeholder, as published
    return IdeficsConfig(
        **settings | {"dtype": model.language.dtype},
        vocab_size=own,
        additional_vocab_size=count - own,
        cross_layer_interval=layers[1] - layers[0] if len(layers) > 1 else text.num_hidden_layers,
        qk_layer_norms=blocks["qk_norm"],
        alpha_type="vector" if blocks["gate"] == "vector" else "float",
        use_resampler=bool(perceiver),
        perceiver_config=perceiver,
        vision_config={"embed_dim": sizes.pop("hidden_size"), **sizes},
    )


def _gates(config: IdeficsConfig) -> list[str]:
    blocks = range(len(range(0, config.num_hidden_layers, config.cross_layer_interval)))
    gates = ("alpha_cross_attn", "alpha_dense")
    return [f"model.gated_cross_attn_layers.{index}.{gate}" for index in blocks for gate in gates]


def _decoupled(model: FusionModel, config: IdeficsConfig) -> dict[str, Tensor]:
    """The weights, where the rows behind the vocabulary stand apart."""
    ours = weights(model, config.vocab_size + config.additional_vocab_size)
    names = table(config)[0]
    for whole, added in DECOUPLED.items() if config.additional_vocab_size else ():
        mine = rename(whole, names) or ""
        ours[rename(added, names) or ""] = ours[mine][config.vocab_size :]
        ours[mine] = ours[mine][: config.vocab_size]
    return ours


def _processor(model: FusionModel, processor: ChiasmProcessor) -> IdeficsProcessor:
    images = processor.image_processor
    require(
        processor.image_boundary == BOUNDARY,
        f"Idefics frames pictures with {BOUNDARY!r}, this model's processor with {processor.image_boundary!r}",
        "start from an Idefics checkpoint: chiasm.load(...)",
    )
    require(
        not isinstance(images, ChiasmImageProcessor)
        or (images.resize_mode == "squash" and images.size["height"] == images.size["width"]),
        "Idefics squashes pictures to a square, this model does not",
        "connect with resize_mode='squash'",
    )
    side = model.vision.image_size[0]
    pictures = IdeficsImageProcessorPil(image_size=side, image_mean=images.image_mean, image_std=images.image_std)
    words = portable_tokenizer(processor)
    words.chat_template = portable_template(processor)
    return IdeficsProcessor(pictures, words, image_size=side)
