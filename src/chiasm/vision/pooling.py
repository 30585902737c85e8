"""One vector for a picture, from its patch features: their `mean`, the class token (`cls`), or the encoder's `own` way.

`own` is what an image-text model was trained with: CLIP's normalised class token (arXiv 2103.00020), SigLIP's attention
pooling (arXiv 2303.15343).
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from chiasm.vision.encoder import VisionEncoder

POOLINGS = ("mean", "cls", "own")

OWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "clip_vision_model": lambda tower, tokens: tower.post_layernorm(tokens[:, 0]),
    "siglip_vision_model": lambda tower, tokens: tower.head(tokens),
}
"""Model type → its own pooling, of the last layer's tokens, the class token included."""

BY_TYPE = {
    "clip_vision_model": "own",
    "siglip_vision_model": "own",
    "dinov2": "cls",
    "dinov2_with_registers": "cls",
    "dinov3_vit": "cls",
    "vit": "cls",
}
"""Model type → what `auto` means; every other encoder's features are averaged."""

ALL_TOKENS: dict[str, Any] = {"layers": ["last"], "prefix": "keep"}
ONE_CELL: dict[str, Any] = {"reduce": "pool", "grid": [1, 1]}
"""Features are averaged when they are read, so that a cache keeps one vector a picture."""


def pooling_of(model_type: str, wanted: str = "auto") -> str:
    """The word for an encoder of this type.

    Raises:
        ValueError: an unknown word, or the encoder has no pooling of its own.
    """
    if wanted not in ("auto", *POOLINGS):
        raise ValueError(f"vision_pooling {wanted!r} is unknown; choose one of auto, {', '.join(POOLINGS)}")
    pooling = BY_TYPE.get(model_type, "mean") if wanted == "auto" else wanted
    if pooling == "own" and model_type not in OWN:
        raise ValueError(f"vision_pooling 'own' is for {', '.join(OWN)}, not for {model_type}; choose mean or cls")
    return pooling


def features_for(pooling: str) -> dict[str, Any]:
    """Which features are read for a pooling, as an option of `load_vision`."""
    return ONE_CELL if pooling == "mean" else ALL_TOKENS


def pool_patches(vision: VisionEncoder, pooling: str, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B D_v"]:
    """One vector for every picture."""
    if pooling == "mean":
        return features[:, vision.num_prefix :].mean(dim=1)
    if pooling == "cls":
        return features[:, 0]
    return OWN[vision.model.config.model_type](vision.model, features)


def check_pooling(vision: VisionEncoder, pooling: str) -> None:
    """Refuses features that a pooling cannot read."""
    layers = [layer.layer for layer in vision.features.layers]
    if pooling == "cls" and vision.num_prefix == 0:
        raise ValueError(
            f"vision_pooling 'cls' needs the class token of a {vision.model.config.model_type} encoder, which its "
            "features leave out or do not have; pass features={'layers': ['last'], 'prefix': 'keep'}, or choose mean"
        )
    if pooling == "own" and (layers != ["last"] or vision.features.prefix != "keep"):
        raise ValueError(
            f"vision_pooling 'own' reads all tokens of the last layer, got layers {layers}, prefix "
            f"{vision.features.prefix!r}; leave features out"
        )
    if pooling == "own" and not getattr(vision.model, "use_head", True):
        raise ValueError(
            f"this {vision.model.config.model_type} encoder has no pooling head (vision_use_head: false in its "
            "config.json), so vision_pooling cannot be 'own'; choose mean"
        )
