"""Attention for training in bfloat16 on a CPU, where PyTorch's fused backward is the slow part of the whole step.

On short sequences (up to 512 tokens) plain matrix products are two to four times as fast as the fused backward.
Probabilities are computed again in the backward, so memory stays that of the fused kernel. Query heads that share a
key-value head (arXiv 2305.13245) go through one product, which saves repeating keys and values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "chiasm_grouped"
LONGEST = 512


class GroupedAttention(torch.autograd.Function):
    """softmax(q kᵀ · scale + bias) v for G key-value heads that H query heads share; probabilities are not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "B H S D"],
        key: Float[Tensor, "B G L D"],
        value: Float[Tensor, "B G L D"],
        bias: Float[Tensor, "B_or_one one S L"],
        scale: float,
    ) -> Float[Tensor, "B H S D"]:
        ctx.save_for_backward(query, key, value, bias)
        ctx.scale = scale
        probabilities = _probabilities(query, key, bias, scale)
        return (_by_group(probabilities, key) @ value).view_as(query)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, bias = ctx.saved_tensors
        probabilities = _probabilities(query, key, bias, ctx.scale)
        gradient = _by_group(gradient, key)
        d_value = _by_group(probabilities, key).transpose(-1, -2) @ gradient
        d_probabilities = (gradient @ value.transpose(-1, -2)).view_as(probabilities)
        d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
        d_scores = _by_group(d_scores, key)
        d_query = (d_scores @ key).mul_(ctx.scale).view_as(query)
        d_key = d_scores.transpose(-1, -2) @ _by_group(query * ctx.scale, key)
        return d_query, d_key, d_value, None, None


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    scores = _by_group(query * scale, key) @ key.transpose(-1, -2)
    return torch.softmax(scores.view(*query.shape[:3], key.shape[2]).add_(bias), dim=-1)


def _by_group(heads: Tensor, key: Tensor) -> Tensor:
    """(B, H, S, X) → (B, G, H/G · S, X): the query heads of one key-value head below each other."""
    return heads.reshape(heads.shape[0], key.shape[1], -1, heads.shape[-1])


def grouped_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B G L D"],
    value: Float[Tensor, "B G L D"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa` computes; only short bfloat16 sequences that need a gradient go another way."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    short = max(query.shape[2], key.shape[2]) <= LONGEST and dtype == torch.bfloat16
    if not (learns and short and dropout == 0.0 and attention_mask is not None):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask.dtype == torch.bool:
        open_ = torch.zeros(attention_mask.shape, dtype=dtype, device=query.device)
        attention_mask = open_.masked_fill_(~attention_mask, torch.finfo(dtype).min)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = GroupedAttention.apply(*(t.to(dtype) for t in (query, key, value, attention_mask)), scale)
    return attended.transpose(1, 2).contiguous(), None


def _full_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of `sdpa`, never left out where it would be plain causal."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, _full_mask)


@contextmanager
def fast_attention(language: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """While it lasts, the language model attends through `grouped_attention` where that is the faster way."""
    before = language.config._attn_implementation
    if before != "sdpa" or language.device.type != "cpu" or dtype != torch.bfloat16:
        yield
        return
    language.set_attn_implementation(NAME)
    try:
        yield
    finally:
        language.set_attn_implementation(before)
