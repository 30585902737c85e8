"""An encoder whose positions are stretched while it runs → one that has learned positions for its picture size.

What reads a checkpoint, transformers' image-text models and llama.cpp, takes the table of positions as it is.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from chiasm.vision.encoder import VisionEncoder
from chiasm.vision.probe import default_image_size
from chiasm.vision.towers import build_tower, without_pooler

STRETCH = "interpolate_pos_encoding"
"""What transformers' encoders call the method that stretches their positions."""


def at_own_size(encoder: VisionEncoder) -> VisionEncoder:
    """An encoder of the same features with `image_size` in its configuration and positions for it.

    It is the encoder itself where nothing is stretched, or where its kind holds positions of no such size: CLIP and
    SigLIP have them for squares alone.
    """
    tower, features = encoder.model, encoder.features
    stretching: list[Any] = [module for module in tower.modules() if hasattr(module, STRETCH)]
    if features.image_size == default_image_size(tower.config) or len(stretching) != 1:
        return encoder
    try:
        resampled = _resampled(tower, stretching[0], *features.image_size)
        made = VisionEncoder(resampled, replace(features, interpolate_positions=False))
        return made if _agree(encoder, made) else encoder
    except (RuntimeError, TypeError, ValueError):  # of a kind that takes squares alone
        return encoder


def _resampled(tower: PreTrainedModel, embeddings: Any, height: int, width: int) -> PreTrainedModel:
    config: Any = copy.deepcopy(tower.config)
    config.image_size = height if height == width and isinstance(config.image_size, int) else [height, width]
    with torch.device("meta"):
        wanted = build_tower(config).state_dict()
    weights = tower.state_dict()
    (positions,) = (name for name, tensor in wanted.items() if tensor.shape != weights[name].shape)
    shape = wanted[positions].shape
    with torch.no_grad():
        like = torch.empty(1, *shape[-2:], dtype=tower.dtype, device=tower.device)
        table = getattr(embeddings, STRETCH)(like, height, width).reshape(shape)
    options = without_pooler(type(tower)) | {"attn_implementation": tower.config._attn_implementation}
    made: PreTrainedModel = type(tower).from_pretrained(
        None, config=config, state_dict=weights | {positions: table}, dtype=tower.dtype, **options
    )
    return made.to(tower.device).eval()


@torch.no_grad()
def _agree(first: VisionEncoder, second: VisionEncoder) -> bool:
    noise = torch.randn(1, 3, *first.image_size, generator=torch.Generator().manual_seed(0)).to(first.model.device)
    return torch.equal(first(noise), second(noise))
