"""What a connector keeps of a picture, told without a language model.

Neighbours: which pictures are alike before the connector and behind it. Reconstruction: how much of the patches a ridge
regression from the visual tokens cannot give back, on pictures that it was not fitted to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.data.collation import load_pixels
from chiasm.data.schema import Sample
from chiasm.fusion.early import EarlyFusionModel
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.fusion.sequence import PositionedModel
from chiasm.training.forgetting import knn_overlap

HELD_OUT = 0.25
"""Share of the pictures that the regression is tested on."""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths, as shares of the mean variance; the best one counts, for every connector alike."""
FEWEST = 8
AT_ONCE = 16


@torch.no_grad()
def diagnose(model: Any, processor: Any, samples: Sequence[Sample], pictures: int) -> dict[str, float]:
    """`knn_overlap` (1 where nothing changed) and `reconstruction_error` (0 where nothing is lost, 1 where all is), and
    `reconstruction_floor`, the error of a regression from the patches themselves. Empty for too few pictures."""
    connected = isinstance(model, EarlyFusionModel | IntermediateFusionModel)
    if not connected or isinstance(model, PositionedModel) or model.reads_instruction:
        return {}
    shown = [sample for sample in samples if len(sample.images) == 1][:pictures]
    if len(shown) < FEWEST:
        return {}
    before, after = [], []
    for start in range(0, len(shown), AT_ONCE):
        loaded = [load_pixels(sample, processor) for sample in shown[start : start + AT_ONCE]]
        pixels = torch.cat([one for one in loaded if one is not None])
        features = model.encode_images(pixels.to(model.device, model.vision.model.dtype))
        tokens = model.visual_tokens(None, features, None, None)
        before.append(features.float().cpu())
        after.append(tokens.float().cpu())
    patches, tokens = torch.cat(before), torch.cat(after)
    return {
        "pictures": len(patches),
        "knn_overlap": knn_overlap(patches.mean(1), tokens.mean(1)),
        "reconstruction_error": reconstruction_error(tokens, patches),
        "reconstruction_floor": reconstruction_error(patches, patches),
    }


def reconstruction_error(tokens: Float[Tensor, "pictures T D_l"], patches: Float[Tensor, "pictures N D_v"]) -> float:
    """The share of the held-out patches' variance that the regression leaves, of the best of `PENALTIES`.

    It is solved in its dual form, of as many unknowns as pictures, however many tokens there are.
    """
    cut = max(1, round(len(tokens) * (1 - HELD_OUT)))
    inputs, targets = tokens.flatten(1).double(), patches.flatten(1).double()
    inputs, targets = inputs - inputs[:cut].mean(0), targets - targets[:cut].mean(0)
    inputs = inputs / inputs[:cut].std().clamp(min=1e-12)
    kernel, across = inputs[:cut] @ inputs[:cut].T, inputs[cut:] @ inputs[:cut].T
    scale = kernel.diagonal().mean() * torch.eye(cut, dtype=torch.float64)
    total = targets[cut:].square().sum().clamp(min=1e-12)
    errors = [
        (targets[cut:] - across @ torch.linalg.solve(kernel + penalty * scale, targets[:cut])).square().sum() / total
        for penalty in PENALTIES
    ]
    return min(error.item() for error in errors)
