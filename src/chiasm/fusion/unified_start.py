"""What a unified decoder starts from: a Llama-shaped language model, whose weights it takes over, or nothing."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from chiasm.fusion.unified_decoder import UnifiedDecoderConfig, UnifiedDecoderForCausalLM

LLAMA_SHAPED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"query_bias": True},
    "qwen2_vl_text": {"query_bias": True},
    "qwen3": {"qk_norm": "rms"},
}
"""Model type → what its layers have that Llama's have not."""

SHARED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "attention_dropout"),
)
ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
"""Kinds of rotation that the decoder turns by."""

WEIGHTS = ("pretrained", "random")
"""What a decoder takes over of a language model beside its sizes and its words."""

OPTIONS = ("positions", "rope_sections", "qk_norm", "norm_order")
"""Fields of `UnifiedDecoderConfig` that a model may choose beside the weights that it starts from."""


def decoder_config(config: PreTrainedConfig, **options: Any) -> UnifiedDecoderConfig:
    """The configuration of a decoder that computes what a language model of another configuration computes.

    Raises:
        ValueError: the language model is of another shape; the message names what is different.
    """
    kind = config.model_type
    if kind not in LLAMA_SHAPED:
        raise ValueError(
            f"fusion 'unified' starts from Llama-shaped language models ({', '.join(LLAMA_SHAPED)}), got one of type "
            f"{kind!r}; choose one of those, fusion='early', or language={{...}} to start from nothing"
        )
    _refuse(kind, "layer_types", sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention"}), [])
    _refuse(kind, "sliding_window", getattr(config, "sliding_window", None), None)
    rope = config.rope_parameters["rope_type"]
    parameters = {name: value for name, value in config.rope_parameters.items() if name != "mrope_section"}
    if rope not in ROPE_TYPES:
        raise ValueError(f"rope_type {rope!r} of this {kind} model is none of {', '.join(ROPE_TYPES)}")
    _refuse(kind, "partial_rotary_factor", config.rope_parameters.get("partial_rotary_factor", 1.0), 1.0)
    fields = {name: copy.deepcopy(getattr(config, name)) for name in SHARED}
    biased = bool(getattr(config, "attention_bias", False))
    fields |= {"query_bias": biased, "output_bias": biased, "mlp_bias": bool(getattr(config, "mlp_bias", False))}
    fields |= {"tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False))}
    fields |= {"rope_parameters": parameters, "head_dim": getattr(config, "head_dim", None), "dtype": config.dtype}
    return UnifiedDecoderConfig(**fields | LLAMA_SHAPED[kind] | options)


def _refuse(kind: str, name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"{name} of this {kind} model is {found}, but the unified decoder computes {name} {wanted}")


@torch.no_grad()
def decoder_from(
    language: PreTrainedModel, vocab_size: int, seed: int = 0, weights: str = "pretrained", **options: Any
) -> UnifiedDecoderForCausalLM:
    """A decoder with a language model's weights and new words behind its vocabulary.

    New words are the mean word with as much noise as words differ, drawn from `seed`. What `options` add to the layers
    starts as it is built.

    Args:
        weights: `random` takes over the sizes alone.

    Raises:
        ValueError: the language model is of another shape, or `weights` is no such word.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unified option weights is {weights!r}; choose one of {', '.join(WEIGHTS)}")
    config = decoder_config(language.config.get_text_config(), **options)
    config.vocab_size = vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = UnifiedDecoderForCausalLM(config)
    decoder.to(language.device, language.dtype).eval()
    if weights == "random":
        return decoder
    theirs = dict(language.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        theirs[name] = _longer(theirs[name], vocab_size, seed)
    missing, left_over = decoder.load_state_dict(theirs, strict=False)
    unexpected = [
        *left_over,
        *(name for name in missing if not name.endswith(("_norm.weight", "_norm.bias", "modality_embeddings.weight"))),
    ]
    if unexpected:
        raise ValueError(
            f"{len(unexpected)} weights of this {language.config.model_type} model fit nowhere: {unexpected[0]}"
        )
    return decoder


def new_decoder(settings: dict[str, Any], vocab_size: int, seed: int = 0, **options: Any) -> UnifiedDecoderForCausalLM:
    """A decoder with fresh weights.

    Raises:
        ValueError: a setting is no field of `UnifiedDecoderConfig`.
    """
    known = {name for name in UnifiedDecoderConfig.__annotations__ if name not in ("model_type", "vocab_size")}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"language setting {unknown[0]!r} is unknown; known ones are {', '.join(sorted(known))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UnifiedDecoderForCausalLM(UnifiedDecoderConfig(**settings | options | {"vocab_size": vocab_size})).eval()


def _longer(table: Tensor, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows - table.shape[0], table.shape[1], generator=generator).to(table)
    return torch.cat([table, table.float().mean(dim=0).to(table) + noise * table.float().std(dim=0).to(table)])
