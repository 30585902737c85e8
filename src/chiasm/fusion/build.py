"""Two loaded parts become one model whose visual tokens are as loud as the words are."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from chiasm.connectors import PACKAGED, Connector, connector_settings
from chiasm.connectors.trial import try_out
from chiasm.fusion.base import FusionModel
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.cross_attention_settings import cross_attention_settings
from chiasm.fusion.early import EarlyFusionModel
from chiasm.fusion.early_seq2seq import EarlySeq2SeqModel
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.fusion.packed import PackedFusionModel
from chiasm.fusion.tiled import TiledFusionModel
from chiasm.fusion.unified import UnifiedModel
from chiasm.language.adapter import (
    embedding_scale,
    head_is_direct,
    hidden_width,
    layers,
    require_causal,
    vocabulary,
)
from chiasm.vision.encoder import VisionEncoder
from chiasm.vision.packed import PACKED_TOWERS
from chiasm.vision.towers import CONVOLUTIONAL

FUSION_MODELS: dict[str, type[FusionModel]] = {
    "early": EarlyFusionModel,
    "intermediate": IntermediateFusionModel,
    "unified": UnifiedModel,
}
"""Where the modalities first meet → the generative model that meets there."""


def fusion_class(config: ChiasmConfig) -> type[FusionModel]:
    """The class of a configuration's model."""
    tower: Any = config.vision_config
    if config.fusion == "early" and tower.model_type in PACKED_TOWERS:
        if config.tiles is not None:
            raise ValueError(f"tiles are for encoders of one size, {tower.model_type!r} reads any; remove tiles")
        return PackedFusionModel
    if config.tiles is not None:
        return TiledFusionModel
    if config.is_encoder_decoder and config.fusion == "early":
        return EarlySeq2SeqModel
    if config.is_encoder_decoder:
        raise ValueError(f"fusion {config.fusion!r} takes no encoder-decoder language model; use fusion early")
    return FUSION_MODELS[config.fusion]


def build_fusion(
    vision: VisionEncoder,
    language: PreTrainedModel,
    connector: str | dict[str, Any],
    image_token_id: int,
    fusion: str = "early",
    patch_positions: str = "auto",
    seed: int = 0,
    cross_attention: dict[str, Any] | None = None,
    attention: str = "causal",
    regions: tuple[int, int] | None = None,
    tiles: Sequence[tuple[int, int]] | None = None,
    initialise: Callable[[Connector], None] | None = None,
) -> FusionModel:
    """A model around two loaded parts, whose new weights are drawn from `seed`, or given by `initialise`.

    The connector's output is scaled to the language model's embedding scale, measured on synthetic pictures.
    """
    packed = vision.model.config.model_type in PACKED_TOWERS
    for other, place in ((fusion != "early", f"fusion {fusion!r}"), (packed, "a vision encoder of packed patches")):
        if other:
            require_causal(language, place)
    if attention == "prefix":
        require_causal(language, "attention 'prefix'")
    if patch_positions == "auto":
        patch_positions = "grid" if vision.model.config.model_type in CONVOLUTIONAL else "none"
    samples = synthetic_features(vision)
    config = ChiasmConfig(
        vision_config=vision.model.config.to_dict(),
        text_config=language.config.to_dict(),
        fusion=fusion,
        connector=connector_settings(connector),
        features=vision.features.to_dict(),
        patch_positions=patch_positions,
        attention=attention,
        regions=None if regions is None else list(regions),
        tiles=tiles,
        feature_scale=root_mean_square(samples),
        image_token_id=image_token_id,
        direct_head=not language.config.is_encoder_decoder and head_is_direct(language),
        cross_attention=_cross_attention(fusion, cross_attention, language),
        fresh_connector=True,
        dtype=language.dtype,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fusion_class(config)(config, vision=vision, language=language)
    if initialise is not None:
        initialise(model.connector)
    model.connector.to(device=language.device, dtype=language.dtype)
    if config.connector["name"] not in PACKAGED:
        try_out(config.connector["name"], model.connector)
    scale_connector(model, samples)
    if isinstance(model, TiledFusionModel):
        model.image_newline.data *= embedding_scale(language) / root_mean_square(model.image_newline)
    if isinstance(model, IntermediateFusionModel):
        model.cross_attention.to(device=language.device, dtype=language.dtype)
        read_placeholder(model)
    if language.generation_config is not None:
        model.generation_config = language.generation_config
    return model.eval()


@torch.no_grad()
def scale_connector(model: FusionModel, features: Float[Tensor, "images N D_v"]) -> None:
    """Scales the connector's last layer so that visual tokens have the root mean square of token embeddings."""
    output = model.connector.output
    if output is None:
        return
    if output.bias is not None:
        output.bias.zero_()
    loudness = root_mean_square(model.connect_features(features.to(output.weight.device)))
    output.weight.mul_(embedding_scale(model.language) / loudness)


@torch.no_grad()
def read_placeholder(model: IntermediateFusionModel) -> None:
    """`<image>` starts as its own row of the embedding table, or as the mean word where the table has no such row."""
    own, token = model.cross_attention.image_embedding, model.config.image_token_id
    if own is not None:
        words = [token] if token < vocabulary(model.language) else range(min(vocabulary(model.language), 4096))
        own.copy_(model.get_input_embeddings()(torch.tensor(list(words), device=own.device)).mean(dim=0))


def _cross_attention(fusion: str, wanted: dict[str, Any] | None, language: PreTrainedModel) -> dict[str, Any] | None:
    if fusion == "intermediate":
        return asdict(cross_attention_settings(wanted, len(layers(language)), hidden_width(language)))
    if wanted is not None:
        raise ValueError(f"cross_attention= is for fusion='intermediate', got fusion={fusion!r}")
    return None


@torch.no_grad()
def synthetic_features(vision: VisionEncoder, count: int = 4) -> Float[Tensor, "images N D_v"]:
    """Patch features of smooth random colour fields, whose statistics resemble those of normalised photographs."""
    generator = torch.Generator().manual_seed(0)
    height, width = vision.image_size
    coarse = torch.randn(count, 3, 7, 7, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    first = next(vision.parameters())
    was_training = vision.training
    features = vision.eval()(pictures.to(first.device, first.dtype))
    vision.train(was_training)
    return features


def root_mean_square(values: Tensor) -> float:
    return values.float().pow(2).mean().sqrt().item()
