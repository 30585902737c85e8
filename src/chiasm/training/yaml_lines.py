"""YAML files that people write, and the line of every value: an error is one line with file, line, key and reason."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Keys = tuple[str | int, ...]
Origins = dict[Keys, str]
"""Where each value was written: `file:line`, or the text of an override."""


class RecipeError(ValueError):
    """One line: where, which key, what is wrong."""


def read_yaml(path: Path, expected: str) -> tuple[dict[str, Any], Origins]:
    """A mapping from a YAML file and where its values were written; `expected` says what it should be."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        origins: Origins = {}
        if node is not None:
            _note_lines(node, (), path, origins)
        raw = loader.construct_document(node) if node is not None else None
    except RecursionError:
        raise RecipeError(f"{path}: an alias contains itself") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        raise RecipeError(f"{path}: YAML allows no character #x{error.character:04x}; remove it") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error})") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}:1: {expected}, found {type(raw).__name__}")
    return raw, origins


def _note_lines(node: yaml.Node, at: Keys, path: Path, origins: Origins) -> None:
    origins.setdefault(at, f"{path}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{path}:{key.start_mark.line + 1}: a key is a word, not a list or a mapping")
            here = (*at, key.value)
            if here in origins:
                raise RecipeError(f"{path}:{key.start_mark.line + 1}: {dotted(here)}: this key stands here twice")
            origins[here] = f"{path}:{key.start_mark.line + 1}"
            _note_lines(value, here, path, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*at, index), path, origins)


def dotted(at: Keys) -> str:
    return ".".join(map(str, at))


def origin_of(at: Keys, origins: Origins, name: str) -> str:
    """Where a value was written, or the nearest that holds it; `name` where nothing is known."""
    while at and at not in origins:
        at = at[:-1]
    return origins.get(at, name)


def reason_of(error: Any, at: Keys, keys_at: Callable[[Keys], list[str]]) -> str:
    """What is wrong, of an error of pydantic's: `keys_at` tells the keys that are known at a place."""
    if error["type"] == "extra_forbidden":
        known = keys_at(at[:-1])
        close = difflib.get_close_matches(str(at[-1]), known, n=1)
        return "unknown key; " + (f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}")
    if error["type"] == "missing":
        return "this key is missing"
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return reason if error["type"] == "value_error" else f"{error['input']!r:.80}: {reason}"
