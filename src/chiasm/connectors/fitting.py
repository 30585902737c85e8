"""A connector of any shape that starts as a given map of its patches: fitted to it (distillation, arXiv 1503.02531)
without a language model.

What a visual token should say is what the map says, on average, of the patches that it sees. Tokens without places
(those of a Q-Former or a resampler) take cells of a grid of their own: together they look at all of the picture.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from statistics import fmean

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from chiasm.connectors.base import Connector, Grid, block_attention

MOST_STEPS, FEWEST_STEPS, BATCH = 400, 100, 32
MOST_FLOPS = {"cpu": 2e13}
"""Floating-point operations that a start may take, by device: minutes at most."""
MOST_FLOPS_ELSEWHERE = 2e15
LEARNING_RATE = 1e-3
MOST_PATCHES = 4096
"""So many tell how loud the map is."""

Features = Float[Tensor, "images N D_v"]


def steps_within_reach(connector: Connector) -> int:
    """Steps of a fit; fewer than `FEWEST_STEPS` are too few to learn anything."""
    device = next(connector.parameters()).device.type
    each = 3 * BATCH * connector.flops()
    return int(min(MOST_STEPS, MOST_FLOPS.get(device, MOST_FLOPS_ELSEWHERE) // each))


def cells_of(connector: Connector) -> Grid:
    """For tokens without places the squarest grid of so many cells."""
    rows = next(rows for rows in range(math.isqrt(connector.num_tokens), 0, -1) if connector.num_tokens % rows == 0)
    return rows, connector.num_tokens // rows


@torch.no_grad()
def shares_of(connector: Connector, blank: Features) -> Float[Tensor, "T N"]:
    """Which patches a token is about, in equal shares: those that it sees, or those of its cell."""
    if connector.token_grid is None:
        cells = block_attention(connector.grid, cells_of(connector))
        return F.pad(cells, (connector.num_prefix, 0)).to(blank)
    seen = (connector.attention(blank)[0] > 0).to(blank)
    return seen / seen.sum(dim=1, keepdim=True)


def fit(
    connector: Connector,
    features: Features,
    with_positions: Callable[[Features], Features],
    weight: Float[Tensor, "D_l D_p"],
    bias: Float[Tensor, " D_l"],
) -> float:
    """Trains the connector to say of every picture what `features @ weight.T + bias` says, averaged over patches.

    The map goes patch by patch, so in every second batch each patch comes from a picture of its own: a few hundred
    pictures are as good as many. A connector that learns nothing stays as it is.

    Args:
        features: patch features of pictures, without coordinates.
        with_positions: appends these, where the connector reads them.

    Returns:
        The share of the targets' variance that the connector misses at the end, 1 where it learned nothing.
    """
    device = next(connector.parameters()).device
    student = deepcopy(connector).float().eval().requires_grad_(True)
    weight, bias = weight.float().to(device), bias.float().to(device)
    random = torch.Generator().manual_seed(0)
    places = torch.arange(features.shape[1])

    def drawn(mixed: bool) -> Features:
        shape = (BATCH, features.shape[1] if mixed else 1)
        pictures = torch.randint(features.shape[0], shape, generator=random)
        return with_positions(features[pictures, places].float().to(device))

    pictures = drawn(mixed=False)
    shares = shares_of(student, torch.zeros_like(pictures[:1]))
    patches = pictures.flatten(0, 1)
    some = patches[torch.randperm(len(patches), generator=random)[:MOST_PATCHES]]
    centre, gain, variance = _loudness(shares @ pictures @ weight.T + bias, some @ weight.T + bias)
    steps = max(steps_within_reach(connector), FEWEST_STEPS)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    errors: list[float] = []
    for step in range(steps):
        batch = drawn(mixed=step % 2 == 0)
        wanted = centre + gain * (shares @ batch @ weight.T + bias - centre)
        error = (student(batch) - wanted).square().mean() / variance
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 2:
            errors.append(error.item())
    missed = fmean(errors[-(len(errors) // 10 or 1) :])
    if not missed < 1:
        return 1.0
    connector.load_state_dict(student.state_dict())
    return missed


def _loudness(
    averages: Float[Tensor, "images T D_l"], patches: Float[Tensor, "patches D_l"]
) -> tuple[Float[Tensor, " D_l"], float, float]:
    """Where tokens lie on average, what makes averages as loud as patches are, and their variance then."""
    centre = averages.mean(dim=(0, 1))
    quiet = (averages - centre).square().mean().item()
    loud = (patches - patches.mean(dim=0)).square().mean().item()
    return centre, math.sqrt(loud / max(quiet, 1e-12)), loud
