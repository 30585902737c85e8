"""transformers' own tests, imported from the `tests` folder of its source distribution as the package `upstream_tests`.

A distribution leaves out sub-folders. What the modules in the folder import from there is empty here, unless the folder
of a whole repository is named.
"""

import atexit
import importlib
import os
import shutil
import sys
import tempfile
from types import ModuleType
from typing import Any
from unittest.mock import patch

import tiny

TESTS = os.environ.get("CHIASM_TRANSFORMERS_TESTS")
"""The folder; these tests are left out without it."""

PACKAGE = "upstream_tests"

LEFT_OUT: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "output_hidden_states": True,
            "output_attentions": True,
            "return_dict": False,
            "dtype": "float16",
            "architectures": ["SomeModel"],
            "problem_type": "regression",
        }
    },
}
"""Module that is not in the distribution → what is imported from it."""


def local_path(url: str) -> str:
    """A picture of our own in place of one on the network."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny.picture().save(path := os.path.join(folder, "picture.png"))
    return path


def upstream(module: str) -> ModuleType:
    """A module of the folder, such as `test_modeling_common`."""
    if PACKAGE not in sys.modules:
        _package(PACKAGE, TESTS)
        for name, contents in LEFT_OUT.items():
            parent, _, leaf = name.rpartition(".")
            if not os.path.exists(os.path.join(str(TESTS), parent, f"{leaf}.py")):
                _package(f"{PACKAGE}.{parent}")
                _package(f"{PACKAGE}.{name}").__dict__.update(contents)
        _package("fetch_hub_objects_for_ci").__dict__.update(url_to_local_path=local_path)
    with patch("transformers.utils.direct_transformers_import"):  # it looks for the package that it is in here
        return importlib.import_module(f"{PACKAGE}.{module}")


def _package(name: str, folder: str | None = None) -> ModuleType:
    made = sys.modules[name] = ModuleType(name)
    made.__path__ = [] if folder is None else [folder]
    return made
