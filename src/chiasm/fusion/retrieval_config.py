"""The configuration of a retrieval model: a vision encoder, and a Q-Former with its text branch and heads."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from chiasm.fusion.config import PATCH_POSITIONS


class QFormerRetrievalConfig(PreTrainedConfig):
    """What `config.json` of a retrieval model holds.

    Args:
        vision_config, features, patch_positions, feature_scale, adapters, part_dtypes: as in `ChiasmConfig`.
        connector: options of the Q-Former, its vocabulary among them.
        space: width of the space where pictures and texts are compared.
        generation: whether there is a language-modelling head on the text branch.
    """

    model_type = "chiasm_qformer_retrieval"
    sub_configs_defaults = {  # noqa: RUF012  (the base class declares it as a ClassVar)
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model")
    }

    vision_config: dict | PreTrainedConfig | None = None
    features: Any = None
    patch_positions: str = "none"
    feature_scale: float = 1.0
    connector: Any = None
    space: int = 256
    generation: bool = True
    adapters: dict | None = None
    part_dtypes: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.patch_positions not in PATCH_POSITIONS:
            raise ValueError(
                f"patch_positions {self.patch_positions!r} is unknown; choose one of {', '.join(PATCH_POSITIONS)}"
            )
        super().__post_init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Words of the text branch, by the name that transformers has for them."""
        return self.connector["vocabulary"]

    @vocab_size.setter
    def vocab_size(self, words: int) -> None:
        self.connector = {**self.connector, "vocabulary": words}


AutoConfig.register("chiasm_qformer_retrieval", QFormerRetrievalConfig, exist_ok=True)
