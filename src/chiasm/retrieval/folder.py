"""An index in a folder: exact search, or faiss for many vectors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chiasm.retrieval.adding import Known
from chiasm.retrieval.approximate import FaissSearch, installed
from chiasm.retrieval.index import Conditions, Gone, Index
from chiasm.retrieval.records import Encoder, Hit
from chiasm.retrieval.scan import ExactScan
from chiasm.retrieval.store import Store
from chiasm.retrieval.where import Where, conditions

EXACT_UP_TO = 200_000
"""Vectors that are scanned exactly."""
SEGMENTS = 16
"""More than these are made one at the end of an addition."""
WAYS = ("auto", "exact", "faiss")


class FolderIndex(Index):
    """One writer at a time; every reader keeps the state that it opened, until `refresh`."""

    def __init__(self, folder: Path, encoder: Encoder | None, way: str = "auto", verify: bool = True) -> None:
        if way not in WAYS:
            raise ValueError(f"way is {way!r}, expected one of {', '.join(WAYS)}")
        self.folder, self.way, self.store = folder, way, Store(folder)
        self._open(verify)
        super().__init__(str(folder), encoder)

    @classmethod
    def make(cls, folder: Path, encoder: Encoder, model: dict[str, Any]) -> "FolderIndex":
        """A new one."""
        Store.create(folder, model)
        return cls(folder, encoder)

    @property
    def model(self) -> dict[str, Any]:
        return self.state.manifest["model"]

    def __len__(self) -> int:
        return int(self.state.live.sum())

    def refresh(self) -> None:
        """Reads the present state."""
        self._open(verify=False)

    def items(self, where: Conditions = None) -> Iterator[Hit]:
        rows = self._keep(conditions(where))
        kept = self.live if rows is None else rows & self.live
        return (Hit.of(self.state.records[row], 0.0) for row in kept.nonzero()[:, 0].tolist())

    def prepare(self) -> None:
        """Readies the search for many queries; by itself that happens after some hundred."""
        self._searcher().prepare()

    def _nearest(self, vectors: Float[Tensor, "B D"], k: int, where: Conditions) -> list[list[Hit]]:
        keep = self._keep(conditions(where))
        if len(self) and vectors.shape[1] != self.state.shape[1]:
            raise ValueError(f"vectors are {vectors.shape[1]} wide, the index holds {self.state.shape[1]}")
        found = (
            self._searcher().search(vectors, k, keep)
            if len(self)
            else [(torch.empty(0), torch.empty(0))] * len(vectors)
        )
        return [
            [Hit.of(self.state.records[row], score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]
            for rows, scores in found
        ]

    def compact(self) -> None:
        with self.store.writing():
            self.store.compact()
        self.refresh()

    def _open(self, verify: bool) -> None:
        self.state = self.store.snapshot(verify)
        self.live = torch.from_numpy(self.state.live)
        self._metadata: list[dict[str, Any]] | None = None
        self._search: ExactScan | FaissSearch | None = None

    def _searcher(self) -> ExactScan | FaissSearch:
        if self._search is None:
            many = len(self.state) * self.state.shape[0] > EXACT_UP_TO
            faiss = self.way == "faiss" or (self.way == "auto" and many and installed())
            self._search = FaissSearch(self.state, self.folder) if faiss else ExactScan(self.state)
        return self._search

    def _keep(self, asked: list[Where]) -> Bool[Tensor, " rows"] | None:
        """The rows that meet the conditions, None for all."""
        if not asked:
            return None
        if self._metadata is None:
            self._metadata = [record["metadata"] for record in self.state.records]
        for one in asked:
            if self._metadata and not any(map(one.reads, self._metadata)):
                self._refuse(one, self._metadata)
        held = [all(one.holds(metadata) for one in asked) for metadata in self._metadata]
        return torch.tensor(held, dtype=torch.bool)

    @staticmethod
    def _refuse(asked: Where, metadata: list[dict[str, Any]]) -> None:
        """Says why a condition can hold for no picture at all."""
        known = sorted({name for one in metadata for name in one})
        if asked.key not in known:
            raise ValueError(f"no picture has the metadata {asked.key!r}; there are {', '.join(known) or 'none'}")
        value = next((one[asked.key] for one in metadata if one.get(asked.key) is not None), None)
        raise ValueError(
            f"condition {asked.key}{asked.operator}{asked.values[0]} compares numbers, but {asked.key!r} is none for "
            f"any picture, {value!r} for one; write numbers without quotes in the metadata, or ask with = or in"
        )

    @contextmanager
    def _writing(self) -> Iterator[Known]:
        with self.store.writing():
            self.refresh()
            rows = self.state.live.nonzero()[0].tolist()
            self._row_of = {self.state.records[row]["id"]: row for row in rows}
            self._count = len(self.state)
            try:
                yield Known(self.state.records[row] for row in rows)
            finally:
                self.refresh()

    def _append(self, records: list[dict[str, Any]], vectors: Float[Tensor, "rows K D"], gone: Gone) -> None:
        names = [*(record["id"] for record in records), *chain.from_iterable(gone.values())]
        rows = [row for name in names if (row := self._row_of.pop(name, None)) is not None]
        self.store.append(records, vectors.numpy(), rows)
        self._row_of |= {record["id"]: self._count + place for place, record in enumerate(records)}
        self._count += len(records)

    def _vectors(self, ids: Sequence[str]) -> Float[Tensor, "rows K D"]:
        rows = np.array([self._row_of[name] for name in ids])
        if rows.max() >= len(self.state):
            self.refresh()
        return torch.from_numpy(self.state.take(rows))

    def _remove(self, ids: Sequence[str]) -> None:
        self.store.delete(self._row_of[name] for name in ids)

    def _finish(self) -> None:
        if len(self.store.manifest()["segments"]) > SEGMENTS:
            self.store.compact()
