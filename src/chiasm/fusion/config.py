"""The configuration of a connected model: two sub-configurations and what stands between them."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

import chiasm.fusion.unified_decoder
import chiasm.vision  # noqa: F401  (both register models of our own with AutoConfig)

FUSIONS = ("early", "intermediate", "unified")
PATCH_POSITIONS = ("none", "grid")
ATTENTIONS = ("causal", "prefix")


class ChiasmConfig(PreTrainedConfig):
    """What `config.json` of a Chiasm checkpoint holds.

    Args:
        vision_config: the vision encoder's own configuration.
        text_config: the language model's own configuration.
        fusion: where the modalities first meet; one of `FUSIONS`.
        connector: the connector's name and options, defaults included.
        features: which feature maps are read from the encoder and how (`chiasm.vision.VisionFeatures`).
        patch_positions: `grid` appends 2-D coordinates to the patch features, `none` leaves them as they are.
        regions: of early fusion; rows and columns of regions by which visual tokens are ordered, because the processor
            writes each region's name in front of them; None leaves them row by row.
        tiles: of early fusion; grids of tiles, each by rows and columns, of which a picture takes the one that suits
            its shape and is read in tiles behind the whole (`chiasm.data.tiles`); None reads it as a whole only.
        attention: of early and unified fusion; `causal`, or `prefix`: tokens of type 0 (pictures and prompt, by
            `token_type_ids`) see each other in both directions.
        feature_scale: root mean square of the patch features, the amplitude of those coordinates.
        image_token_id: the placeholder that one visual token replaces; it may lie beyond the embedding table.
        video_token_id: the same for videos, where the model takes them apart from pictures (Qwen2-VL).
        direct_head: whether the language model's logits are its output embedding applied to the last hidden state.
        cross_attention: intermediate fusion's blocks (`chiasm.fusion.cross_attention_settings.CrossAttentionSettings`).
        unified: the unified transformer's tokens (`chiasm.fusion.unified_settings.UnifiedSettings`).
        fresh_connector: whether the connector has not yet learned to speak to the language model, so that a stage may
            choose what it starts from; a first stage of BLIP-2 does not teach that.
        adapters: part → LoRA settings, for parts that carry unmerged adapters.
        part_dtypes: part → dtype of its saved weights, such as `float32`; None where all have the model's `dtype`.
    """

    model_type = "chiasm"
    keys_to_ignore_at_inference = ["cache", "image_cache", "visual_tokens", "image_grid_thw"]  # noqa: RUF012  (as below)
    sub_configs_defaults = {  # noqa: RUF012  (the base class declares it as a ClassVar)
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    fusion: str = "early"
    connector: Any = None
    features: Any = None
    patch_positions: str = "none"
    regions: Any = None
    tiles: Any = None
    attention: str = "causal"
    feature_scale: float = 1.0
    image_token_id: int | None = None
    video_token_id: int | None = None
    direct_head: bool = False
    cross_attention: dict | None = None
    unified: dict | None = None
    fresh_connector: bool = False
    adapters: dict | None = None
    part_dtypes: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion {self.fusion!r} is unknown; choose one of {', '.join(FUSIONS)}")
        if self.patch_positions not in PATCH_POSITIONS:
            raise ValueError(
                f"patch_positions {self.patch_positions!r} is unknown; choose one of {', '.join(PATCH_POSITIONS)}"
            )
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention {self.attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
        if self.attention == "prefix" and self.fusion == "intermediate":
            raise ValueError(f"attention 'prefix' is not for fusion {self.fusion!r}; use 'causal'")
        if self.regions is not None and self.fusion != "early":
            raise ValueError(f"regions are for fusion 'early', got fusion {self.fusion!r}; remove regions")
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(self.get_text_config().tie_word_embeddings)
        text: Any = self.text_config
        self.is_encoder_decoder = text.is_encoder_decoder
        if self.tiles is not None:
            self._check_tiles()

    def _check_tiles(self) -> None:
        self.tiles = [list(grid) for grid in self.tiles]
        if not self.tiles or any(len(grid) != 2 or min(grid) < 1 for grid in self.tiles):
            raise ValueError(f"tiles {self.tiles}, expected rows and columns of one grid or more, such as [[1, 2]]")
        if self.fusion != "early" or self.is_encoder_decoder or self.regions is not None:
            other = f"regions {self.regions}" if self.regions is not None else f"fusion {self.fusion!r}"
            other = "an encoder-decoder language model" if self.is_encoder_decoder else other
            raise ValueError(f"tiles are for fusion 'early' with a causal language model, got {other}; remove tiles")


AutoConfig.register("chiasm", ChiasmConfig, exist_ok=True)
