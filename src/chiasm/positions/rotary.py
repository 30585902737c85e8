"""Rotary embeddings of one, two or three coordinates (RoPE, arXiv 2104.09864; M-RoPE, arXiv 2409.12191).

Every frequency turns by one of a token's coordinates. With equal coordinates, as words have, all kinds turn alike.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

DEFAULT = "default"


LONGER = ("dynamic", "longrope")
"""Kinds of rotation whose frequencies depend on how long the sequence is."""


def frequencies(
    config: Any, device: torch.device, position_ids: Int[Tensor, "... B S"]
) -> tuple[Float[Tensor, " half"], float]:
    """Inverse frequencies of a configuration's rotation at these positions, and the factor of its sines and cosines."""
    kind = config.rope_parameters["rope_type"]
    if kind != DEFAULT:
        length = {"seq_len": position_ids.max() + 1} if kind in LONGER else {}
        return ROPE_INIT_FUNCTIONS[kind](config, device, **length)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0


def axes_of(kind: str, half: int, sections: Sequence[int] | None = None) -> list[int]:
    """Which coordinate each of `half` frequencies turns by.

    `mrope` gives sections of them to frame, row and column, by default a quarter to the frame and the rest in equal
    parts; `rope2d` takes turns, so that rows and columns both have slow and fast ones.

    Raises:
        ValueError: the sections are not three numbers that sum to `half`.
    """
    if kind == "raster":
        return [0] * half
    if kind == "rope2d":
        return [index % 2 for index in range(half)]
    frame = half // 4
    chosen = list(sections or (frame, (half - frame) // 2, half - frame - (half - frame) // 2))
    if len(chosen) != 3 or sum(chosen) != half:
        raise ValueError(f"rope_sections {chosen} must be three numbers that sum to half the head_dim, {half}")
    return [axis for axis, count in enumerate(chosen) for _ in range(count)]


def rotation(
    position_ids: Int[Tensor, "axes B S"], inverse: Float[Tensor, " half"], axes: Sequence[int], scale: float = 1.0
) -> tuple[Float[Tensor, "B S head"], Float[Tensor, "B S head"]]:
    """Cosines and sines of every token's angles, in float32."""
    turns = position_ids[list(axes)] if position_ids.shape[0] > 1 else position_ids.expand(len(inverse), -1, -1)
    angles = turns.permute(1, 2, 0).float() * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * scale, angles.sin() * scale


def rotate(
    heads: Float[Tensor, "B H S head"], cos: Float[Tensor, "#B S head"], sin: Float[Tensor, "#B S head"]
) -> Float[Tensor, "B H S head"]:
    """Queries or keys, turned: the first half of a head's channels with the second."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
