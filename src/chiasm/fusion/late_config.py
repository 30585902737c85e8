"""The configuration of late fusion: two towers' configurations, how each pools, and the space where they meet."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

import chiasm.vision  # noqa: F401  (registers the encoders of our own with AutoConfig)
from chiasm.connectors import checked_options
from chiasm.fusion.late_connector import LateConnector
from chiasm.language.text_tower import POOLINGS as TEXT_POOLINGS
from chiasm.vision.pooling import POOLINGS as VISION_POOLINGS

PROJECTIONS = ("linear", "mlp", "none")


def late_connector_settings(given: str | dict[str, Any]) -> dict[str, Any]:
    """Name and options of the projections, defaults included.

    Raises:
        ValueError: the name or an option is unknown, or a value is none of its kind.
    """
    given = {"name": given} if isinstance(given, str) else given
    name = given.get("name", PROJECTIONS[0])
    if name not in PROJECTIONS:
        raise ValueError(
            f"connector {name!r} does not project into a shared space; fusion 'late' has {', '.join(PROJECTIONS)}"
        )
    return checked_options(f"connector {name!r} of fusion 'late'", LateConnector.__init__, given)


class LateFusionConfig(PreTrainedConfig):
    """What `config.json` of a late-fusion checkpoint holds.

    Args:
        vision_config, text_config, features, adapters, part_dtypes: as in `ChiasmConfig`.
        vision_pooling, text_pooling: how a picture and a text become one vector.
        image_width, text_width: of those vectors.
        connector: the projections' name and options.
        answer_head: of a model that answers, its settings and its closed list of answers.
    """

    model_type = "chiasm_late"
    sub_configs_defaults = {  # noqa: RUF012  (the base class declares it as a ClassVar)
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    features: Any = None
    vision_pooling: str = "mean"
    text_pooling: str = "mean"
    image_width: int = 0
    text_width: int = 0
    connector: Any = None
    answer_head: dict | None = None
    adapters: dict | None = None
    part_dtypes: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, known in (("vision_pooling", VISION_POOLINGS), ("text_pooling", TEXT_POOLINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        self.connector = late_connector_settings(self.connector or {})
        super().__post_init__(**kwargs)

    @property
    def fusion(self) -> str:
        """Where the modalities first meet."""
        return "late"


AutoConfig.register("chiasm_late", LateFusionConfig, exist_ok=True)
