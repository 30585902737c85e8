"""Single files of a model's folder or hub id: a missing one is None, a damaged or unreachable one is an error."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from transformers.utils import cached_file

from chiasm.sources.errors import SourceError

ASKED = "config.json"
"""The file that shows whether a hub id can be read."""


def find_file(source: str | os.PathLike, name: str) -> Path | None:
    """Where a file of a source is, fetched if need be; None where the source does not have it.

    Raises:
        SourceError: the hub id cannot be read.
    """
    if os.path.isdir(source):
        path = Path(source) / name
        return path if path.is_file() else None
    require_reachable(str(source))
    found = cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def read_json(source: str | os.PathLike, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of a source; None where the source does not have the file.

    Raises:
        ValueError: the file holds something else.
        SourceError: the hub id cannot be read.
    """
    path = find_file(source, name)
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}); fetch it again or remove it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: {value!r:.40} is no JSON object; fetch it again or remove it")
    return value


def require_reachable(
    source: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    **_: Any,
) -> None:
    """Refuses a hub id that cannot be read, at once: transformers tries again for half a minute.

    Raises:
        SourceError: there is no network, no such repository, or no permission.
    """
    known = local_files_only or os.path.isdir(source)
    if known or isinstance(try_to_load_from_cache(source, ASKED, cache_dir=cache_dir, revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(source, ASKED, revision=revision), token=token, timeout=10)
    except EntryNotFoundError:
        return
    except GatedRepoError as error:
        raise SourceError(
            f"hub id {source!r} is gated; accept its terms on its page and log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"hub id {source!r} does not exist or is private; check its spelling, or log in with: hf auth login"
        ) from error
    except Exception as error:  # every HTTP library has its own for a network that is not there
        raise SourceError(
            f"hub id {source!r} is not in the cache and the hub cannot be reached; connect to a network, "
            "or name a local folder or an alias"
        ) from error
