"""2-D coordinates for patch features: sines and cosines of row and column, appended as extra channels.

A convolutional encoder gives the same feature wherever an object stands; these channels tell where. They have no
parameters. Frequencies double from half a period across the picture (Vaswani et al. 2017, arXiv 1706.03762, in two
dimensions).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FREQUENCIES = 4
WIDTH = 4 * FREQUENCIES


def append_grid_positions(
    features: Float[Tensor, "B N D_v"], grid: tuple[int, int], scale: float
) -> Float[Tensor, "B N D_p"]:
    """Features with `WIDTH` coordinate channels behind them.

    Args:
        features: patch features of a row-major grid; tokens in front of it get zeros, for they have no place.
        grid: rows and columns, with rows × columns = N but for those tokens.
        scale: amplitude of the coordinate channels; the features' own root mean square keeps both audible.
    """
    rows, columns = grid
    y = (torch.arange(rows, device=features.device, dtype=torch.float32) + 0.5) / rows
    x = (torch.arange(columns, device=features.device, dtype=torch.float32) + 0.5) / columns
    frequencies = math.pi * 2.0 ** torch.arange(FREQUENCIES, device=features.device, dtype=torch.float32)
    waves = [wave(axis[:, None] * frequencies) for axis in (y, x) for wave in (torch.sin, torch.cos)]
    down = torch.cat(waves[:2], dim=-1)[:, None].expand(rows, columns, -1)
    across = torch.cat(waves[2:], dim=-1)[None].expand(rows, columns, -1)
    coordinates = torch.cat([down, across], dim=-1).reshape(1, rows * columns, WIDTH) * (scale * math.sqrt(2))
    coordinates = F.pad(coordinates, (0, 0, features.shape[1] - rows * columns, 0))
    return torch.cat([features, coordinates.to(features.dtype).expand(features.shape[0], -1, -1)], dim=-1)
