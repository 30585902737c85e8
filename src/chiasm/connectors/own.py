"""Connectors outside the package: `CHIASM_CONNECTORS` names files or modules, each with a `CONNECTORS` table."""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from chiasm.connectors.base import Connector

VARIABLE, TABLE = "CHIASM_CONNECTORS", "CONNECTORS"


def own_connectors(places: str, taken: dict[str, type[Connector]]) -> dict[str, type[Connector]]:
    """The connectors of all tables together.

    Args:
        places: `.py` files and importable modules, with `os.pathsep` between them, as in PATH.
        taken: names that are there already.

    Raises:
        ValueError: a place cannot be read or has no such table, a name is taken, or a class is no whole connector.
    """
    found: dict[str, type[Connector]] = {}
    for place in filter(None, places.split(os.pathsep)):
        table = getattr(_module(place), TABLE, None)
        if not isinstance(table, dict) or not table:
            raise ValueError(f'{VARIABLE}: {place} has no table {TABLE} = {{"name": Class}}, which says what it holds')
        for name, kind in table.items():
            if name in taken or name in found or name == "none":
                raise ValueError(f"{VARIABLE}: {place} names a connector {name!r}, which is taken; choose another name")
            found[name] = _checked(f"{VARIABLE}: {place}: {name!r}", kind)
    return found


def _checked(what: str, kind: object) -> type[Connector]:
    if not (isinstance(kind, type) and issubclass(kind, Connector)):
        raise ValueError(f"{what} is {kind!r}, expected a class that extends chiasm.connectors.Connector")
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise ValueError(f"{what}: {kind.__name__} does not say its {missing}; chiasm/connectors/avg_pool.py shows how")
    return kind


def _module(place: str) -> ModuleType:
    path = Path(place).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"{VARIABLE}: no file {path.absolute()}")
    try:
        return _of_file(path) if path.suffix == ".py" else importlib.import_module(place)
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
        where = f"{place}, line {lines[-1]}," if lines else place
        raise ValueError(f"{VARIABLE}: {where} cannot be imported: {type(error).__name__}: {error}") from error


def _of_file(path: Path) -> ModuleType:
    name = f"{__name__}.{path.stem}_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
