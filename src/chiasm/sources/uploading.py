"""A model's folder goes to the hub in one commit."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

CARD, HERE = "README.md", "this/model"
"""The model card, and how it names the place where it is."""


def upload(
    save: Callable[..., None], repository: str, private: bool | None = None, token: str | None = None, **kwargs: Any
) -> str:
    """Uploads what `save(folder, **kwargs)` writes; returns the repository's address.

    Args:
        repository: `name/model`; made where it is not there.
        **kwargs: of `save`, and `commit_message`.
    """
    message = kwargs.pop("commit_message", "Upload a Chiasm model")
    hub = HfApi(token=token)
    address = str(hub.create_repo(repository, private=private, exist_ok=True))
    with tempfile.TemporaryDirectory() as folder:
        save(folder, **kwargs)
        card = Path(folder, CARD)
        card.write_text(card.read_text(encoding="utf-8").replace(HERE, repository), encoding="utf-8")
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return address
