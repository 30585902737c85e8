"""Weights as files hold them → as transformers has them today: it renames and joins some whenever it reads and writes.

A ViT is written by the names of 2020, the experts of a mixture one by one. Its own table of that is used here.
"""

import copy
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


def todays(weights: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights by the names, and in the shapes, that the model's parts have for them."""
    changes = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Tensor] = {}
    joined: dict[str, WeightConverter] = {}
    for name in sorted(weights, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        if pattern is None:
            found[target] = weights[name]
        else:
            whole = joined.setdefault(target, copy.deepcopy(by_pattern[pattern]))
            whole.add_tensor(target, name, pattern, weights[name])
    for target, converter in joined.items():
        found |= _converted(converter, target, model)
    return found


def _converted(converter: WeightConverter, target: str, model: PreTrainedModel) -> dict[str, Tensor]:
    try:
        whole = converter.convert(target, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"the weights that become {target!r} do not fit together ({error}); one of them is missing or of another "
            "shape: fetch the checkpoint again"
        ) from error
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in whole.items()}
