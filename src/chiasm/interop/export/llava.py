"""Early fusion with an MLP or a linear projector → LLaVA checkpoints of transformers (arXiv 2310.03744)."""

import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedConfig

from chiasm.connectors.linear import LinearProjector
from chiasm.connectors.mlp import MLPProjector
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.parts import Exported, filled, headed, require, require_plain, text_settings
from chiasm.interop.export.pictures import published_images
from chiasm.interop.export.prompts import portable_template, portable_tokenizer
from chiasm.interop.llava import table
from chiasm.vision.encoder import VisionEncoder
from chiasm.vision.probe import pair, twin

FIT = (
    "it reads hidden states by their numbers, all tokens or all but the first: connect with features={'layers': [-2]} "
    "and a square image_size, or convert --to onnx"
)


@dataclass(frozen=True)
class Reading:
    """What LLaVA reads of its tower."""

    layers: int | list[int]
    strategy: str
    vision_config: PreTrainedConfig


def export_llava(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model and processor as transformers' LLaVA.

    Raises:
        ValueError: LLaVA cannot hold it; the message says why and what would fit.
    """
    require_plain(model, "LLaVA")
    activation, projector = as_projector(model)
    reading = find_reading(model.vision)
    config = LlavaConfig(
        vision_config=reading.vision_config,
        image_token_index=model.config.image_token_id,
        image_seq_length=model.num_image_tokens,
        projector_hidden_act=activation,
        multimodal_projector_bias="connector.layers.0.bias" in projector,
        vision_feature_layer=reading.layers,
        vision_feature_select_strategy=reading.strategy,
        **text_settings(model),
    )
    ours = {name: tensor for name, tensor in headed(model).items() if not name.startswith("connector.")}
    llava = filled(LlavaForConditionalGeneration, config, model, table(config), ours | projector)
    return Exported(llava, None if processor is None else _processor(model, processor, reading))


def as_projector(model: FusionModel) -> tuple[str, dict[str, Tensor]]:
    """The activation and the weights of LLaVA's projector, which has two layers of the language model's width.

    A narrower inner layer is filled up with zeros; a linear projector gets no activation and the identity behind it.
    """
    connector: Any = model.connector
    if isinstance(connector, LinearProjector):
        assert connector.proj is not None
        weight, bias = connector.proj.weight.detach(), connector.proj.bias
        layers = {"0.weight": weight, "1.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
        if bias is not None:
            layers |= {"0.bias": bias.detach(), "1.bias": torch.zeros_like(bias)}
        return "linear", _named(layers)
    require(
        isinstance(connector, MLPProjector) and len(connector.layers) == 2,
        f"this mlp has depth {len(connector.layers)}, LLaVA's projector has 2",
        "connect with {'name': 'mlp', 'depth': 2}",
    )
    first, last = connector.layers
    spare = connector.language_width - first.out_features
    require(
        spare >= 0,
        f"this mlp has an inner width of {first.out_features}, LLaVA's projector that of the language model, "
        f"{connector.language_width}",
        f"connect with a width of at most {connector.language_width}",
    )
    layers = {"0.weight": F.pad(first.weight.detach(), (0, 0, 0, spare)), "1.weight": F.pad(last.weight, (0, spare))}
    if first.bias is not None:
        layers |= {"0.bias": F.pad(first.bias.detach(), (0, spare)), "1.bias": last.bias.detach()}
    return model.config.connector["activation"], _named(layers)


def find_reading(vision: VisionEncoder) -> Reading:
    """What makes LLaVA read the same features, found out by running the tower on noise.

    The last hidden state of SigLIP and its like is normalised, LLaVA's last one is not: a setting of the tower makes
    them one.

    Raises:
        ValueError: nothing does.
    """
    config, features = vision.model.config, vision.features
    require(
        config.model_type != "siglip2_vision_model" and features.resolution == "fixed",
        f"a {config.model_type!r} encoder takes more than pictures of one size",
        "take one with a fixed resolution, such as clip_vision_model or siglip_vision_model",
    )
    require(all(layer.layer == "last" or isinstance(layer.layer, int) for layer in features.layers), _told(vision), FIT)
    noise = torch.randn(1, 3, *features.image_size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(vision.model.device, vision.model.dtype)
    layers = [-1 if layer.layer == "last" else int(layer.layer) for layer in features.layers]
    with torch.no_grad():
        wanted = vision(noise)
        for strategy, tied in product(("default", "full"), (None, True)):
            found = _read(vision, noise, layers, strategy, tied)
            if found is not None and found.shape == wanted.shape and torch.equal(found, wanted):
                config = copy.deepcopy(config)
                if tied:
                    config.tie_last_hidden_states = True
                return Reading(layers[0] if len(layers) == 1 else layers, strategy, config)
    raise ValueError(f"{_told(vision)}; {FIT}")


def _read(vision: VisionEncoder, noise: Tensor, layers: list[int], strategy: str, tied: bool | None) -> Tensor | None:
    """What LLaVA would read of this tower; None where it cannot."""
    tower = twin(vision.model)
    if tied:
        tower.config.tie_last_hidden_states = True
    try:
        states = tower(noise, output_hidden_states=True, return_dict=True).hidden_states
        chosen = [states[layer] for layer in layers]
        if any(state.ndim != 3 for state in chosen):
            return None
        return torch.cat([state[:, 1:] if strategy == "default" else state for state in chosen], dim=-1)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


def _named(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"connector.layers.{name}": tensor.detach() for name, tensor in layers.items()}


def _told(vision: VisionEncoder) -> str:
    layers = ", ".join(str(layer.layer) for layer in vision.features.layers)
    return f"LLaVA cannot read the features of this {vision.model.config.model_type!r} encoder (layers {layers})"


def _processor(model: FusionModel, processor: ChiasmProcessor, reading: Reading) -> LlavaProcessor:
    """The processor that counts as many placeholders as the model has visual tokens."""
    patch = pair(getattr(reading.vision_config, "patch_size", 0), "patch_size")[0]
    height, width = model.vision.image_size
    cells = (height // patch) * (width // patch) if patch else 0
    more = model.num_image_tokens - cells + (reading.strategy == "default")
    require(cells > 0 and more >= 0, _told(model.vision), FIT)
    return LlavaProcessor(
        published_images(processor.image_processor),
        portable_tokenizer(processor),
        patch_size=patch,
        vision_feature_select_strategy=reading.strategy,
        chat_template=portable_template(processor),
        image_token=processor.image_token,
        num_additional_image_tokens=more,
    )
