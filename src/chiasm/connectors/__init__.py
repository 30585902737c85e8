"""Patch features → visual tokens: one idea, one short file; `CONNECTORS` is the whole registry.

The files and modules in `CHIASM_CONNECTORS` add to it (`own.py`), as does `CONNECTORS["mine"] = Mine` from Python.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from chiasm.connectors.avg_pool import AveragePoolProjector
from chiasm.connectors.base import AffineConnector, Connector, GridConnector
from chiasm.connectors.c_abstractor import CAbstractor
from chiasm.connectors.idefics2_resampler import Idefics2Resampler
from chiasm.connectors.ldp import LightweightDownsampleProjector
from chiasm.connectors.linear import LinearProjector
from chiasm.connectors.mlp import MLPProjector
from chiasm.connectors.own import VARIABLE, own_connectors
from chiasm.connectors.patch_merger import PatchMerger
from chiasm.connectors.perceiver_resampler import PerceiverResampler
from chiasm.connectors.pixel_shuffle import PixelShuffleProjector
from chiasm.connectors.qformer import QFormer
from chiasm.connectors.token_packer import TokenPacker

CONNECTORS: dict[str, type[Connector]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "patch_merger": PatchMerger,
    "avg_pool": AveragePoolProjector,
    "ldp": LightweightDownsampleProjector,
    "c_abstractor": CAbstractor,
    "token_packer": TokenPacker,
    "perceiver_resampler": PerceiverResampler,
    "idefics2_resampler": Idefics2Resampler,
    "qformer": QFormer,
}

PACKAGED = frozenset(CONNECTORS)
CONNECTORS |= own_connectors(os.environ.get(VARIABLE, ""), CONNECTORS)

__all__ = [
    "CONNECTORS",
    "PACKAGED",
    "AffineConnector",
    "Connector",
    "GridConnector",
    "as_mapping",
    "build_connector",
    "checked_options",
    "connector_settings",
    "own_code",
]


def as_mapping(spec: Any) -> dict[str, Any]:
    """A name or a mapping as a mapping of the caller's own: `"mlp"` → `{"name": "mlp"}`.

    Raises:
        ValueError: it is neither, such as a class.
    """
    if isinstance(spec, str):
        return {"name": spec}
    if not isinstance(spec, dict):
        raise ValueError(
            f"connector {spec!r} is neither a name nor a mapping with one; a class of your own gets a name by "
            'chiasm.connectors.CONNECTORS["mine"] = ..., then connector="mine"'
        )
    return dict(spec)


def own_code(name: str) -> str:
    """The file of a connector from outside the package; empty for the package's, and where there is no file."""
    if name in PACKAGED or name not in CONNECTORS:
        return ""
    try:
        return Path(inspect.getfile(CONNECTORS[name])).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return ""


def connector_settings(spec: str | dict[str, Any]) -> dict[str, Any]:
    """The full settings of a connector, defaults included: `"mlp"` → `{"name": "mlp", "depth": 2, ...}`.

    Raises:
        ValueError: an unknown name or option; the message lists the known ones.
    """
    given = as_mapping(spec)
    if "name" not in given:
        raise ValueError(f"connector {spec!r} has no 'name'; name one of {', '.join(CONNECTORS)}")
    name = given.pop("name")
    if not isinstance(name, str) or name not in CONNECTORS:
        raise ValueError(
            f"connector {name!r} is unknown; choose one of {', '.join(CONNECTORS)}; "
            f"one of your own is read from the file that {VARIABLE} names"
        )
    return {"name": name, **checked_options(f"connector {name!r}", CONNECTORS[name].__init__, given)}


def checked_options(what: str, function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The keyword-only options of a function: those that are given, and the others' defaults.

    Raises:
        ValueError: an unknown option, one that is missing, or a value of another type or too small.
    """
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(given.keys() - options.keys())
    if unknown:
        known = ", ".join(options) or "none"
        raise ValueError(f"{what} has no option {', '.join(map(repr, unknown))}; its options are: {known}")
    missing = [
        option for option, default in options.items() if default is inspect.Parameter.empty and option not in given
    ]
    if missing:
        raise ValueError(f"{what} wants {', '.join(missing)}, which has no default")
    hints = get_type_hints(function)
    for option, value in given.items():
        kind = hints.get(option, object)
        if isinstance(kind, type | UnionType) and not _is_a(value, kind):
            raise ValueError(f"{what} has {option}={value!r}, expected {getattr(kind, '__name__', kind)}")
        if type(value) is int and value < 1 and float not in (get_args(kind) or (kind,)):
            raise ValueError(f"{what} has {option}={value}, expected at least 1")
    return options | given


def _is_a(value: Any, kind: type | UnionType) -> bool:
    """`isinstance`, where true is no number and a whole number is a float."""
    kinds = tuple(get_origin(part) or part for part in (get_args(kind) if isinstance(kind, UnionType) else (kind,)))
    if isinstance(value, bool):
        return bool in kinds or object in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def build_connector(
    settings: str | dict[str, Any],
    vision_width: int,
    language_width: int,
    grid: tuple[int, int],
    num_prefix: int = 0,
) -> Connector:
    """A connector with fresh weights between the two widths.

    Args:
        num_prefix: class and register tokens in front of the patches.

    Raises:
        ValueError: there are some, and the connector folds the grid.
    """
    options = connector_settings(settings)
    name = options.pop("name")
    if num_prefix and not CONNECTORS[name].takes_prefix:
        raise ValueError(
            f"connector {name!r} folds the grid of patches, but the features keep {num_prefix} class or register "
            "token(s) in front of it; read them with prefix: drop"
        )
    connector = CONNECTORS[name](vision_width, language_width, grid, **options)
    connector.num_prefix = num_prefix
    return connector
