"""`chiasm convert`: a Chiasm model as a checkpoint of another tool, or one line that says why it cannot be one.

Where a model goes is decided by two tables of exact names: `TARGETS`, the tools, and `ROUTES`, which kind of checkpoint
a fusion and a connector become in transformers. `docs/convert.md` is written from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.fusion.base import FusionModel
from chiasm.interop.export.blip2 import export_blip2
from chiasm.interop.export.check import check_folder
from chiasm.interop.export.idefics import export_idefics
from chiasm.interop.export.idefics2 import export_idefics2
from chiasm.interop.export.internvl import export_internvl
from chiasm.interop.export.llava import export_llava
from chiasm.interop.export.paligemma import export_paligemma
from chiasm.interop.export.parts import Exported, merged

Export = Callable[[FusionModel, Any], Exported]


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint of transformers.

    Args:
        export: makes one of a model and its processor, or refuses.
        holds: what such a checkpoint holds, for the documentation.
        runs: the other tools that run it, and on which condition.
    """

    export: Export
    holds: str
    runs: dict[str, str]
