"""How pictures come into the unified transformer: model type of the configuration → the part `vision`."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from chiasm.vision.chameleon_tokenizer import ChameleonTokenizer
from chiasm.vision.image_tokenizer import ImageTokenizer
from chiasm.vision.patches import PatchEmbedding

IMAGE_INPUTS: dict[str, Any] = {
    "chiasm_patches": PatchEmbedding,
    "chiasm_image_tokenizer": ImageTokenizer,
    "chameleon_vqgan": ChameleonTokenizer,
}


def build_image_input(config: PreTrainedConfig) -> nn.Module:
    """A patch embedding or an image tokenizer with fresh weights.

    Raises:
        ValueError: a vision encoder's configuration.
    """
    if config.model_type not in IMAGE_INPUTS:
        raise ValueError(
            f"fusion 'unified' has no vision encoder, got one of type {config.model_type!r}; "
            f"its image inputs are {', '.join(IMAGE_INPUTS)}"
        )
    return IMAGE_INPUTS[config.model_type](config)
