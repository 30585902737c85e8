"""Beyond so many vectors faiss searches: the same calls and nearly the same hits; what it trained is kept."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("faiss")

from chiasm.data.schema import ImageRef
from chiasm.retrieval import Index, Item
from chiasm.retrieval.approximate import KEPT, FaissSearch
from chiasm.retrieval.folder import FolderIndex
from chiasm.retrieval.scan import ExactScan
from chiasm.retrieval.store import Store
from retrieval.pretend import COLOURS, ColourEncoder


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """What faiss trained on an index's vectors."""
    vectors = np.random.default_rng(0).standard_normal((300, 1, 8)).astype("f4")
    store = Store.create(tmp_path / "index", {"source": "a", "fingerprint": "b"})
    store.append([{"id": str(n), "key": str(n), "path": None, "metadata": {}} for n in range(300)], vectors)
    FaissSearch(store.snapshot(), store.folder)
    return store.folder / KEPT


def trained(monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """How often a search trains anew."""
    times: list[FaissSearch] = []
    train = FaissSearch._trained
    with monkeypatch.context() as patched:
        patched.setattr(FaissSearch, "_trained", lambda self: times.append(self) or train(self))
        assert FaissSearch(Store(folder).snapshot(), folder).index.ntotal == 300
    return len(times)


@pytest.mark.parametrize("harm", ["empty", "torn", "changed", "other line", "older"])
def test_what_is_not_whole_is_made_again(kept: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    assert trained(monkeypatch, kept.parent) == 0
    whole = kept.read_bytes()
    digest, said, body = whole.split(b"\n", 2)
    changed = body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]
    kept.write_bytes(
        {
            "empty": b"",
            "torn": whole[: len(whole) // 2],
            "changed": b"\n".join([digest, said, changed]),
            "other line": b"\n".join([digest, b"7", body]),
            "older": b'{"segments": [], "bytes": 1}\n' + body,
        }[harm]
    )
    assert trained(monkeypatch, kept.parent) == 1 and kept.read_bytes() != b""
    assert trained(monkeypatch, kept.parent) == 0


def test_a_search_does_not_need_to_keep(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.unlink()
    kept.mkdir()
    assert trained(monkeypatch, kept.parent) == 1
    assert not list(kept.parent.glob("*.new"))


def test_what_is_kept_is_on_disk_before_it_has_its_name(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.unlink()
    done: list[str] = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, call=call, name=name: done.append(name) or call(*given))
    FaissSearch(Store(kept.parent).snapshot(), kept.parent)
    assert done == ["fsync", "replace", "fsync"]


def test_a_writer_sweeps_what_a_kill_left(kept: Path) -> None:
    left = kept.with_name(f"{KEPT}.123.new")
    left.write_bytes(b"half")
    with Store(kept.parent).writing():
        assert not left.exists() and kept.exists()


def pictures(count: int, start: int = 0) -> list[Item]:
    """Small pictures of any colour."""
    colours = np.random.default_rng(start).integers(0, 256, (count, 3)).tolist()
    return [
        Item(str(n), ImageRef.of(Image.new("RGB", (4, 4), tuple(colour))), {"odd": n % 2, "late": start > 0})
        for n, colour in enumerate(colours, start)
    ]


def test_an_index_that_grows_is_searched_by_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.retrieval.folder.EXACT_UP_TO", 500)
    encoder = ColourEncoder()
    index = Index.create(tmp_path / "index", encoder)
    assert isinstance(index, FolderIndex)
    index.add(pictures(400))
    assert index.search("red", 1) and isinstance(index._search, ExactScan) and not (tmp_path / "index" / KEPT).exists()

    def near(**asked: Any) -> float:
        """The share of what an exact search finds that this one finds too."""
        exact = Index.open(tmp_path / "index", encoder, way="exact").search_texts(["red", "green", "blue"], 10, **asked)
        found = index.search_texts(["red", "green", "blue"], 10, **asked)
        assert isinstance(index._search, FaissSearch) and [len(hits) for hits in found] == [10] * 3
        assert all(hits == sorted(hits, key=lambda hit: -hit.score) for hits in found)
        pairs = zip(found, exact, strict=True)
        return float(np.mean([len({hit.id for hit in a} & {hit.id for hit in b}) / 10 for a, b in pairs]))

    index.add(pictures(400, start=400))
    assert near() >= 0.9 and near(where="odd=1") >= 0.9 and near(copies=True) >= 0.9
    best = index.search("red", 1)[0]
    index.delete([best.id])
    assert near() >= 0.9 and best.id not in {hit.id for hit in index.search("red", 99)}
    red = ImageRef.of(Image.new("RGB", (4, 4), COLOURS["red"]))
    index.add([Item("new", red), Item("copy", red)])
    assert index.search("red", 1)[0].id == "new" and near() >= 0.9
    assert {hit.id for hit in index.search("red", 2, copies=True)} == {"new", "copy"}
    assert not {"new", "copy"} & {hit.id for hit in index.search_images([red], 5, exclude_self=True)[0]}
    index.compact()
    assert near() >= 0.9 and len(index) == 801
    assert Index.open(tmp_path / "index", encoder).search("red", 1)[0].id == "new"
