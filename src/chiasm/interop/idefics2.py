"""Idefics2 checkpoints of transformers → early fusion with a resampler of pictures of any size (arXiv 2405.02246)."""

import torch
from transformers import Idefics2Config
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig

from chiasm.data.chat import IMAGE_TOKEN
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop.parts import (
    language_table,
    load_headed,
    load_processor,
    text_settings,
)
from chiasm.interop.weights import Table
from chiasm.vision.features import FeatureLayer, VisionFeatures
from chiasm.vision.probe import pair

BOUNDARY, END_OF_UTTERANCE = "<fake_token_around_image>", "<end_of_utterance>"
TILES = 5
"""Four quarters and the whole, where pictures are split."""

PARTS = {
    "model.vision_model": "vision.model",
    "model.connector.modality_projection.gate_proj": "connector.modality_projection.gate",
    "model.connector.modality_projection.up_proj": "connector.modality_projection.up",
    "model.connector.modality_projection.down_proj": "connector.modality_projection.down",
    "model.connector.perceiver_resampler": "connector",
}
LAYER = {
    "input_latents_norm": "latent_norm",
    "input_context_norm": "patch_norm",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
"""Names inside one layer of the resampler."""


def load_idefics2(source: str, dtype: torch.dtype | str = "auto") -> tuple[EarlyFusionModel, ChiasmProcessor | None]:
    """Model and processor of an Idefics2 folder or hub id; no processor where its files are missing.

    Raises:
        ValueError: a setting or a weight is of a kind that Chiasm does not have; the message names it.
    """
    model = load_headed(source, chiasm_config, table, dtype)
    processor = load_processor(
        source, model, own_images=True, add_special_tokens=True, image_boundary=BOUNDARY, image_space=True
    )
    if processor is not None:
        processor.tokenizer.add_tokens([BOUNDARY, IMAGE_TOKEN, END_OF_UTTERANCE], special_tokens=True)
        processor.image_tiles = TILES if processor.image_processor.do_image_splitting else 1
    return model, processor


def chiasm_config(config: Idefics2Config) -> ChiasmConfig:
    """The configuration of the same model in Chiasm's words."""
    perceiver, text = config.perceiver_config, config.text_config
    for name, settings in (("perceiver_config", perceiver), ("text_config", text)):
        if settings.hidden_act != "silu":
            raise ValueError(f"{name}.hidden_act is {settings.hidden_act!r}; connector idefics2_resampler has 'silu'")
    return ChiasmConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=text_settings(config),
        connector={
            "name": "idefics2_resampler",
            "num_latents": perceiver.resampler_n_latents,
            "depth": perceiver.resampler_depth,
            "heads": perceiver.resampler_n_heads,
            "key_value_heads": perceiver.num_key_value_heads,
            "head_dim": perceiver.resampler_head_dim,
            "projection_width": text.intermediate_size,
            "eps": perceiver.rms_norm_eps,
        },
        features=features(config.vision_config).to_dict(),
        image_token_id=config.image_token_id,
        dtype=config.dtype,
    )


def features(vision: Idefics2VisionConfig) -> VisionFeatures:
    """The tower's normalised output. Its forward looks at the values of a mask, so it cannot be probed without data."""
    size, patch = pair(vision.image_size), pair(vision.patch_size)
    grid = (size[0] // patch[0], size[1] // patch[1])
    return VisionFeatures((FeatureLayer("last", grid),), grid, vision.hidden_size, size, resolution="native")


def table(config: Idefics2Config) -> Table:
    """Idefics2's names → ours."""
    layers = {
        f"model.connector.perceiver_resampler.layers.{index}.{theirs}": f"connector.layers.{index}.{ours}"
        for index in range(config.perceiver_config.resampler_depth)
        for theirs, ours in LAYER.items()
    }
    return {**PARTS, **layers} | language_table(config.text_config, "model.text_model", "lm_head")
