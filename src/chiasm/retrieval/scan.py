"""The exact scan: the k nearest rows by float32 products, certainly all of them.

Rows are read as they are for the first queries. When more come, they are coded with 8 bits once (`codes.py`): a query
then reads a quarter of the memory, and only rows that the codes cannot exclude are multiplied in float32.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiasm.retrieval import codes
from chiasm.retrieval.store import Snapshot

CODES_FROM_ROWS = 8_192
CODES_FROM_QUERIES = 128
"""Coding costs about as much as so many queries in float32."""
BATCH = 64
FEW = 1 / 16
"""Below this share of the rows they are picked out and multiplied alone."""
PAIRS = 8_192

Found = list[tuple[Int[Tensor, " found"], Float[Tensor, " found"]]]
"""For each query the rows and their scores, best first; of equal scores the older row first."""


class ExactScan:
    """Searches one snapshot. A row is a picture of K vectors, its score the largest product with one of them."""

    def __init__(self, state: Snapshot) -> None:
        self.state, self.queries_seen = state, 0
        self.codes: codes.Codes | None = None
        self.live = torch.from_numpy(state.live)
        self.worth_coding = len(state) * state.shape[0] >= CODES_FROM_ROWS and codes.supported()

    def prepare(self) -> None:
        """Codes the rows now, for a server that expects many queries."""
        if self.codes is None and self.worth_coding:
            K, D = self.state.shape
            total = sum((part.sum(axis=(0, 1), dtype=np.float64) for part in self.state.parts), np.zeros(D))
            mean = torch.from_numpy(total / (len(self.state) * K)).float()
            pieces = (part.flatten(0, 1) for part in self._parts())
            self.codes = codes.Codes(pieces, len(self.state) * K, D, mean)

    def search(self, queries: Float[Tensor, "B D"], k: int, keep: Bool[Tensor, " rows"] | None = None) -> Found:
        """The k nearest live rows of each query.

        Args:
            keep: rows that may be found.
        """
        keep = self.live if keep is None else self.live & keep
        count = int(keep.sum())
        k = min(k, count)
        self.queries_seen += len(queries)
        if k == 0:
            return [(torch.empty(0, dtype=torch.long), torch.empty(0))] * len(queries)
        if self.queries_seen >= CODES_FROM_QUERIES:
            self.prepare()
        found: Found = []
        for batch in queries.float().split(BATCH):
            if count < FEW * len(keep):
                found += self._among(batch, k, keep.nonzero()[:, 0])
            elif self.codes is not None and k * codes.GROUP * self.state.shape[0] <= len(keep):
                found += self._coded(batch, k, None if count == len(keep) else keep)
            else:
                found += self._plain(batch, k, keep)
        return found

    def _parts(self) -> Iterator[Float[Tensor, "rows K D"]]:
        return map(torch.from_numpy, self.state.parts)

    def _plain(self, queries: Float[Tensor, "B D"], k: int, keep: Bool[Tensor, " rows"]) -> Found:
        """Every row in float32."""
        scores = torch.cat([(part.flatten(0, 1) @ queries.T).view(*part.shape[:2], -1).amax(1) for part in self._parts()])
        scores = scores.T.masked_fill(~keep, -torch.inf)
        return [best(torch.arange(len(keep)), row, k) for row in scores]

    def _among(self, queries: Float[Tensor, "B D"], k: int, rows: Int[Tensor, " rows"]) -> Found:
        """A few rows in float32."""
        vectors = torch.from_numpy(self.state.take(rows.numpy()))
        scores = (vectors.flatten(0, 1) @ queries.T).view(*vectors.shape[:2], -1).amax(1)
        return [best(rows, row, k) for row in scores.T]

    def _coded(self, queries: Float[Tensor, "B D"], k: int, keep: Bool[Tensor, " rows"] | None) -> Found:
        """By codes first.

        The k rows with the best codes are multiplied exactly: the worst of them is a score that the true k-th can only
        exceed. Every row whose code may reach it, by the bound, is multiplied exactly too.
        """
        assert self.codes is not None
        coded = self.codes.scan(queries)
        scores, K = coded.values, self.state.shape[0]
        if K > 1:
            scores = _padded(scores[:, : len(self.live) * K].unflatten(1, (-1, K)).amax(2))
        if keep is not None:
            scores[:, : len(keep)].masked_fill_(~keep, -torch.inf)
        first = _leaders(scores, k)
        query = torch.arange(len(queries)).repeat_interleave(k)
        floor = self._exact(queries, query, first.flatten()).view(-1, k).amin(dim=1)
        flat = torch.from_numpy(np.flatnonzero((scores >= coded.least(floor)[:, None]).numpy()))
        query, rows = flat // scores.shape[1], flat % scores.shape[1]
        exact = self._exact(queries, query, rows)
        ends = torch.bincount(query, minlength=len(queries)).tolist()
        return [best(r, s, k) for r, s in zip(rows.split(ends), exact.split(ends), strict=True)]

    def _exact(
        self, queries: Float[Tensor, "B D"], query: Int[Tensor, " pairs"], rows: Int[Tensor, " pairs"]
    ) -> Float[Tensor, " pairs"]:
        """Scores in float32 of pairs of a query and a row."""
        scores = [
            torch.einsum("pkd,pd->pk", torch.from_numpy(self.state.take(r.numpy())), queries[q]).amax(1)
            for q, r in zip(query.split(PAIRS), rows.split(PAIRS), strict=True)
        ]
        return torch.cat(scores)


def _leaders(scores: Float[Tensor, "B rows"], k: int) -> Int[Tensor, "B k"]:
    """The k rows with the highest scores, by way of the k groups with the highest ones."""
    groups = scores.shape[1] // codes.GROUP
    members = scores.unflatten(1, (codes.GROUP, groups))
    best = members.amax(dim=1).topk(k, dim=1).indices
    inside = members.gather(2, best[:, None].expand(-1, codes.GROUP, -1)).flatten(1)
    place = inside.topk(k, dim=1).indices
    return place // k * groups + best.gather(1, place % k)


def _padded(scores: Float[Tensor, "B rows"]) -> Float[Tensor, "B padded"]:
    return torch.nn.functional.pad(scores, (0, -scores.shape[1] % codes.GROUP), value=-torch.inf)


def best(rows: Int[Tensor, " rows"], scores: Float[Tensor, " rows"], k: int) -> tuple[Tensor, Tensor]:
    """The k best, by score and then by age: `topk` alone breaks ties as it likes."""
    if len(scores) > 4 * k:
        near = (scores >= scores.topk(k).values[-1]).nonzero()[:, 0]
        rows, scores = rows[near], scores[near]
    order = scores.sort(descending=True, stable=True).indices[:k]
    return rows[order], scores[order]
