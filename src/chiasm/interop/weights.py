"""Weights of another tool's checkpoint → Chiasm's own modules, by a table of exact name prefixes.

It is strict: a weight that is missing, left over or wrongly shaped is an error that names it, so a checkpoint that is
only half understood never loads. Files are safetensors; a pickle is never opened.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

Table = Mapping[str, str | None]
"""Prefix of the reference's names → ours; None leaves those weights out. A prefix ends at a dot or is a whole name."""

Transforms = Mapping[str, Callable[[Tensor], Tensor]]
"""A whole name of ours → what is done to its tensor."""

DERIVED = ("inv_freq", "position_ids")
"""Last components of buffers that older files hold and that are computed today."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Model = TypeVar("Model", bound=PreTrainedModel)


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors, in one file or in shards, by the names they have there.

    One file comes before shards, as in transformers, which leaves an index where shards were written over.

    Raises:
        ValueError: there is no such file, or one is damaged.
    """
    index = None if _file(source, SINGLE) else _file(source, INDEX)
    fix = "fetch it again" if index else "Chiasm reads safetensors only, so convert other formats first"
    weights: dict[str, Tensor] = {}
    for name in _shards(index) if index else [SINGLE]:
        file = _file(source, name) if Path(name).name == name else None
        if file is None:
            raise ValueError(f"{source} has no {name}; {fix}")
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}; fetch it again") from error
    return weights


def _shards(index: str) -> list[str]:
    try:
        return sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it names no file for each weight; fetch it again") from error


def assemble(
    kind: type[Model],
    config: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    table: Table,
    transforms: Transforms | None = None,
    dtype: torch.dtype | str = "auto",
) -> Model:
    """A model of ours that is filled with a reference's weights; none is initialised at random or held twice.

    Raises:
        ValueError: a weight is missing, left over or wrongly shaped; the message names it.
    """
    with torch.device("meta"):
        skeleton = kind(copy.deepcopy(config))
    fitted = fit(weights, skeleton, table, transforms)
    return kind.from_pretrained(None, config=config, state_dict=fitted, dtype=dtype).eval()


def fit(
    weights: Mapping[str, Tensor], module: nn.Module, table: Table, transforms: Transforms | None = None
) -> dict[str, Tensor]:
    """The reference's weights by the names that a module has for them; of tied weights one is enough.

    Raises:
        ValueError: a weight is missing, left over or wrongly shaped; the message names it.
    """
    transforms = transforms or {}
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    values: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    left_over = []
    for ours, (name, tensor) in _by_place(weights, module, set(wanted), table):
        if ours in origins:
            raise ValueError(f"weights {origins[ours]!r} and {name!r} both become {ours!r}; keep one of them")
        if ours in wanted:
            origins[ours], values[ours] = name, tensor
        elif name.rsplit(".", 1)[-1] not in DERIVED:
            left_over.append(name)
    if left_over:
        raise ValueError(f"{_count(left_over)} no place in {type(module).__name__}: {_some(left_over)}")
    if unknown := sorted(set(transforms) - set(wanted)):
        raise ValueError(f"{unknown[0]!r} is to be transformed, but {type(module).__name__} has no such weight")
    fitted = {ours: transforms[ours](value) if ours in transforms else value for ours, value in values.items()}
    _check_complete(module, set(wanted), fitted)
    for ours, tensor in fitted.items():
        if tensor.shape != wanted[ours]:
            raise ValueError(
                f"weight {origins[ours]!r} is {tuple(tensor.shape)}, but {ours!r} is {tuple(wanted[ours])}; "
                "the configuration does not describe these weights"
            )
    return fitted


def _by_place(
    weights: Mapping[str, Tensor], module: nn.Module, wanted: set[str], table: Table
) -> Iterator[tuple[str, tuple[str, Tensor]]]:
    """Our name of every weight, its name in the file, and the weight; those that transformers writes by older names
    are renamed and joined by its own table."""
    others: dict[str, str] = {}
    for name in weights:
        ours = rename(name, table)
        if ours in wanted:
            yield ours, (name, weights[name])
        elif ours is not None:
            if ours in others:
                raise ValueError(f"weights {others[ours]!r} and {name!r} both become {ours!r}; keep one of them")
            others[ours] = name
    rest = {ours: weights[name] for ours, name in others.items()}
    if rest and isinstance(module, PreTrainedModel):
        from chiasm.interop.older_names import todays  # of transformers' inner workings, so only where it is needed

        rest = todays(rest, module)
    for ours, tensor in rest.items():
        yield ours, (others.get(ours, ours), tensor)


def counterpart(
    kind: type[Model],
    config: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    table: Table,
    transforms: Transforms | None = None,
) -> Model:
    """A reference's model that is filled with our weights: `assemble` in the other direction, by the same table.

    Its weights are ours, not copies, and it is there to be saved: buffers that are computed have no values.

    Args:
        transforms: a whole name of the reference's → what makes its tensor of ours.

    Raises:
        ValueError: a weight of ours has no place in it, or one of its has none here; the message names it.
    """
    with torch.device("meta"):
        skeleton = kind(copy.deepcopy(config))
    transforms = transforms or {}
    filled, used = {}, set()
    for name, tensor in skeleton.state_dict().items():
        ours = rename(name, table)
        if ours is None:
            filled[name] = torch.zeros(tensor.shape, dtype=config.dtype)
            continue
        if ours not in weights:
            raise ValueError(f"{kind.__name__} has a weight {name!r}, for which this model has none ({ours!r})")
        used.add(ours)
        filled[name] = transforms.get(name, lambda tensor: tensor)(weights[ours]).to(config.dtype)
        if filled[name].shape != tensor.shape:
            raise ValueError(
                f"weight {ours!r} is {tuple(filled[name].shape)}, but {name!r} of {kind.__name__} is "
                f"{tuple(tensor.shape)}"
            )
    left = [name for name in weights if name not in used and name.rsplit(".", 1)[-1] not in DERIVED]
    if left:
        raise ValueError(f"{_count(left)} no place in {kind.__name__}: {_some(left)}")
    skeleton.load_state_dict(_apart(filled), assign=True)
    skeleton.tie_weights()
    return skeleton.eval()


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, each with memory of its own: a file holds no tensor twice."""
    seen: set[int] = set()
    result = {}
    for name, tensor in weights.items():
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def rename(name: str, table: Table) -> str | None:
    """A reference's name as ours: its longest prefix in the table is replaced. Without one, the name stays."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in table:
            ours = table[prefix]
            return None if ours is None else ".".join(filter(None, [ours, *parts[length:]]))
    return name


def _check_complete(module: nn.Module, wanted: set[str], fitted: Mapping[str, Tensor]) -> None:
    """Every weight has a value, and weights that are one have one value."""
    tied: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    groups = [*tied.values(), *([name] for name in wanted - {name for names in tied.values() for name in names})]
    if missing := sorted(names[0] for names in groups if not any(name in fitted for name in names)):
        raise ValueError(f"{_count(missing)} no value in the checkpoint: {_some(missing)}")
    for names in groups:
        first, *others = [name for name in names if name in fitted]
        for other in others:
            if not torch.equal(fitted[first], fitted[other]):
                raise ValueError(f"weights {first!r} and {other!r} are tied but differ; set tie_word_embeddings: false")


def _count(names: list[str]) -> str:
    return "1 weight has" if len(names) == 1 else f"{len(names)} weights have"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _file(source: str | Path, name: str) -> Any:
    return cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
