"""Chiasm: where vision crosses into language."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chiasm.api import train
    from chiasm.comparison.compare import compare
    from chiasm.connecting.connect import connect
    from chiasm.dual_encoder import DualEncoder
    from chiasm.vlm import VLM, load

__version__ = "0.1.0"

_PUBLIC = {
    "VLM": "chiasm.vlm",
    "DualEncoder": "chiasm.dual_encoder",
    "compare": "chiasm.comparison.compare",
    "connect": "chiasm.connecting.connect",
    "load": "chiasm.vlm",
    "train": "chiasm.api",
}

__all__ = ["VLM", "DualEncoder", "compare", "connect", "load", "train"]


def __getattr__(name: str) -> Any:
    """The public names are imported when they are first used, so that `chiasm --help` needs no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'chiasm' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
