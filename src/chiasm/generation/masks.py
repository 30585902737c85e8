"""Attention masks of requests that have different lengths, for each kind of layer that a language model has."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig


def slot_masks(
    config: PreTrainedConfig, positions: Int[Tensor, "B S"], keys: int, dtype: torch.dtype, prefix: int = 0
) -> Any:
    """What new tokens at these positions attend to of `keys` earlier and new ones: a mask, or one for each layer type.

    Args:
        prefix: tokens at the beginning that see each other in both directions.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if len(kinds) <= 1:
        windowed = window is not None and kinds != {"full_attention"} and getattr(config, "use_sliding_window", True)
        return _mask(positions, keys, dtype, prefix, window if windowed else None)
    return {
        kind: _mask(positions, keys, dtype, prefix, window if kind == "sliding_attention" else None) for kind in kinds
    }


def _mask(positions: Int[Tensor, "B S"], keys: int, dtype: torch.dtype, prefix: int, window: int | None) -> Tensor:
    places, now = torch.arange(keys, device=positions.device), positions[:, None, :, None]
    seen = places <= now
    if window is not None:
        seen &= places > now - window
    if prefix:
        seen |= (places < prefix) & (now < prefix)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
