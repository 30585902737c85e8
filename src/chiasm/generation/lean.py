"""A Llama-shaped language model as bare tensors: what a decoding step needs, and nothing of the modules around it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from chiasm.generation.packed import Packed, pack
from chiasm.generation.packed_linear import PackedLinear
from chiasm.generation.pages import drop, trim
from chiasm.language.adapter import decoder

ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}
"""Of the feed-forward: whether it is a GELU."""
ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angle is a position's own, whatever the sequence's length."""
ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("gate", "up", "down")
"""A layer's matrices; the modules have `_proj` behind the name."""


@dataclass(frozen=True)
class Family:
    """How a family of models differs from Llama.

    Args:
        norm_offset: what RMS norms add to their weights.
        feed_forward_norm: the norm in front of the feed-forward, by name.
        after: whether there are norms behind attention and feed-forward.
    """

    norm_offset: float = 0.0
    feed_forward_norm: str = "post_attention_layernorm"
    after: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma3_text": Family(1.0, "pre_feedforward_layernorm", True),
    "chiasm_decoder": Family(),
}
"""By `model_type`."""


@dataclass(frozen=True)
class LeanLayer:
    """A layer's matrices and norms.

    Args:
        after_attention, after_feed_forward: norms behind them.
        window: tokens that it sees; 0 is all.
        kind: of its rotation.
    """

    q: Packed
    k: Packed
    v: Packed
    o: Packed
    gate: Packed
    up: Packed
    down: Packed
    attention_norm: Tensor
    feed_forward_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    after_attention: Tensor | None
    after_feed_forward: Tensor | None
    window: int
    kind: str


@dataclass(frozen=True)
class LeanModel:
    """A language model's layers, norm and head.

    Args:
        rotation: `(kind, length)` → for every position the cosines of half a head's angles, and then their sines.
    """

    layers: list[LeanLayer]
    norm: Tensor
    head: Packed
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float
    gelu: bool
    rotation: Callable[[str, int], Float[Tensor, "length head_dim"]]

    @property
    def bytes(self) -> int:
        """What a token reads of the weights."""
        names = (*ATTENTION, *FEED_FORWARD)
        return self.head.bytes + sum(getattr(layer, name).bytes for layer in self.layers for name in names)


def lean_model(language: PreTrainedModel, weights: str = "float32") -> LeanModel | None:
    """A language model's tensors; None where it is of no known shape.

    Args:
        weights: one of `chiasm.generation.packed.WEIGHTS`. The head stays in int8 where the rest is int4.
    """
    config, body = language.config.get_text_config(), decoder(language)
    family, activation = FAMILIES.get(config.model_type), getattr(config, "hidden_act", None)
    activation = getattr(config, "hidden_activation", None) or activation
    if family is None or activation not in ACTIVATIONS or not rotations(config) <= set(ROTATIONS):
        return None
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        return None
    if config.model_type == "chiasm_decoder" and (config.norm_order != "pre" or config.qk_norm == "layer"):
        return None
    attention = body.layers[0].self_attn
    rotary = getattr(body, "rotary_emb", None) or body.rotary
    return LeanModel(
        layers=[_layer(layer, family, config, index, weights) for index, layer in enumerate(body.layers)],
        norm=_norm(body.norm, family),
        head=_read(language.get_output_embeddings(), "int8" if weights == "int4" else weights),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        eps=config.rms_norm_eps,
        scale=attention.scaling,
        gelu=ACTIVATIONS[activation],
        rotation=_rotation(rotary, "layer_type" in inspect.signature(getattr(rotary, "forward", rotary)).parameters),
    )


def release(language: PreTrainedModel, lean: LeanModel) -> None:
    """Puts a language model's packed matrices in the places of its full ones, whose memory is then free.

    The model answers as before, a little off; training, saving and converting it are errors from now on.
    """
    for layer, packed in zip(decoder(language).layers, lean.layers, strict=True):
        for owner, names in ((layer.self_attn, ATTENTION), (layer.mlp, FEED_FORWARD)):
            for name in names:
                _give_back(getattr(owner, f"{name}_proj"))
                setattr(owner, f"{name}_proj", PackedLinear(getattr(packed, name)))
    _give_back(language.get_output_embeddings())
    language.set_output_embeddings(PackedLinear(lean.head))
    trim()


def _read(linear: Any, weights: str) -> Packed:
    """A linear layer in one of the `WEIGHTS`; of one that lies in a file, only what is packed stays in memory."""
    if isinstance(linear, PackedLinear):
        return linear.of_kind(weights)
    packed = pack(*_weights(linear), weights)
    if weights != "float32":
        _give_back(linear)
    return packed


def _give_back(linear: Any) -> None:
    for parameter in linear.parameters():
        drop(parameter)


def _layer(layer: Any, family: Family, config: PreTrainedConfig, index: int, weights: str) -> LeanLayer:
    attention, feed_forward = layer.self_attn, layer.mlp
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds else "sliding_attention"
    window = (getattr(config, "sliding_window", None) or 0) if kind == "sliding_attention" else 0
    matrices = {name: getattr(attention, f"{name}_proj") for name in ATTENTION}
    matrices |= {name: getattr(feed_forward, f"{name}_proj") for name in FEED_FORWARD}

    def norm(owner: Any, name: str) -> Tensor | None:
        found = getattr(owner, name, None)
        return None if found is None else _norm(found, family)

    return LeanLayer(
        **{name: _read(matrix, weights) for name, matrix in matrices.items()},
        attention_norm=_norm(layer.input_layernorm, family),
        feed_forward_norm=_norm(getattr(layer, family.feed_forward_norm), family),
        q_norm=norm(attention, "q_norm"),
        k_norm=norm(attention, "k_norm"),
        after_attention=norm(layer, "post_attention_layernorm") if family.after else None,
        after_feed_forward=norm(layer, "post_feedforward_layernorm") if family.after else None,
        window=window,
        kind=kind,
    )


def _weights(linear: Any) -> tuple[Tensor, Tensor | None]:
    """A linear layer's weight and bias, with its LoRA adapters added where it has some."""
    if not isinstance(linear, LoraLayer):
        return linear.weight, linear.bias
    base, weight = linear.get_base_layer(), linear.get_base_layer().weight
    if not linear.merged:
        weight = weight + sum(linear.get_delta_weight(name) for name in linear.active_adapters)
    return weight, base.bias


def _norm(norm: Any, family: Family) -> Tensor:
    return (norm.weight.detach().float() + family.norm_offset).contiguous()


def rotations(config: PreTrainedConfig) -> set[str]:
    """The types of a model's rotary embeddings; `none` where it has none."""
    known = getattr(config, "rope_parameters", None) or {}
    settings = [known] if "rope_type" in known else [one for one in known.values() if isinstance(one, dict)]
    return {one.get("rope_type", "none") for one in settings} or {"none"}


def _rotation(rotary: Any, by_kind: bool) -> Callable[[str, int], Tensor]:
    def table(kind: str, length: int) -> Float[Tensor, "length head_dim"]:
        like = torch.zeros(1)
        places = torch.arange(length)[None]
        cosines, sines = rotary(like, places, kind) if by_kind else rotary(like, places)
        half = cosines.shape[-1] // 2
        return torch.cat([cosines[0, :, :half], sines[0, :, :half]], dim=-1).float().contiguous()

    return table
