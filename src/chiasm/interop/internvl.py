"""InternVL checkpoints of transformers → early fusion with pixel shuffle, with equal logits (arXiv 2404.16821)."""

import torch
from transformers import AutoConfig, InternVLConfig

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop.parts import describe_features, finish, language_table, require_direct_head, text_settings
from chiasm.interop.weights import Table, assemble, read_weights
from chiasm.vision.features import VisionFeatures

PARTS = {
    "vision_tower": "vision.model",
    "multi_modal_projector.layer_norm": "connector.layers.0",
    "multi_modal_projector.linear_1": "connector.layers.1",
    "multi_modal_projector.linear_2": "connector.layers.3",
}
"""Names up to v4.51; later ones have `model.` in front, and the language model without its own prefix and head."""


def load_internvl(source: str, dtype: torch.dtype | str = "auto") -> tuple[EarlyFusionModel, ChiasmProcessor | None]:
    """Model of an InternVL folder or hub id, a tile of a picture being a picture of its own.

    There is no processor: InternVL's own, `transformers.AutoProcessor`, cuts the tiles and frames their placeholders.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    config = AutoConfig.from_pretrained(source)
    model = assemble(EarlyFusionModel, chiasm_config(config), read_weights(source), table(config), dtype=dtype)
    finish(model, source)
    require_direct_head(model)
    return model, None


def chiasm_config(config: InternVLConfig) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words."""
    if config.projector_hidden_act != "gelu":
        raise ValueError(
            f"this InternVL has projector_hidden_act={config.projector_hidden_act!r}, expected 'gelu', "
            "which is what pixel_shuffle has"
        )
    return ChiasmConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=text_settings(config),
        connector={"name": "pixel_shuffle", "factor": int(1 / config.downsample_ratio), "projection": "mlp"},
        features=features(config).to_dict(),
        image_token_id=config.image_token_id,
        dtype=config.dtype,
    )


def features(config: InternVLConfig) -> VisionFeatures:
    """What InternVL reads of its tower: one layer, without the class token."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int) or config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"this InternVL reads vision_feature_layer={layer}, vision_feature_select_strategy="
            f"{config.vision_feature_select_strategy!r}; expected one layer and 'default', for blocks need a grid"
        )
    return describe_features(config.vision_config, {"layers": ["last" if layer == -1 else layer]})


def table(config: InternVLConfig) -> Table:
    """InternVL's names → ours, for files of any version."""
    new = {f"model.{theirs}": ours for theirs, ours in PARTS.items()}
    return {**PARTS, **new, "language_model": "language"} | language_table(
        config.text_config, "model.language_model", "lm_head"
    )
