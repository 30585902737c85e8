"""An index on a Qdrant server over HTTP: opened again, within what a server takes, and its faults in one line."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qdrant_client")

from chiasm.retrieval import Index, qdrant, read_pictures
from retrieval.pretend import ColourEncoder, paint
from retrieval.qdrant_double import LARGEST, Double, served


def test_an_index_is_opened_by_its_address(tmp_path: Path) -> None:
    paint(tmp_path / "photos", 24)
    double = Double()
    with served(double) as address:
        with pytest.raises(FileNotFoundError, match=r"holds no collection 'mine'; make it with chiasm index"):
            Index.open(f"{address}/mine")
        Index.create(f"{address}/mine", ColourEncoder(), "models/mine").add(read_pictures(tmp_path / "photos"))
        index = Index.open(f"{address}/mine", ColourEncoder())
        assert len(index) == 24 and index.model["source"] == "models/mine"
        assert {hit.metadata["colour"] for hit in index.search("red", k=6)} == {"red"}
        with pytest.raises(FileExistsError, match="collection 'mine' exists"):
            Index.create(f"{address}/mine", ColourEncoder())
    assert {path for _, path in double.calls} <= {
        f"/collections/mine{rest}"
        for rest in ("", "/exists", "/points", "/points/count", "/points/scroll", "/points/query/batch")
    }


def test_a_request_is_no_larger_than_a_server_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert qdrant.NUMBERS * 25 <= LARGEST, "a number of JSON has up to 24 signs and a comma"
    monkeypatch.setattr(qdrant, "NUMBERS", 90)  # six pictures of three vectors of five numbers
    paint(tmp_path / "photos", 24)
    double = Double(largest=8_000)
    with served(double) as address:
        index = Index.create(f"{address}/mine", ColourEncoder(several=3))
        index.add(read_pictures(tmp_path / "photos"))
        assert double.calls.count(("PUT", "/collections/mine/points")) == 4
        double.calls.clear()
        assert len(index.search_texts(["red"] * 40, k=1)) == 40
        assert double.calls.count(("POST", "/collections/mine/points/query/batch")) == 3


def test_faults_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    paint(tmp_path / "photos", 4)
    double = Double(key="secret")
    with served(double) as address:
        with pytest.raises(ConnectionError, match=r"refuses .*/mine: 401 .*; set QDRANT_API_KEY"):
            Index.open(f"{address}/mine")
        monkeypatch.setenv("QDRANT_API_KEY", "secret")
        index = Index.create(f"{address}/mine", ColourEncoder())
        double.broken = True
        with pytest.raises(ConnectionError, match=r"the Qdrant server refuses .*: 500 .*it is broken"):
            index.add(read_pictures(tmp_path / "photos"))
        code, _, err = run("search", f"{address}/mine", "red")
        assert code == 2 and "Traceback" not in err and "it is broken" in " ".join(err.split())
    with pytest.raises(ConnectionError, match=r"no Qdrant server answers for .*/mine"):
        index.search("red")
