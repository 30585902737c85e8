"""Reading an encoder's contract from the encoder: a picture without data runs through it, and the shapes are kept.

Tensors on the meta device have shapes and gradients but no values, so this costs no arithmetic and no memory.
"""

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from chiasm.vision.features import REDUCTIONS, FeatureLayer, Grid, VisionFeatures, layer_grid

DEFAULT_IMAGE_SIZE = 224
"""Pixels for convolutional encoders whose configuration names no image size; they take any."""


UNORDERED = ("hiera",)
"""Model types whose hidden states, the last one excepted, do not list the patches row by row."""


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree in evaluation mode over the same weights, whose mode can change without touching `model`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared).eval()


def trace(model: PreTrainedModel, run: Callable[[PreTrainedModel, torch.device], Any]) -> tuple[Any, dict[str, Tensor]]:
    """What `run(model, device)` gives on weights without values, and those weights by name.

    An encoder whose forward looks at values cannot run so; it runs on its own weights instead.
    """
    try:
        return _trace_on(torch.device("meta"), model, run)
    except RuntimeError:
        return _trace_on(model.device, model, run)


def _trace_on(
    device: torch.device, model: PreTrainedModel, run: Callable[[PreTrainedModel, torch.device], Any]
) -> tuple[Any, dict[str, Tensor]]:
    weights = {name: weight.detach().to(device) for name, weight in model.named_parameters()}
    buffers = {f"model.{name}": buffer.to(device) for name, buffer in model.named_buffers()}
    for weight in weights.values():
        weight.requires_grad_(weight.is_floating_point())
    state = {f"model.{name}": weight for name, weight in weights.items()} | buffers
    return torch.func.functional_call(_Run(twin(model), run), state, (device,)), weights


class _Run(nn.Module):
    def __init__(self, model: PreTrainedModel, run: Callable[[PreTrainedModel, torch.device], Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, device: torch.device) -> Any:
        return self.run(self.model, device)


def default_image_size(config: PreTrainedConfig) -> Grid:
    """The image size of an encoder's configuration, (height, width)."""
    values = config.to_dict()
    if config.model_type == "siglip2_vision_model":
        return pair(round(values["num_patches"] ** 0.5) * values["patch_size"])
    size = values.get("image_size")
    return pair(DEFAULT_IMAGE_SIZE if size is None else size)


def patch_size(config: PreTrainedConfig) -> Grid | None:
    """Pixels from one patch to the next, (vertical, horizontal), or None if the configuration has no single one."""
    values = config.to_dict()
    for name in ("patch_stride", "patch_size"):
        value = values.get(name)
        if isinstance(value, int) or (isinstance(value, (list, tuple)) and len(value) == 2):
            return pair(value)
    return None


def describe(
    outputs: Any,
    config: PreTrainedConfig,
    layers: tuple[int | str, ...],
    reduce: tuple[str, ...],
    image_size: Grid,
    grid: Grid | None,
    interpolate_positions: bool,
) -> VisionFeatures:
    """The features that `layers` of these outputs (for two pictures) make.

    Raises:
        ValueError: a layer does not exist, its shape is not that of a picture, or it does not reach the grid.
    """
    found = [find(outputs, layer) for layer in layers]
    states = [*(outputs.get("hidden_states") or ()), *(state for _, state in found)]
    map_grids = [_map_grid(state) for state in states if state.ndim == 4 and _is_picture(_map_grid(state), image_size)]
    read = []
    for (name, state), how in zip(found, reduce, strict=True):
        read.append((_layer(name, state, how, config, image_size, map_grids), state))
    target = grid or min((layer.grid for layer, _ in read), key=lambda cells: cells[0] * cells[1])
    for layer, _ in read:
        if layer.grid[0] < target[0] or layer.grid[1] < target[1]:
            raise ValueError(
                f"layer {layer.layer!r} has a grid of {layer.grid[0]}×{layer.grid[1]}, coarser than the grid "
                f"{target[0]}×{target[1]} that was asked for; leave the layer out or take a coarser grid"
            )
    width = sum(layer.channels(state.shape[1 if state.ndim == 4 else 2], target) for layer, state in read)
    return VisionFeatures(tuple(layer for layer, _ in read), target, width, image_size, interpolate_positions)


def find(outputs: Any, layer: int | str) -> tuple[int | str, Tensor]:
    """The hidden state of a layer; a negative index comes back counted from the front."""
    if layer == "last":
        return layer, outputs.last_hidden_state
    if isinstance(layer, str):
        maps = outputs.get("feature_maps") or {}
        if layer not in maps:
            raise ValueError(f"layer {layer!r} is unknown; choose one of {', '.join(['last', *maps])}, or an index")
        return layer, maps[layer]
    hidden_states = outputs.get("hidden_states") or ()
    if not -len(hidden_states) <= layer < len(hidden_states):
        raise ValueError(f"layer {layer} does not exist; this encoder returns {len(hidden_states)} hidden states")
    return layer % len(hidden_states), hidden_states[layer]


def _layer(
    layer: int | str, state: Tensor, reduce: str, config: PreTrainedConfig, image_size: Grid, map_grids: list[Grid]
) -> FeatureLayer:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce {reduce!r} is unknown; choose one of {', '.join(REDUCTIONS)}")
    if state.shape[0] != 2 or state.ndim not in (3, 4):
        raise ValueError(
            f"layer {layer!r} of a {config.model_type} encoder is {tuple(state.shape)} for two pictures; expected "
            "(2, tokens, width) or (2, channels, rows, columns)"
        )
    if layer != "last" and config.model_type in UNORDERED:
        raise ValueError(f"layer {layer!r} of a {config.model_type} encoder is not in row order; use layers=['last']")
    if state.ndim == 3:
        return FeatureLayer(layer, *layer_grid(state.shape[1], image_size, patch_size(config), map_grids), reduce)
    if not _is_picture(_map_grid(state), image_size):
        raise ValueError(
            f"layer {layer!r} of a {config.model_type} encoder is {tuple(state.shape)}, which is not "
            f"(2, channels, rows, columns) of a {image_size[0]}×{image_size[1]} picture; use layers=['last']"
        )
    return FeatureLayer(layer, _map_grid(state), 0, reduce)


def _map_grid(state: Tensor) -> Grid:
    return state.shape[2], state.shape[3]


def _is_picture(cells: Grid, image_size: Grid) -> bool:
    """Whether the grid has the picture's proportions, to within one cell."""
    return abs(cells[0] * image_size[1] - cells[1] * image_size[0]) <= max(image_size)


def pair(value: int | list[int] | tuple[int, ...], name: str = "value") -> Grid:
    """(rows, columns) from one number or two. ValueError with the name for anything else."""
    numbers = [value, value] if isinstance(value, int) else value
    if (
        not isinstance(numbers, list | tuple)
        or len(numbers) != 2
        or not all(isinstance(number, int) and number > 0 for number in numbers)
    ):
        raise ValueError(f"{name} is {value!r}, expected a whole number above 0, or two of them: [rows, columns]")
    return numbers[0], numbers[1]
