"""A CLIP or SigLIP encoder and its projector → the `mmproj` GGUF file of llama.cpp's multimodal part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor

from chiasm.connectors.ldp import LightweightDownsampleProjector
from chiasm.connectors.linear import LinearProjector
from chiasm.connectors.mlp import MLPProjector
from chiasm.connectors.pixel_shuffle import PixelShuffleProjector
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.gguf_language import add_tensor
from chiasm.interop.export.parts import require
from chiasm.interop.idefics3 import positions
from chiasm.vision.encoder import MASKED
from chiasm.vision.probe import pair

TOWERS = {
    "clip_vision_model": "quick_gelu",
    "siglip_vision_model": "gelu_pytorch_tanh",
    "idefics3_vision": "gelu_pytorch_tanh",
    "smolvlm_vision": "gelu_pytorch_tanh",
}
"""Encoders that llama.cpp builds → the activation that they have where their configuration names none."""

ACTIVATIONS: dict[str, str | None] = {
    "quick_gelu": None,
    "gelu": "use_gelu",
    "gelu_pytorch_tanh": "use_gelu",
    "gelu_new": "use_gelu",
    "silu": "use_silu",
}
"""Activation → the switch for it; GELU is llama.cpp's approximation by tanh."""

GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new")
LDP_GRID = (24, 24)
"""The only grid of patches that llama.cpp's LDPv2 takes."""

CLASS_TOKEN = ("clip_vision_model",)
"""Encoders with a class token. llama.cpp puts it behind the patches, but counts positions and patches as if it stood in
front of them (its issue 25814), so that no arrangement of the weights gives every patch: the first one is not read."""

ELSEWHERE = "convert --to transformers for vLLM, or --to onnx"


def depth(model: FusionModel) -> int:
    """Layers of the encoder that run: llama.cpp reads the last of them.

    Raises:
        ValueError: the features are not one hidden state's patches.
    """
    tower, features = model.vision.model.config, model.vision.features
    require(
        tower.model_type in TOWERS and getattr(tower, "hidden_act", None) in ACTIVATIONS,
        f"llama.cpp's projector types read CLIP and SigLIP, this encoder is of type {tower.model_type!r}",
        f"connect one of {', '.join(TOWERS)}; or {ELSEWHERE}",
    )
    height, width = features.image_size
    fits = len(features.layers) == 1 and features.num_prefix == 0 and height == width
    require(
        fits and not features.interpolate_positions and features.layers[0].grid == features.grid,
        "llama.cpp reads the patches of one hidden state of a square picture, this model reads more or less",
        f"connect with features={{'layers': [-2]}} and a square image_size, or {ELSEWHERE}",
    )
    require(
        tower.model_type not in MASKED or positions(features.grid[0]) == list(range(features.grid[0])),
        f"this {tower.model_type!r} encoder gives some of {features.grid[0]} patches a side their neighbours' "
        "positions, by a rounding that llama.cpp does not have",
        ELSEWHERE,
    )
    layer = features.layers[0].layer
    count = tower.num_hidden_layers
    return count if layer == "last" else range(count + 1)[int(layer)]


def projector(model: FusionModel) -> tuple[str, dict[str, Tensor]]:
    """llama.cpp's name of a connector, and its tensors.

    Raises:
        ValueError: it knows no such projector.
    """
    options = model.config.connector
    known = PROJECTORS.get(options["name"])
    if known is not None and known.fits(model.connector, options):
        return known.name, known.tensors(model.connector)
    shown = ", ".join(f"{name}={value!r}" for name, value in options.items()) if known else repr(options["name"])
    other = ELSEWHERE if known else "convert --to onnx"
    holds = "; ".join(f"{name}: {one.holds}" for name, one in PROJECTORS.items())
    raise ValueError(
        f"llama.cpp has no projector for connector {shown}; connect with one of those that it has ({holds}), or {other}"
    )


def _layer(name: str, layer: Any) -> dict[str, Tensor]:
    weight = layer.weight
    bias = layer.bias if layer.bias is not None else torch.zeros(weight.shape[0], device=weight.device)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _linear(connector: LinearProjector) -> dict[str, Tensor]:
    """A matrix as an MLP: GELU(x) − GELU(−x) = x, so twice as many inner units pass x through."""
    assert connector.proj is not None
    weight = connector.proj.weight.float()
    bias = connector.proj.bias.float() if connector.proj.bias is not None else torch.zeros_like(weight[:, 0])
    unit = torch.eye(len(weight), device=weight.device)
    return {
        "mm.0.weight": torch.cat([weight, -weight]),
        "mm.0.bias": torch.zeros(2 * len(weight), device=weight.device),
        "mm.2.weight": torch.cat([unit, -unit], dim=1),
        "mm.2.bias": bias,
    }


def _mlp(connector: MLPProjector) -> dict[str, Tensor]:
    return _layer("mm.0", connector.layers[0]) | _layer("mm.2", connector.layers[1])


def _ldp(connector: LightweightDownsampleProjector) -> dict[str, Tensor]:
    mlp = _layer("mm.model.mlp.0", connector.up) | _layer("mm.model.mlp.2", connector.out)
    return mlp | _layer("mm.model.peg.0", connector.peg)


def _shuffle(connector: PixelShuffleProjector) -> dict[str, Tensor]:
    return {"mm.model.fc.weight": connector.layers[0].weight}


@dataclass(frozen=True)
class Projector:
    """A projector type of llama.cpp.

    Args:
        name: there.
        holds: what it computes.
        fits: whether that is what a connector with its settings computes.
        tensors: the connector's weights by llama.cpp's names.
    """

    name: str
    holds: str
    fits: Callable[[Any, dict[str, Any]], bool]
    tensors: Callable[[Any], dict[str, Tensor]]


PROJECTORS = {
    "mlp": Projector(
        "mlp", "2 layers with GELU", lambda mlp, told: len(mlp.layers) == 2 and told["activation"] in GELUS, _mlp
    ),
    "linear": Projector("mlp", "one layer", lambda linear, _: linear.proj is not None, _linear),
    "ldp": Projector("ldpv2", "24×24 patches", lambda ldp, _: ldp.grid == LDP_GRID, _ldp),
    "pixel_shuffle": Projector(
        "idefics3",
        "a model from Idefics3 or SmolVLM, in tiles",
        lambda shuffle, _: len(shuffle.layers) == 1,
        _shuffle,
    ),
}
"""Connector → the projector that it becomes."""


def write_vision(writer: GGUFWriter, model: FusionModel, images: Any, quantization: str, longest: int | None) -> None:
    """Writes hyperparameters and tensors of the encoder and the projector.

    Args:
        longest: pixels of the side to which a picture is scaled before it is cut into tiles; None where none is cut.
    """
    kind, tensors = projector(model)
    layers, tower = depth(model), model.vision.model.config
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(kind)
    writer.add_vision_projection_dim(model.connector.language_width)
    if isinstance(model.connector, PixelShuffleProjector):
        writer.add_vision_projector_scale_factor(model.connector.factor)
    if longest is not None:
        writer.add_vision_preproc_image_size(longest)
    writer.add_vision_image_size(model.vision.image_size[0])
    writer.add_vision_patch_size(pair(tower.patch_size)[0])
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    mean, std = normalisation(images)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    writer.add_array("clip.vision.feature_layer", [layers])
    if (switch := ACTIVATIONS[tower.hidden_act]) is not None:
        getattr(writer, f"add_vision_{switch}")(True)
    names = gguf.get_tensor_name_map(MODEL_ARCH.MMPROJ, layers)
    normalised = model.vision.features.layers[0].layer == "last" and tower.model_type not in CLASS_TOKEN
    for name, tensor in model.vision.model.state_dict().items():
        if not _runs(name, layers, normalised):
            continue
        theirs = names.get_name(f"vision_tower.vision_model.{name}", try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"llama.cpp's vision part has no place for weight {name!r}; {ELSEWHERE}")
        add_tensor(writer, theirs, tensor, "f32" if "embeddings." in name else quantization)
    for name, tensor in tensors.items():
        add_tensor(writer, name, tensor, quantization)


def normalisation(images: Any) -> tuple[list[float], list[float]]:
    """Means and deviations of values from 0 to 1, all that llama.cpp knows: another scale of pixels, or none, and no
    normalisation are in them."""
    scale = 255 * (images.rescale_factor if images.do_rescale else 1.0)
    mean, std = (images.image_mean, images.image_std) if images.do_normalize else ([0.0] * 3, [1.0] * 3)
    return [value / scale for value in mean], [value / scale for value in std]


def _runs(name: str, layers: int, normalised: bool) -> bool:
    """Whether a weight of the encoder is used for its features."""
    parts = name.split(".")
    if parts[:2] == ["encoder", "layers"]:
        return int(parts[2]) < layers
    if parts[0] == "post_layernorm":
        return normalised
    return parts[0] != "head" and parts[-1] != "position_ids"
