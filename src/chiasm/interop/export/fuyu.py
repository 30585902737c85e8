"""The unified transformer with patches of raw pixels and a decoder of transformers → Fuyu checkpoints (2023)."""

from transformers import FuyuConfig, FuyuForCausalLM

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.parts import Exported, filled, require, text_settings
from chiasm.interop.fuyu import chiasm_config, table

NOTE = (
    "Fuyu's processor takes no chat templates and writes prompts by itself, so that the folder has none: "
    "take the processor files of the Fuyu that this model started from"
)


def export_fuyu(model: FusionModel, processor: ChiasmProcessor | None) -> Exported:
    """The same model as transformers' Fuyu, without its processor.

    Raises:
        ValueError: Fuyu cannot hold it; the message says why and what would fit.
    """
    patches = model.config.vision_config
    config = FuyuConfig(
        image_size=patches.image_size[0],
        patch_size=patches.patch_size,
        image_token_id=model.config.image_token_id,
        **text_settings(model),
    )
    decoder, unified = model.config.text_config.model_type, model.config.unified or {}
    require(
        type(model.config.text_config).__module__.startswith("transformers.")
        and unified == chiasm_config(config).unified
        and patches.image_size[0] == patches.image_size[1],
        f"a Fuyu checkpoint has a decoder of transformers and no tokens that only frame pictures, this model a decoder "
        f"of type {decoder!r} and {unified or 'no such tokens'}",
        "start from a Fuyu checkpoint: chiasm.load(...)",
    )
    return Exported(
        filled(FuyuForCausalLM, config, model, table(config)), None, notes=() if processor is None else (NOTE,)
    )
