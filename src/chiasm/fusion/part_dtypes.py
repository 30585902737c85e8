"""Parts of different precision: each part's dtype is written into the configuration and restored when it is loaded."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from chiasm.fusion.adapters import adapted_layers, draw_adapters, is_loaded, plain_name

PART_CONFIGS = {"vision": "vision_config", "language": "text_config"}
"""Parts that are built from a configuration of their own."""


class PartDtypes(PreTrainedModel):
    """A model whose children are parts, named after them: `config.part_dtypes` has the dtype of each.

    transformers knows one dtype for all of them, that of the first parameter. A dtype that is asked for when a model is
    loaded is still for all of them.
    """

    base_model_prefix = ""
    input_modalities = ("image", "text")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, dtype: Any = "auto", **kwargs: Any) -> Any:
        """Loads every part in the dtype that it was saved in, or the whole model in `dtype`."""
        dtype = kwargs.pop("torch_dtype", None) or dtype
        if dtype not in (None, "auto"):
            if isinstance(config := kwargs.get("config"), PreTrainedConfig):
                kwargs["config"] = copy.deepcopy(config)
                kwargs["config"].part_dtypes = None
            else:
                kwargs["part_dtypes"] = None
        return super().from_pretrained(pretrained_model_name_or_path, *args, dtype=dtype or "auto", **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Writes weights and configuration, with the dtypes of the parts in it where they differ."""
        dtypes = {part: str(dtype).removeprefix("torch.") for part, dtype in part_dtypes(self).items()}
        self.config.part_dtypes = dtypes if len(set(dtypes.values())) > 1 else None
        super().save_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        self._built_without_data = any(parameter.is_meta for parameter in self.parameters())
        super().post_init()

    def new_parts(self) -> dict[str, Callable[[], nn.Module]]:
        """How the parts that are no models of transformers are built."""
        return {}

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        """Parts draw their weights when they are built. What was built without data and is not in a checkpoint gets
        those of parts that are built now; models of transformers draw theirs by their own rules."""
        # The outer class skips modules that have no weights of their own.
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel) and module is not self]
        for model in models:
            model.initialize_weights()
        super().initialize_weights()
        if not self._built_without_data:
            return
        for part, build in self.new_parts().items():
            lacking = {path: p for path, p in self.get_submodule(part).named_parameters() if not is_loaded(p)}
            fresh = dict(build().named_parameters()) if lacking else {}
            for path, parameter in lacking.items():
                if plain_name(path) in fresh:
                    parameter.copy_(fresh[plain_name(path)])
        for _, layer in adapted_layers(self):
            draw_adapters(layer)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do, module by module."""

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Modules that stay in float32, in whichever part's dtype."""
        plan: dict[str, torch.dtype] = {}
        for known in {dtype, *part_dtypes(self).values()}:
            plan |= super()._get_dtype_plan(known)
        return plan


def part_dtypes(model: PreTrainedModel) -> Mapping[str, torch.dtype]:
    """Part → dtype of its first weight; a part without floating-point weights is left out."""
    first = {
        part: next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
        for part, module in model.named_children()
    }
    return {part: dtype for part, dtype in first.items() if dtype is not None}


def set_config_dtypes(config: PreTrainedConfig) -> None:
    """Writes the parts' dtypes into their own configurations, from which transformers then builds the parts."""
    for part, name in PART_CONFIGS.items():
        if config.part_dtypes and part in config.part_dtypes:
            getattr(config, name).dtype = getattr(torch, config.part_dtypes[part])


def cast_parts(model: PreTrainedModel) -> None:
    """Gives the weights of parts that were just built, adapters included, their dtypes; buffers keep theirs."""
    for part, dtype in (model.config.part_dtypes or {}).items():
        for parameter in model.get_submodule(part).parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, dtype))
