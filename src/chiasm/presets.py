"""Known systems by name: what each takes between its vision encoder and its language model, and how it was trained."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What `chiasm.connect` takes where its caller says nothing.

    Args:
        connector: name, or name and options.
        fusion: where the two meet.
        features: which layers of a ViT are read; a convolutional encoder keeps its own default.
        resize_mode: how pictures get the encoder's size; None is the encoder's own way.
        recipe: name of the recipe that trains it.
        paper: arXiv id.
    """

    connector: str | dict[str, Any] = "mlp"
    fusion: str = "early"
    features: dict[str, Any] | None = None
    resize_mode: str | None = None
    recipe: str = "llava"
    paper: str = ""


BEFORE_LAST = {"layers": [-2]}
ALL_TOKENS = {"layers": ["last"], "prefix": "keep"}
"""The class token too, after the encoder's last norm: what BLIP-2's cross-attention reads in its checkpoints."""

PRESETS: dict[str, Preset] = {
    "llava": Preset("linear", "early", BEFORE_LAST, "crop", "llava", "2304.08485"),
    "llava-1.5": Preset("mlp", "early", BEFORE_LAST, "pad", "llava", "2310.03744"),
    "blip-2": Preset({"name": "qformer", "num_queries": 32}, "early", ALL_TOKENS, "squash", "blip2", "2301.12597"),
    "instructblip": Preset(
        {"name": "qformer", "num_queries": 32, "instruction": True},
        "early",
        ALL_TOKENS,
        "squash",
        "blip2",
        "2305.06500",
    ),
    "flamingo": Preset(
        {"name": "perceiver_resampler", "project": False}, "intermediate", None, "pad", "flamingo", "2204.14198"
    ),
    "clip": Preset({"name": "linear", "space": 512}, "late", recipe="clip", paper="2103.00020"),
    "siglip": Preset(
        {"name": "linear", "space": 512, "bias": True, "logit_scale": 2.302585, "logit_bias": -10.0},
        "late",
        recipe="siglip",
        paper="2303.15343",
    ),
    "internvl": Preset("pixel_shuffle", "early", {"layers": ["last"]}, "squash", "internvl", "2404.16821"),
}


def preset_named(name: str | None) -> Preset:
    """The preset of that name; without a name, Chiasm's own defaults.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name is None:
        return Preset()
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
