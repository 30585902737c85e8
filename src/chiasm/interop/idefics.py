"""Idefics checkpoints of transformers, the open Flamingo → intermediate fusion, logits equal (arXiv 2306.16527)."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import IdeficsConfig, LlamaConfig

from chiasm.data.chat import IMAGE_TOKEN
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.cross_attention_settings import CrossAttentionSettings
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.generation.decode import stop_at_end_of_turn
from chiasm.interop.parts import describe_features, finish, load_processor
from chiasm.interop.weights import Table, assemble, read_weights
from chiasm.language.adapter import load_tokenizer
from chiasm.vision.towers import standalone

BOUNDARY = "<fake_token_around_image>"
END_OF_UTTERANCE = "<end_of_utterance>"

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '' if loop.first else '\n' }}{{ message['role'].capitalize() }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ ' ' if loop.first else '' }}{{ part['text'] }}{% endif %}{% endfor %}END{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"
)
"""What the instructed checkpoints were trained on, where END is the end of an utterance; their files hold none."""

TABLE: Table = {
    "model.vision_model": "vision.model",
    "model.perceiver_resampler": "connector",
    "model.perceiver_resampler.layer_norm": "connector.norm",
    "model.embed_tokens": "language.model.embed_tokens",
    "model.layers": "language.model.layers",
    "model.norm": "language.model.norm",
    "lm_head": "language.lm_head",
}

BLOCK: Table = {
    "cross_attn": "",
    "cross_attn.q_layer_norm": "q_norm",
    "cross_attn.k_layer_norm": "k_norm",
    "mlp": "",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "alpha_cross_attn": "attention_gate",
    "alpha_dense": "feed_forward_gate",
}

RESAMPLER_LAYER: Table = {
    "0.latents_layer_norm": "latent_norm",
    "0.context_layer_norm": "patch_norm",
    "0.q_layer_norm": "query_norm",
    "0.k_layer_norm": "key_norm",
    "0.q_proj": "query",
    "0.k_proj": "key",
    "0.v_proj": "value",
    "0.output_proj": "out",
    "1.ln": "feed_forward_norm",
    "1.fc": "up",
    "1.c_proj": "down",
}

TEXT_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
"""Settings that Idefics and its language model, a Llama, both have."""

DECOUPLED = {
    "model.embed_tokens.weight": "model.embed_tokens.additional_embedding.weight",
    "lm_head.weight": "lm_head.additional_fc.weight",
}
"""Tables of the vocabulary → the rows of added tokens, which follow it."""


def load_idefics(
    source: str, dtype: torch.dtype | str = "auto"
) -> tuple[IntermediateFusionModel, ChiasmProcessor | None]:
    """Model and processor of an Idefics folder or hub id; no processor where its files are missing.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    config, tokenizer = IdeficsConfig.from_pretrained(source), load_tokenizer(source)
    words = tokenizer.get_vocab() if tokenizer is not None else {}
    ours = chiasm_config(config)
    if tokenizer is not None:
        ours.image_token_id = words.get(IMAGE_TOKEN, ours.image_token_id)
        ours.cross_attention = {**(ours.cross_attention or {}), "end_of_text": tokenizer.eos_token_id}
    names, gates = table(config)
    weights = whole_tables(read_weights(source), config.additional_vocab_size)
    flat = dict.fromkeys(gates, Tensor.flatten)
    model = assemble(IntermediateFusionModel, ours, weights, names, flat, dtype)
    finish(model, source)
    end = END_OF_UTTERANCE if END_OF_UTTERANCE in words else ""
    processor = load_processor(source, model, TEMPLATE.replace("END", end), image_boundary=BOUNDARY)
    if processor is not None:
        stop_at_end_of_turn(model, processor)
    return model, processor


def chiasm_config(config: IdeficsConfig) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words. The picture's token is the second added one, as published,
    or beyond the table where there is none."""
    vision = standalone(config.vision_config)
    return ChiasmConfig(
        vision_config=vision.to_dict(),
        text_config=_language_config(config).to_dict(),
        fusion="intermediate",
        connector=_connector(config),
        features=describe_features(vision, {"layers": ["last"], "prefix": "keep"}).to_dict(),
        image_token_id=config.vocab_size + min(config.additional_vocab_size, 1),
        cross_attention=asdict(_cross_attention(config)),
        dtype=config.dtype,
    )


def _language_config(config: IdeficsConfig) -> LlamaConfig:
    """The decoder without its cross-attention is a Llama."""
    vocabulary = config.vocab_size + config.additional_vocab_size
    return LlamaConfig(**{name: getattr(config, name) for name in TEXT_SETTINGS}, vocab_size=vocabulary)


def _connector(config: IdeficsConfig) -> dict[str, Any]:
    if not config.use_resampler:
        return {"name": "linear", "bias": False, "project": False}
    resampler = config.perceiver_config
    return {
        "name": "perceiver_resampler",
        "num_latents": resampler.resampler_n_latents,
        "depth": resampler.resampler_depth,
        "heads": resampler.resampler_n_heads,
        "head_dim": resampler.resampler_head_dim,
        "activation": "relu",
        "qk_norm": resampler.qk_layer_norms_perceiver,
        "project": False,
    }


def _cross_attention(config: IdeficsConfig) -> CrossAttentionSettings:
    if config.hidden_act != "silu":
        raise ValueError(f"this Idefics has hidden_act {config.hidden_act!r}; Chiasm's gated feed-forward has 'silu'")
    if config.num_hidden_layers % config.cross_layer_interval:
        raise ValueError(
            f"this Idefics has num_hidden_layers {config.num_hidden_layers}, expected a multiple of its "
            f"cross_layer_interval {config.cross_layer_interval}, for which transformers builds enough blocks"
        )
    heads, ends = config.num_attention_heads, config.eos_token_id
    return CrossAttentionSettings(
        layers=list(range(0, config.num_hidden_layers, config.cross_layer_interval)),
        heads=heads,
        kv_heads=heads,
        head_dim=config.hidden_size // heads,
        feed_forward=config.intermediate_size,
        gated_feed_forward=True,
        norm="rms",
        eps=config.rms_norm_eps,
        qk_norm=config.qk_layer_norms,
        visual_norm=False,
        gate="vector" if config.alpha_type == "vector" else "scalar",
        mask_feed_forward=False,
        image_embedding=False,
        end_of_text=ends[0] if isinstance(ends, list) else ends,
    )


def table(config: IdeficsConfig) -> tuple[Table, list[str]]:
    """Prefixes of all names, and the names of the gates."""
    names, gates = dict(TABLE), []
    for index in range(len(range(0, config.num_hidden_layers, config.cross_layer_interval))):
        theirs, ours = f"model.gated_cross_attn_layers.{index}", f"cross_attention.blocks.{index}"
        names |= {f"{theirs}.{name}": f"{ours}.{new}".rstrip(".") for name, new in BLOCK.items()}
        gates += [f"{ours}.attention_gate", f"{ours}.feed_forward_gate"]
    for index in range(config.perceiver_config.resampler_depth if config.use_resampler else 0):
        theirs, ours = f"model.perceiver_resampler.blocks.{index}", f"connector.layers.{index}"
        names |= {f"{theirs}.{name}": f"{ours}.{new}" for name, new in RESAMPLER_LAYER.items()}
    return names, gates


def whole_tables(weights: dict[str, Tensor], added: int) -> dict[str, Tensor]:
    """Weights whose embedding table and head have the added rows behind the vocabulary's."""
    for table, rows in DECOUPLED.items():
        if added and table in weights:
            if rows not in weights:
                raise ValueError(f"1 weight has no value in the checkpoint: {rows!r}")
            weights[table] = torch.cat([weights[table], weights.pop(rows)])
    return weights
