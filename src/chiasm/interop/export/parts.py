"""What kinds of transformers checkpoints share on the way out: weights, the text's configuration, what is refused."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from chiasm.connectors import connector_settings
from chiasm.fusion.adapters import merge_adapters
from chiasm.fusion.base import FusionModel
from chiasm.fusion.config import ChiasmConfig
from chiasm.interop.export.asking import by_template
from chiasm.interop.parts import with_direct_head
from chiasm.interop.weights import DERIVED, Table, counterpart
from chiasm.language.adapter import vocabulary
from chiasm.language.generation_settings import change
from chiasm.vision.encoder import VisionEncoder
from chiasm.vision.features import VisionFeatures
from chiasm.vision.probe import twin
from chiasm.vision.resampling import at_own_size

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Exported:
    """A checkpoint of transformers that is ready to be saved.

    Args:
        loads: whether the processor can be loaded from a folder here.
        notes: what is good to know before it is used.
        ask: how the processor is given a conversation and a picture.
        rows: whether the model reads pictures in rows, `(B, I, 3, height, width)`.
    """

    model: PreTrainedModel
    processor: ProcessorMixin | None
    loads: bool = True
    notes: tuple[str, ...] = ()
    ask: Callable[[Any, list[dict[str, Any]], Image.Image], Any] = by_template
    rows: bool = False


def merged(model: Model) -> Model:
    """The model without LoRA adapters: itself, or a copy with them merged."""
    if not model.config.adapters:
        return model
    model = copy.deepcopy(model)
    merge_adapters(model)
    return model


def in_float32(model: Model) -> tuple[Model, list[str]]:
    """The model in float32, itself or a copy, and what is good to know then."""
    found = " and ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}))
    if found == "float32":
        return model, []
    return copy.deepcopy(model).float(), [f"the weights are {found}; the graphs compute in float32"]


def resampled(model: Model) -> Model:
    """The model with an encoder that has positions of its own for the pictures that it takes: itself, or a copy with
    the same weights elsewhere."""
    encoder: Any = getattr(model, "vision", None)
    vision = at_own_size(encoder) if isinstance(encoder, VisionEncoder) else encoder
    if vision is encoder:
        return model
    copied: Any = twin(model)
    copied.vision, copied.config.vision_config = vision, vision.model.config
    copied.config.features = vision.features.to_dict()
    return copied


def rows(model: FusionModel) -> int:
    """Rows that the embedding table needs so that the placeholder is in it: transformers looks every token up."""
    return max(vocabulary(model.language), model.config.image_token_id + 1)


def weights(model: FusionModel, count: int | None = None) -> dict[str, Tensor]:
    """The model's weights by name, with the placeholder's row in the embedding table and the head.

    Rows that are added are the mean of the others, so that a placeholder's logit is never the largest.

    Args:
        count: rows of the table; by default as many as hold the placeholder.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if name.rsplit(".", 1)[-1] not in DERIVED}
    count = rows(model) if count is None else count
    if count == vocabulary(model.language):
        return state
    names = _names(model, model.get_input_embeddings(), model.get_output_embeddings())
    return state | {name: _widened(state[name], count) for name in names}


def unchosen(model: FusionModel) -> dict[str, Tensor]:
    """`weights` for a reader that suppresses no token: of the head, and of a table tied to it, the placeholder's row
    is the mean of the others even where the model has one of its own."""
    state, token = weights(model), model.config.image_token_id
    for name in _names(model, model.get_output_embeddings()):
        table = state[name].clone()
        others = torch.arange(len(table), device=table.device) != token
        table[token] = table[others].float().mean(dim=0).to(table.dtype)
        state[name] = table
    return state


def headed(model: FusionModel, count: int | None = None) -> dict[str, Tensor]:
    """`weights` for an image-text model whose own head has no bias: one of zeros is left out."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    names = [name for name, parameter in model.named_parameters() if parameter is bias]
    return {name: tensor for name, tensor in weights(model, count).items() if name not in names}


def text_config(model: FusionModel) -> dict[str, Any]:
    """The language model's configuration as an image-text model with a head of its own has it."""
    settings = with_direct_head(model.config.text_config)
    return settings | {"vocab_size": rows(model), "tie_word_embeddings": tied(model)}


def text_settings(model: FusionModel) -> dict[str, Any]:
    """What the configuration of an image-text model with a head of its own says of its language model."""
    return {"text_config": text_config(model), "tie_word_embeddings": tied(model), "dtype": model.language.dtype}


def filled(
    family: type[Model],
    config: PreTrainedConfig,
    model: FusionModel,
    table: Table,
    ours: dict[str, Tensor] | None = None,
) -> Model:
    """A model of transformers with our weights, and our settings of `generate`.

    Args:
        ours: weights by name, where they are not `headed(model)`.
    """
    theirs = counterpart(family, config, headed(model) if ours is None else ours, table)
    theirs.generation_config = generation(model)
    return theirs


def require_tower(model: FusionModel, wanted: str, kind: str) -> None:
    """Refuses another encoder than the one that a kind of checkpoint has of its own."""
    found = model.config.vision_config.model_type
    require(
        found == wanted,
        f"{kind} has an encoder of its own, this model one of type {found!r}",
        f"connect an {wanted} encoder, or take connector mlp, which becomes LLaVA",
    )


def require_same(model: FusionModel, back: ChiasmConfig, kind: str) -> None:
    """Refuses a model that the checkpoint would not give back: `back` is what the loader makes of its configuration."""
    ours = model.config
    wanted, found = connector_settings(ours.connector), connector_settings(back.connector)
    pairs = {f"connector {wanted['name']} has {name}": (wanted.get(name), found.get(name)) for name in found}
    blocks = (ours.cross_attention or {}, back.cross_attention or {})
    pairs |= {f"cross_attention has {name}": (blocks[0].get(name), blocks[1].get(name)) for name in blocks[1]}
    pairs |= {f"the features have {name}": (value, _told(back)[name]) for name, value in _told(ours).items()}
    for name, (have, want) in pairs.items():
        require(have == want, f"{name} {have!r}, where {kind} has {want!r}", "connect with that, or convert --to onnx")


def _told(config: ChiasmConfig) -> dict[str, Any]:
    """What is read of the encoder, whichever words say so."""
    features = VisionFeatures.from_dict(config.features)
    return {
        "layers": [(layer.layer, layer.grid, layer.prefix_tokens) for layer in features.layers],
        "grid": features.grid,
        "image_size": features.image_size,
        "class and register tokens": features.num_prefix,
        "resolution": features.resolution,
        "interpolate_positions": features.interpolate_positions,
    }


def tied(model: FusionModel) -> bool:
    """Whether the head is the embedding table in transformers too, which ties tables of this name only."""
    table = model.get_input_embeddings().weight
    names = [name for name, parameter in model.named_parameters() if parameter is table]
    return model.config.tie_word_embeddings and names[0].endswith(".embed_tokens.weight")


def generation(model: FusionModel) -> GenerationConfig:
    """The model's settings of `generate`, in which the placeholder is never chosen."""
    settings = copy.deepcopy(model.generation_config)
    change(settings, suppress_tokens=sorted({*(settings.suppress_tokens or []), model.config.image_token_id}))
    return settings


def ends(model: FusionModel) -> list[int]:
    """Tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def require(condition: bool, problem: str, fit: str) -> None:
    """Refuses a model that a kind of checkpoint cannot hold.

    Args:
        problem: what is in the way.
        fit: what would fit.
    """
    if not condition:
        raise ValueError(f"{problem}; {fit}")


def require_plain(
    model: FusionModel, kind: str, attention: str = "causal", own_head: bool = True, tiles: bool = False
) -> None:
    """Refuses what no image-text model of transformers has: coordinates, an encoder of Chiasm's own.

    Args:
        own_head: whether the image-text model has a head in place of the language model's.
        tiles: whether it reads pictures in tiles.
    """
    config = model.config
    require(
        config.tiles is None or tiles,
        f"this model reads pictures in tiles ({_grids(config.tiles)}), which a {kind} checkpoint cannot hold",
        "connect without tiles, or with mlp or linear, which --to transformers writes as LLaVA-NeXT",
    )
    require(
        config.regions is None,
        f"this model writes the names of {config.regions} regions between its visual tokens, which a {kind} checkpoint "
        "cannot hold",
        "connect without regions",
    )
    require(
        config.patch_positions == "none",
        f"this model appends coordinates to its patches (patch_positions: {config.patch_positions}), which a {kind} "
        "checkpoint cannot hold",
        "connect with patch_positions='none' and a ViT, or convert --to onnx",
    )
    require(
        config.attention == attention,
        f"this model reads with attention {config.attention!r}, a {kind} checkpoint with {attention!r}",
        f"connect with attention={attention!r}",
    )
    require(
        config.direct_head or not own_head,
        f"the language model of type {config.text_config.model_type!r} changes logits behind its head, which a {kind} "
        "checkpoint does not",
        "take a language model with a plain head, or convert --to onnx",
    )
    bias = getattr(model.get_output_embeddings(), "bias", None)
    require(
        bias is None or not own_head or not bias.any(),
        f"the head of this {config.text_config.model_type!r} language model has a bias, the one of a {kind} checkpoint "
        "has none",
        "take a language model whose head has no bias, or convert --to onnx",
    )
    tower = config.vision_config
    require(
        type(tower).__module__.startswith("transformers."),
        f"transformers has no vision encoder of type {tower.model_type!r}, which is Chiasm's own",
        "connect a CLIP or SigLIP encoder, or convert --to onnx",
    )


def _names(model: FusionModel, *tables: Any) -> list[str]:
    """Every name of the tables' weights and biases."""
    wanted = {id(parameter) for module in tables for parameter in module.parameters()}
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in wanted]


def _grids(tiles: list[list[int]] | None) -> str:
    return ", ".join(f"{rows}×{columns}" for rows, columns in tiles or [])


def _widened(table: Tensor, count: int) -> Tensor:
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(count - table.shape[0], *table.shape[1:])])
