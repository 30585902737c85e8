"""Layers of the unified transformer: RMSNorm (arXiv 1910.07467), SwiGLU (2002.05202), grouped queries (2305.13245).

Queries and keys may be normalised, and norms may stand behind the blocks instead of in front of them: what kept
Chameleon stable where one set of weights reads two modalities (arXiv 2405.09818).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chiasm.positions.rotary import rotate

QK_NORMS = ("none", "rms", "layer")
NORM_ORDERS = ("pre", "post")
Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        wide = states.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * wide.to(states.dtype)


class HeadLayerNorm(nn.Module):
    """Layer norm over each head's channels, with a scale and a shift for every head (Chameleon)."""

    def __init__(self, heads: int, head_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.eps = eps

    def forward(self, states: Float[Tensor, "B S H head"]) -> Float[Tensor, "B S H head"]:
        return F.layer_norm(states, states.shape[-1:], eps=self.eps) * self.weight + self.bias


def qk_norm(kind: str, heads: int, head_dim: int, eps: float) -> nn.Module | None:
    """The norm of queries or keys: `rms` shares one scale over the heads (Qwen3), `layer` is Chameleon's."""
    if kind == "none":
        return None
    return RMSNorm(head_dim, eps) if kind == "rms" else HeadLayerNorm(heads, head_dim)


class UnifiedAttention(nn.Module):
    """Causal or masked self-attention through transformers' attention interface."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.layer_idx, self.head_dim = config, layer_idx, size
        self.num_key_value_groups = heads // kv_heads
        self.scaling = size**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=config.query_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=config.query_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=config.query_bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=config.output_bias)
        self.q_norm = qk_norm(config.qk_norm, heads, size, config.rms_norm_eps)
        self.k_norm = qk_norm(config.qk_norm, kv_heads, size, config.rms_norm_eps)

    def forward(
        self,
        states: Float[Tensor, "B S D_l"],
        rotation: Rotation,
        attention_mask: Any = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B S D_l"], Tensor | None]:
        shape = (*states.shape[:-1], -1, self.head_dim)
        query, key, value = (project(states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain_attention)
        kwargs |= {"dropout": self.config.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        attended, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(attended.reshape(*states.shape[:-1], -1)), weights


def plain_attention(
    module: Any,
    query: Float[Tensor, "B H S head"],
    key: Float[Tensor, "B G L head"],
    value: Float[Tensor, "B G L head"],
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B S H head"], Float[Tensor, "B H S L"]]:
    """Attention whose weights can be looked at."""
    key, value = (heads.repeat_interleave(module.num_key_value_groups, dim=1) for heads in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SwiGLU(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: Float[Tensor, "B S D_l"]) -> Float[Tensor, "B S D_l"]:
        return self.down_proj(self.activation(self.gate_proj(states)) * self.up_proj(states))


class UnifiedLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward, each with its norm in front (`pre`) or behind (`post`)."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.norm_first = config.norm_order == "pre"
        self.self_attn = UnifiedAttention(config, layer_idx)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, states: Float[Tensor, "B S D_l"], rotation: Rotation, **kwargs: Any) -> Float[Tensor, "B S D_l"]:
        if self.norm_first:
            states = states + self.self_attn(self.input_layernorm(states), rotation, **kwargs)[0]
            return states + self.mlp(self.post_attention_layernorm(states))
        states = states + self.input_layernorm(self.self_attn(states, rotation, **kwargs)[0])
        return states + self.post_attention_layernorm(self.mlp(states))
