"""LoRA adapters inside a part (arXiv 2106.09685) and its variants DoRA (2402.09353) and rsLoRA (2312.03732).

They are recorded in the configuration, so a saved model loads with them: by part, or by part and pattern
(`language/language.*.q_proj`) where a part has several.
"""

import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"
SETTINGS = ("rank", "alpha", "dropout", "targets", "method")
METHODS: dict[str, dict[str, bool]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
"""Method → what peft is told."""


def add_adapter(
    model: PreTrainedModel,
    part: str,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | list[str] = ALL_LINEAR,
    method: str = "lora",
    pattern: str | None = None,
) -> None:
    """Gives a part LoRA weights: A random, B zero, so that nothing changes until a step is taken.

    Args:
        part: a part of the model, such as `language`.
        rank: width of the bottleneck.
        alpha: the update is scaled by alpha / rank, with rslora by alpha / √rank.
        dropout: before A, in training mode.
        targets: `all-linear` (every linear layer but the head), or names of linear layers: the last component
            (`q_proj`) or the whole path inside the part.
        method: `lora`; `dora`, which learns the length of every output's weights too; or `rslora`.
        pattern: names one of several adapters in a part.

    Raises:
        ValueError: the part has that adapter already, a target is no linear layer of it, or the method is unknown.
    """
    adapters, key = dict(model.config.adapters or {}), part if pattern is None else f"{part}/{pattern}"
    if key in adapters:
        raise ValueError(
            f"part {part!r} has a LoRA adapter already; merge it first (chiasm.fusion.adapters.merge_adapters)"
        )
    if method not in METHODS:
        raise ValueError(f"method {method!r} is no kind of adapter; choose of {', '.join(METHODS)}")
    settings = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets, "method": method}
    _inject(model, part, settings)
    model.config.adapters = adapters | {key: settings}


def inject_adapters(model: PreTrainedModel) -> None:
    """Gives every part the adapter that `model.config.adapters` records for it: what a model does when it is built."""
    for key, settings in (model.config.adapters or {}).items():
        settings = {"method": "lora", **settings}
        if set(settings) != set(SETTINGS):
            raise ValueError(f"config.adapters[{key!r}] has the keys {sorted(settings)}, expected {sorted(SETTINGS)}")
        _inject(model, _part_of(key), settings)


def merge_adapters(model: PreTrainedModel) -> list[str]:
    """Adds every adapter to the weights that it adapts and removes it; the logits stay what they were.

    Returns:
        Names of the weights that changed.
    """
    changed = []
    for name, layer in adapted_layers(model):
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
        changed.append(f"{name}.weight")
    for part in {_part_of(key) for key in model.config.adapters or {}}:
        del model.get_submodule(part).peft_config
    model.config.adapters = None
    return changed


@torch.no_grad()
def draw_adapters(layer: LoraLayer) -> None:
    """Begins what a checkpoint lacks of a layer's adapters: A random, B zero, DoRA's lengths those of the weights."""
    for adapter in layer.active_adapters:
        layer.reset_lora_parameters(adapter, True)
        if adapter not in layer.lora_magnitude_vector:
            continue
        lengths = layer.lora_magnitude_vector[adapter]
        if is_loaded(held := lengths.weight):
            continue
        low = {"lora_A": layer.lora_A[adapter].weight, "lora_B": layer.lora_B[adapter].weight}
        lengths.update_layer(base_layer=layer.get_base_layer(), scaling=layer.scaling[adapter], **low)
        held.copy_(lengths.weight)
        lengths.weight = held


def is_loaded(parameter: nn.Parameter) -> bool:
    """Whether transformers has marked it as one that a checkpoint held."""
    return getattr(parameter, "_is_hf_initialized", False)


def adapter_parameters(model: PreTrainedModel) -> set[str]:
    """Names of all LoRA weights of the model."""
    return {
        f"{name}.{path}"
        for name, layer in adapted_layers(model)
        for path, _ in layer.named_parameters()
        if path.split(".")[0] in layer.adapter_layer_names
    }


def plain_name(name: str) -> str:
    """A weight's name as it is without adapters."""
    return name.replace(".base_layer.", ".")


def linear_layers(model: PreTrainedModel, part: str) -> list[str]:
    """Paths, inside the part, of the linear layers that LoRA can adapt: all but the head and the layers that attention
    modules read without calling them."""
    heads = {id(getter().weight) for getter in (model.get_input_embeddings, model.get_output_embeddings) if getter()}
    return [
        path
        for path, module in model.get_submodule(part).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and id(module.weight) not in heads
    ]


def _part_of(key: str) -> str:
    return key.split("/", 1)[0]


def adapted_layers(model: PreTrainedModel) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _inject(model: PreTrainedModel, part: str, settings: dict[str, Any]) -> None:
    module = model.get_submodule(part)
    paths = _target_paths(linear_layers(model, part), part, settings["targets"])
    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules="|".join(map(re.escape, paths)),
        fan_in_fan_out=any(isinstance(module.get_submodule(path), Conv1D) for path in paths),
        **METHODS[settings["method"]],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, module)


def _target_paths(linear: list[str], part: str, targets: str | list[str]) -> list[str]:
    if targets == ALL_LINEAR:
        if not linear:
            raise ValueError(f"part {part!r} has no linear layer for LoRA to adapt; tune it in full or freeze it")
        return linear
    chosen: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        found = [path for path in linear if target in (path, path.rsplit(".", 1)[-1])]
        if not found:
            names = sorted({path.rsplit(".", 1)[-1] for path in linear})
            raise ValueError(f"LoRA target {target!r} is no linear layer of part {part!r}; it has {', '.join(names)}")
        chosen += [path for path in found if path not in chosen]
    return chosen
