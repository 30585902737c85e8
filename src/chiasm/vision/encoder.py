"""Any transformers vision model as a function from pictures to patch features.

There is no class per family: which layer is read, how many tokens are not patches, the grid and the width are found by
`chiasm.vision.probe` and travel with the checkpoint as `VisionFeatures`.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from chiasm.sources.errors import readable_weights
from chiasm.vision.compiling import Note, compiled
from chiasm.vision.efficientnet_lite import EfficientNetLiteModel
from chiasm.vision.fast_inference import fast_inference
from chiasm.vision.features import FeatureLayer, Grid, VisionFeatures
from chiasm.vision.probe import default_image_size, describe, find, pair, trace, twin
from chiasm.vision.towers import (
    CONVOLUTIONAL,
    build_tower,
    check_inputs,
    load_tower,
    picture_inputs,
    take_tower,
    takes,
)

__all__ = ["FastEncoder", "FeatureLayer", "VisionEncoder", "VisionFeatures", "load_vision"]

DEFAULT_LAYERS: dict[str, tuple[int | str, ...]] = {
    "clip_vision_model": (-2,),
    "efficientnet_lite": ("stage5", "head"),
}
"""Model type → layers that are read where none are named; every other encoder gives its last hidden state."""

POOLING_HEADS = ("aimv2_vision_model", "siglip2_vision_model", "siglip_vision_model")
"""Model types with an attention-pooling head that their attribute `use_head` switches."""

FEATURE_OPTIONS = ("layers", "reduce", "grid", "prefix", "resolution")

LARGEST_SIDE = 4096
"""Pixels of a side that may be asked for; the features of more are beyond any machine's memory."""

NATIVE = ("idefics2_vision",)
"""Model types that take pictures of any size, with a mask of their patches."""

MASKED = ("idefics3_vision", "smolvlm_vision")
"""Model types that take a mask of their patches with pictures of one size."""


class VisionEncoder(nn.Module):
    """A vision model and the features that are read from it. Every parameter lives under `.model`."""

    def __init__(self, model: PreTrainedModel, features: VisionFeatures) -> None:
        super().__init__()
        self.model = model
        self.features = features
        if model.config.model_type in CONVOLUTIONAL:
            model._supports_sdpa = model._supports_flash_attn = model._supports_flex_attn = True
        # What transformers collects from the children of a composite model.
        self._no_split_modules = model._no_split_modules
        self._keep_in_fp32_modules = model._keep_in_fp32_modules
        self._keep_in_fp32_modules_strict = model._keep_in_fp32_modules_strict

    @classmethod
    def from_config(cls, vision_config: PreTrainedConfig, features: VisionFeatures) -> "VisionEncoder":
        """An encoder with fresh weights; no picture is run, so it can be built on the meta device."""
        return cls(build_tower(vision_config), features)

    @property
    def grid(self) -> Grid:
        """Patches of a picture, (rows, columns)."""
        return self.features.grid

    @property
    def num_patches(self) -> int:
        """N: patches of a picture, row by row, and the prefix tokens that are kept in front of them."""
        return self.num_prefix + self.features.grid[0] * self.features.grid[1]

    @property
    def num_prefix(self) -> int:
        """Class and register tokens that are kept in front of the patches."""
        return self.features.num_prefix

    @property
    def width(self) -> int:
        """D_v: channels of one patch."""
        return self.features.width

    @property
    def image_size(self) -> Grid:
        """Pictures that the encoder takes, (height, width) in pixels."""
        return self.features.image_size

    def forward(
        self, pixel_values: Float[Tensor, "B 3 height width"], pixel_attention_mask: Tensor | None = None
    ) -> Float[Tensor, "B N D_v"]:
        """Patch features of normalised pictures, row by row; class and register tokens are left out or come first.

        Args:
            pixel_attention_mask: `(B, height, width)`, what is picture, where pictures of several sizes are padded.

        Raises:
            ValueError: the pictures do not have `image_size`, and this encoder does not take them as they are.
        """
        self._check_size(pixel_values)
        patches = self.patch_mask(pixel_attention_mask)
        inputs = picture_inputs(self.model.config, pixel_values.to(self.model.dtype), patches)
        return self._read(self.model(**inputs, **self._options()))

    def patch_mask(self, pixel_attention_mask: Tensor | None) -> Bool[Tensor, "B rows columns"] | None:
        """Patches that are all picture, where pictures of several sizes are padded; for `MASKED`, partly picture."""
        if pixel_attention_mask is None:
            return None
        if self.model.config.model_type in MASKED:
            return F.max_pool2d(pixel_attention_mask.float()[:, None], self.model.config.patch_size)[:, 0] > 0
        if self.features.resolution != "native":
            raise ValueError(
                f"pixel_attention_mask is for encoders with resolution: native, this one takes "
                f"{self.image_size[0]}×{self.image_size[1]}; leave it out"
            )
        padding = 1.0 - pixel_attention_mask.float()[:, None]
        return F.max_pool2d(padding, self.model.config.patch_size)[:, 0] == 0

    def unused_parameters(self) -> list[str]:
        """Names of parameters that the patch features do not depend on, such as a pooling head or a last layer that is
        not read. They never get a gradient: distributed training must not wait for one."""

        def run(model: PreTrainedModel, device: torch.device) -> Tensor:
            blank = torch.zeros(2, 3, *self.image_size, device=device, dtype=model.dtype)
            with torch.enable_grad():
                return self._read(model(**picture_inputs(model.config, blank), **self._options()))

        patches, weights = trace(self.model, run)
        differentiable = {name: weight for name, weight in weights.items() if weight.requires_grad}
        gradients = torch.autograd.grad(patches.float().sum(), list(differentiable.values()), allow_unused=True)
        used = {name for name, gradient in zip(differentiable, gradients, strict=True) if gradient is not None}
        return [f"model.{name}" for name in weights if name not in used]

    def fast_encoder(
        self, dtype: torch.dtype | None = None, compile: bool = False, note: Note | None = None
    ) -> "FastEncoder":
        """The same function for inference only, as fast as this machine allows: what fills a feature cache.

        Args:
            dtype: precision of the arithmetic and of the features; by default bfloat16, if the hardware multiplies it
                and this encoder's features stay within 1% of what they are without it.
            compile: whether to compile the model, which costs up to a minute and needs a C++ compiler on a CPU; where
                that fails, it stays uncompiled.
            note: told in one line where it failed; by default a warning says it.
        """
        if dtype is not None or self.model.dtype != torch.float32 or not _multiplies_bfloat16(self.model.device):
            return FastEncoder(self, dtype or self.model.dtype, compile, note)
        exact, fast = (FastEncoder(self, one) for one in (torch.float32, torch.bfloat16))
        noise = torch.randn(1, 3, *self.image_size, generator=torch.Generator().manual_seed(0))
        expected = exact(noise).float()
        close = torch.linalg.norm(fast(noise).float() - expected) <= 0.0075 * expected.norm()
        fastest = fast if close else exact
        return FastEncoder(self, fastest.dtype, True, note) if compile else fastest

    def _check_size(self, pixel_values: Tensor) -> None:
        if self.features.resolution == "fixed" and tuple(pixel_values.shape[-2:]) != self.image_size:
            raise ValueError(
                f"pictures are {pixel_values.shape[-2]}×{pixel_values.shape[-1]}, the encoder takes "
                f"{self.image_size[0]}×{self.image_size[1]}; resize them with its image processor"
            )

    def _options(self) -> dict[str, Any]:
        indices = sorted({layer.layer for layer in self.features.layers if isinstance(layer.layer, int)})
        options: dict[str, Any] = {"output_hidden_states": indices} if indices else {}
        if self.features.interpolate_positions:
            options["interpolate_pos_encoding"] = True
        return options

    def _read(self, outputs: Any) -> Float[Tensor, "B N D_v"]:
        return self.features.combine([find(outputs, layer.layer)[1] for layer in self.features.layers])


class FastEncoder:
    """An encoder's function without gradients, in the fastest precision; shares the encoder's weights."""

    def __init__(
        self, encoder: VisionEncoder, dtype: torch.dtype, compile: bool = False, note: Note | None = None
    ) -> None:
        self.encoder = VisionEncoder(_without_idle_parts(twin(encoder.model), encoder.features), encoder.features)
        self.dtype = dtype
        self.run: Callable[..., Any] = self.encoder.model
        if isinstance(encoder.model, EfficientNetLiteModel):
            maps = ["head" if layer.layer == "last" else str(layer.layer) for layer in encoder.features.layers]
            self.run = fast_inference(encoder.model, dtype, compile, maps, note)
        elif compile:
            self.run = compiled(self.run, note)

    @torch.no_grad()
    def __call__(self, pixel_values: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B N D_v"]:
        """Patch features in this encoder's precision."""
        self.encoder._check_size(pixel_values)
        model = self.encoder.model
        inputs = picture_inputs(model.config, pixel_values.to(model.device, model.dtype))
        with torch.autocast(model.device.type, self.dtype, enabled=self.dtype.itemsize < model.dtype.itemsize):
            outputs = self.run(**inputs, **self.encoder._options())
        return self.encoder._read(outputs).to(self.dtype)


def load_vision(
    source: str | os.PathLike | PreTrainedModel,
    features: dict[str, Any] | None = None,
    image_size: int | Grid | None = None,
    dtype: torch.dtype | str = "auto",
    **options: Any,
) -> VisionEncoder:
    """A vision encoder from a folder, a hub id or a loaded model; the latter is taken over and loses its heads.

    Args:
        source: of an image-text model (CLIP, SigLIP, ...) the vision tower alone is taken.
        features: what to read. `layers`: a list of `"last"`, indices of hidden_states and names of feature_maps, by
            default `DEFAULT_LAYERS`; `reduce`: `fold` or `pool`, one word or one per layer; `grid`: (rows, columns) of
            the result, by default the coarsest of the layers' grids; `prefix`: `drop` (the default) or `keep` the class
            and register tokens; `resolution`: `fixed` (the default) or `native`, where the encoder takes any size.
        image_size: pixels, where it differs from the pre-training's; learned positions are then interpolated.
        dtype: of the weights; `auto` keeps the checkpoint's own.
        **options: for `from_pretrained`, such as attn_implementation, revision and token.

    Raises:
        ValueError: the encoder or an option does not fit; the message names the value and the choices.
    """
    if isinstance(source, PreTrainedModel):
        if options:
            raise ValueError(f"{next(iter(options))!r} is an option for loading, but a loaded model was given")
        model = take_tower(source)
        if isinstance(dtype, torch.dtype):
            model.to(dtype)
        missing: set[str] = set()
    else:
        with readable_weights(source):
            model, missing = load_tower(str(source), dtype, **options)
    encoder = VisionEncoder(model, _measure(model, features or {}, image_size))
    if missing and (lacking := sorted({f"model.{name}" for name in missing} - set(encoder.unused_parameters()))):
        raise ValueError(f"{source} lacks {len(lacking)} weights of its vision model, such as {lacking[0]!r}")
    return encoder


def _measure(model: PreTrainedModel, wanted: dict[str, Any], image_size: int | Grid | None) -> VisionFeatures:
    """The features that a model has, found by running it on pictures without data."""
    if unknown := sorted(set(wanted) - set(FEATURE_OPTIONS)):
        raise ValueError(f"features has an unknown key {unknown[0]!r}; known keys: {', '.join(FEATURE_OPTIONS)}")
    native = default_image_size(model.config)
    size = native if image_size is None else pair(image_size, "image_size")
    if max(size) > LARGEST_SIDE:
        raise ValueError(f"image_size is {image_size!r}, expected at most {LARGEST_SIDE} pixels a side")
    layers = wanted.get("layers") or DEFAULT_LAYERS.get(model.config.model_type, ("last",))
    if not isinstance(layers, list | tuple) or not all(type(layer) in (int, str) for layer in layers):
        raise ValueError(f"layers is {layers!r}, expected a list of 'last', indices and names of feature maps")
    reduce = wanted.get("reduce") or "fold"
    if not isinstance(reduce, str | list | tuple):
        raise ValueError(f"reduce is {reduce!r}, expected a word or a list of words, one per layer")
    reduce = (reduce,) * len(layers) if isinstance(reduce, str) else tuple(reduce)
    if len(reduce) != len(layers):
        raise ValueError(f"reduce has {len(reduce)} entries for {len(layers)} layers; give one word or one per layer")
    grid = pair(wanted["grid"], "grid") if wanted.get("grid") else None
    check_inputs(model, size)
    options = {"interpolate_pos_encoding": True} if size != native and takes(model, "interpolate_pos_encoding") else {}

    def run(model: PreTrainedModel, device: torch.device) -> Any:
        blank = torch.zeros(2, 3, *size, device=device, dtype=model.dtype)
        with torch.no_grad():
            return model(**picture_inputs(model.config, blank), **options, output_hidden_states=True)

    try:
        outputs, _ = trace(model, run)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the {model.config.model_type} encoder does not take pictures of {size[0]}×{size[1]} pixels: {error}"
        ) from error
    found = describe(outputs, model.config, tuple(layers), reduce, size, grid, bool(options))
    if wanted.get("resolution") == "native" and model.config.model_type not in NATIVE:
        raise ValueError(
            f"a {model.config.model_type} encoder has no resolution 'native', which these have: {', '.join(NATIVE)}"
        )
    return replace(found, prefix=wanted.get("prefix") or "drop", resolution=wanted.get("resolution") or "fixed")


def _without_idle_parts(model: PreTrainedModel, features: VisionFeatures) -> PreTrainedModel:
    """A model that no longer computes what its patch features do not need; for a copy whose weights are not saved."""
    if model.config.model_type in POOLING_HEADS:
        model.use_head = False
    indices = [layer.layer for layer in features.layers if isinstance(layer.layer, int)]
    if model.config.model_type == "clip_vision_model" and len(indices) == len(features.layers):
        model.encoder.layers = model.encoder.layers[: max(*indices, 1)]
    return model


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
