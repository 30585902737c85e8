"""A prefix that is read in both directions, with a causal suffix behind it (PrefixLM, arXiv 1910.10683).

In PaliGemma the prefix is the picture and the prompt (arXiv 2407.07726).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.generic import is_flash_attention_requested

SUFFIX = 1
"""Token type of what is read causally; 0 is the prefix."""


def prefix_mask(
    config: PreTrainedConfig,
    inputs_embeds: Float[Tensor, "B S D_l"],
    attention_mask: Tensor | None,
    token_type_ids: Int[Tensor, "B S"],
    cache: Cache | None = None,
    position_ids: Tensor | None = None,
) -> Any:
    """The mask that a language model of this configuration takes: a tensor, or one for each kind of its layers.

    Raises:
        ValueError: the attention implementation takes no masks.
    """
    if is_flash_attention_requested(config):
        raise ValueError(
            f"attention: prefix needs a mask, which {config._attn_implementation} does not take; "
            "load the model with attn_implementation='sdpa'"
        )
    return create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        cache=cache,
        position_ids=counted(position_ids),
        block_sequence_ids=torch.where(token_type_ids == 0, 0, -1),
    )


def counted(position_ids: Tensor | None) -> Tensor | None:
    """Positions as masks read them, to tell packed sequences apart; coordinates on several axes say nothing of it."""
    return position_ids if position_ids is None or position_ids.ndim == 2 else None


def with_suffix(token_type_ids: Int[Tensor, "B S"], count: int) -> Int[Tensor, "B S_plus"]:
    """Token types with new tokens, which belong to the suffix, behind them."""
    return torch.cat([token_type_ids, token_type_ids.new_full((token_type_ids.shape[0], count), SUFFIX)], dim=1)
