"""The scan by codes finds exactly what float32 products of all rows find, whatever the rows are like."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from chiasm.retrieval import codes
from chiasm.retrieval.approximate import FaissSearch
from chiasm.retrieval.scan import ExactScan
from chiasm.retrieval.store import Snapshot, Store

ROWS, WIDTH = 8_500, 48


def state(folder: Path, vectors: Tensor, parts: int = 3) -> Snapshot:
    store = Store.create(folder / "index", {})
    for part in vectors.chunk(parts):
        store.append([{"id": str(n)} for n in range(len(part))], part.numpy())
    return store.snapshot()


def rows(kind: str, count: int, several: int = 1) -> Tensor:
    vectors = torch.randn(count, several, WIDTH)
    if kind == "decaying":
        vectors = vectors / torch.arange(1, WIDTH + 1) + 0.3
    if kind == "outlying":
        vectors[..., 7] += 40
    if kind == "clustered":
        vectors = vectors * 1e-3 + torch.randn(9, 1, WIDTH)[torch.randint(0, 9, (count,))]
    if kind == "repeated":
        vectors = vectors[torch.randint(0, min(20, count), (count,))]
    return torch.nn.functional.normalize(vectors, dim=-1)


def expected(vectors: Tensor, queries: Tensor, k: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("nkd,bd->bnk", vectors.double(), queries.double()).amax(2)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return scores.topk(k), scores


@pytest.mark.skipif(not codes.supported(), reason="this processor has no kernel for codes")
@pytest.mark.parametrize("several", [1, 3])
@pytest.mark.parametrize("kind", ["random", "decaying", "outlying", "clustered", "repeated"])
def test_codes_find_what_float32_finds(tmp_path: Path, kind: str, several: int) -> None:
    vectors, queries = rows(kind, ROWS, several), rows(kind, 5)[:, 0]
    scan = ExactScan(state(tmp_path, vectors))
    scan.prepare()
    assert scan.codes is not None
    keep = torch.rand(ROWS) < 0.5
    for kept in (None, keep):
        (best, _), scores = expected(vectors, queries, 10, kept)
        for query, (found, values) in enumerate(scan.search(queries, 10, kept)):
            assert len(set(found.tolist())) == 10
            torch.testing.assert_close(values.double(), best[query], rtol=0, atol=1e-6)
            torch.testing.assert_close(scores[query, found], best[query], rtol=0, atol=1e-6)


@pytest.mark.skipif(not codes.supported(), reason="this processor has no kernel for codes")
@pytest.mark.parametrize("kind", ["random", "decaying", "outlying", "clustered"])
def test_no_code_is_off_by_more_than_the_bound(tmp_path: Path, kind: str) -> None:
    vectors, queries = rows(kind, ROWS)[:, 0], rows(kind, 4)[:, 0]
    coded = codes.Codes([vectors[:, None]], ROWS, (1, WIDTH), vectors.mean(0))
    found = coded.scan(queries)
    values = torch.cat([tile.flatten(1) for tile in found.tiles], dim=1)
    products = values[:, :ROWS] * found.factor[:, None] + found.constant[:, None]
    off = (products - queries @ vectors.T).abs().amax(dim=1)
    assert (off <= found.bound * found.factor).all()
    assert torch.isinf(values[:, ROWS:]).all()


def test_many_queries_are_coded_by_themselves_and_few_rows_are_not(tmp_path: Path) -> None:
    vectors = rows("random", ROWS)
    scan = ExactScan(state(tmp_path, vectors))
    queries = rows("random", 130)[:, 0]
    alone = scan.search(queries[:3], 4)
    assert scan.codes is None
    together = scan.search(queries, 4)
    assert (scan.codes is not None) == codes.supported()
    for (found, _), (again, _) in zip(alone, together, strict=False):
        assert torch.equal(found, again)


def test_few_kept_rows_ties_and_none(tmp_path: Path) -> None:
    vectors = rows("random", 300)
    vectors[7] = vectors[5]
    scan = ExactScan(state(tmp_path, vectors))
    keep = torch.zeros(300, dtype=torch.bool)
    keep[[5, 7, 9]] = True
    (found, scores), *_ = scan.search(vectors[7], 10, keep)
    assert found[:2].tolist() == [5, 7] and len(found) == 3 and scores[0] == scores[1]
    assert len(scan.search(vectors[7], 10, keep & False)[0][0]) == 0
    assert len(scan.search(vectors[7], 999)[0][0]) == 300


def test_faiss_finds_most_of_it_and_keeps_what_it_trained(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors, queries = rows("clustered", 3_000, 2), rows("clustered", 8)[:, 0]
    taken = state(tmp_path, vectors[:2_000])
    FaissSearch(taken, tmp_path / "index")
    store = Store(tmp_path / "index")
    store.append([{"id": f"more {n}"} for n in range(1_000)], vectors[2_000:].numpy(), gone=range(50))
    grown = FaissSearch(store.snapshot(), tmp_path / "index")
    assert grown.index.ntotal == 6_000
    keep = torch.rand(3_000) < 0.7
    live = keep & (torch.arange(3_000) >= 50)
    (_, nearest), _ = expected(vectors, queries, 5, live)
    found = grown.search(queries, 5, keep)
    share = np.mean([len(set(a.tolist()) & set(b.tolist())) / 5 for (a, _), b in zip(found, nearest, strict=True)])
    assert share >= 0.9 and all(live[a].all() for a, _ in found)
