"""Finding the vision tower: the class of a configuration, the tower of an image-text model, what its forward takes."""

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig, CLIPVisionConfig, PreTrainedConfig, PreTrainedModel

from chiasm.sources.errors import without_report
from chiasm.sources.files import require_reachable
from chiasm.vision.features import Grid

TWO_TOWERS = (
    "aimv2",
    "blip",
    "blip-2",
    "chinese_clip",
    "clip",
    "instructblip",
    "metaclip_2",
    "siglip",
    "siglip2",
    "tipsv2",
)
"""Model types of image-text models whose vision tower is `vision_model`, configured by `vision_config`."""

UNLISTED_CLASSES = {
    "blip_2_vision_model": "Blip2VisionModel",
    "blip_vision_model": "BlipVisionModel",
    "idefics2_vision": "models.idefics2.modeling_idefics2.Idefics2VisionTransformer",
    "idefics3_vision": "models.idefics3.modeling_idefics3.Idefics3VisionTransformer",
    "instructblip_vision_model": "InstructBlipVisionModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
    "smolvlm_vision": "models.smolvlm.modeling_smolvlm.SmolVLMVisionTransformer",
}
"""Model type → class, for towers that transformers' AutoModel does not list."""

CLIP_TWINS = ("idefics_vision",)
"""Model types whose tower computes what a CLIP tower computes and names its weights alike, but has no class of its own
that stands alone: they are built as CLIP towers."""

CLIP_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
)

CONVOLUTIONAL = ("efficientnet_lite", "convnext", "convnextv2", "dinov3_convnext", "resnet", "regnet", "mobilenet_v2")
"""Model types without position embeddings, to whose patch features `patch_positions: auto` appends coordinates, and
without attention, so that every attention implementation suits them."""

UNSUITABLE = {
    "chiasm": "it is a whole image-text model; name its encoder: chiasm.load(...).model.vision.model",
    "pixtral": "it joins the pictures of a batch into one sequence",
    "vit_mae": "it drops most patches at random; set model_type to 'vit' in its config.json to read all of them",
}
"""Model type → why it has no patch features of one picture."""

HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Options of `from_pretrained` that say where files come from, and so concern the configuration too."""


def standalone(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration that a tower is built from: the given one, or the CLIP one that says the same."""
    if config.model_type not in CLIP_TWINS:
        return config
    return CLIPVisionConfig(**{name: getattr(config, name) for name in CLIP_SIZES}, dtype=config.dtype)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that builds a vision model from its configuration alone.

    Raises:
        ValueError: there is none, or it has no patch features.
    """
    if config.model_type in UNSUITABLE:
        raise ValueError(f"a {config.model_type} model is no vision encoder here: {UNSUITABLE[config.model_type]}")
    if config.model_type in UNLISTED_CLASSES:
        module, _, name = f"transformers.{UNLISTED_CLASSES[config.model_type]}".rpartition(".")
        return getattr(import_module(module), name)
    kind: Any = MODEL_MAPPING.get(type(config), None)
    if kind is None:
        raise ValueError(
            f"model type {config.model_type!r} is not known as a vision model; "
            "register its classes with AutoConfig and AutoModel first"
        )
    return kind


def vision_type(source: str | PreTrainedModel) -> str:
    """The model type of the vision tower of a folder, a hub id or a loaded model."""
    if isinstance(source, str):
        require_reachable(source)
    config = source.config if isinstance(source, PreTrainedModel) else AutoConfig.from_pretrained(source)
    return config.vision_config.model_type if config.model_type in TWO_TOWERS else config.model_type


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision model with fresh weights."""
    config = standalone(config)
    kind = model_class(config)
    if config.model_type in CONVOLUTIONAL:
        config._attn_implementation = "eager"
    return kind._from_config(config, **without_pooler(kind))


def take_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a loaded model that makes patch features: no text tower, no classifier, no pooler.

    Raises:
        ValueError: that part could not be built again from its configuration when a checkpoint is loaded.
    """
    tower: Any = model.vision_model if model.config.model_type in TWO_TOWERS else model
    kind = model_class(tower.config)
    if type(tower) is not kind:
        tower = tower.base_model
    if type(tower) is not kind:
        raise ValueError(
            f"a {tower.config.model_type} encoder is a {kind.__name__}, but a {type(tower).__name__} was given; "
            "pass the former, or register the latter with AutoModel"
        )
    if without_pooler(kind):
        tower.pooler = None
    return tower


def load_tower(source: str, dtype: torch.dtype | str, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """The vision model of a folder or hub id, and the names of weights that the files lack.

    Of an image-text model only the vision tower is read.
    """
    where = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    require_reachable(source, **where)
    config = AutoConfig.from_pretrained(source, **where)
    if config.model_type in TWO_TOWERS:
        config = config.vision_config
        options = {"key_mapping": {r"^vision_model\.": ""}, **options}
    kind: Any = model_class(config)
    with without_report():
        model, report = kind.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **without_pooler(kind), **options
        )
    return model, set(report["missing_keys"])


def takes(model: PreTrainedModel, option: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return option in inspect.signature(model.forward).parameters


def picture_inputs(config: PreTrainedConfig, pixel_values: Tensor, patches: Tensor | None = None) -> dict[str, Any]:
    """What a vision model's forward is given for pictures `(B, 3, height, width)`, and the mask of their patches.

    SigLIP 2 with flexible resolution (NaFlex, arXiv 2502.14786) takes patches that are already cut out, and their grid.
    """
    if config.model_type != "siglip2_vision_model":
        return {"pixel_values": pixel_values} | ({} if patches is None else {"patch_attention_mask": patches})
    size = config.patch_size
    rows, columns = pixel_values.shape[2] // size, pixel_values.shape[3] // size
    patches = pixel_values[:, :, : rows * size, : columns * size]
    patches = patches.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.flatten(3).flatten(1, 2),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.tensor([[rows, columns]] * pixel_values.shape[0]),
    }


def check_inputs(model: PreTrainedModel, image_size: Grid) -> None:
    """Refuses a model whose forward cannot be called with pictures alone."""
    given = picture_inputs(model.config, torch.empty(1, 3, *image_size, device="meta"))
    for name, parameter in inspect.signature(model.forward).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required and name not in given:
            raise ValueError(
                f"a {model.config.model_type} encoder needs {name!r} beside the pictures, so it cannot stand alone; "
                "take one whose forward has pixel_values only"
            )


def without_pooler(kind: type[PreTrainedModel]) -> dict[str, bool]:
    """Classes with an optional pooler are built without it: checkpoints of classifiers do not have its weights."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else {}
