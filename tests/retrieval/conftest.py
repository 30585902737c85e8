"""Where an index can be: a folder, Qdrant in this process, and a double of its server."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chiasm.retrieval import Index


@pytest.fixture(params=["folder", "qdrant", "server"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Any], Index]]:
    """Makes an empty index."""
    if request.param == "folder":
        yield lambda encoder: Index.create(tmp_path / "index", encoder, "somewhere")
        return
    pytest.importorskip("qdrant_client")
    from retrieval.qdrant_double import Double, served

    if request.param == "qdrant":
        yield lambda encoder: Index.create(":memory:", encoder, "somewhere")
        return
    with served(Double()) as address:
        yield lambda encoder: Index.create(f"{address}/pictures", encoder, "somewhere")
