"""What an addition does with each picture: encode it, store its metadata anew, leave it as it is, or refuse it."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from chiasm.data.schema import ImageError, SampleError
from chiasm.retrieval.records import Added, Item

COMMIT_ITEMS, COMMIT_SECONDS = 512, 10.0
"""New pictures are on disk after so many, or so long."""

Record = dict[str, Any]


@dataclass
class Known:
    """What an index holds, by id and by content, while it is written."""

    records: dict[str, Record]
    keys: Counter[str]

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Known":
        by_id = {record["id"]: record for record in records}
        return cls(by_id, Counter(record["key"] for record in by_id.values()))

    def note(self, record: Record) -> None:
        if record["id"] in self.records:
            old = self.records[record["id"]]["key"]
            self.keys[old] -= 1
            if not self.keys[old]:
                del self.keys[old]
        self.records[record["id"]] = record
        self.keys[record["key"]] += 1


@dataclass
class Pending:
    """Pictures that are looked at but not yet on disk."""

    records: list[Record] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return len(self.records) >= COMMIT_ITEMS or time.monotonic() - self.since > COMMIT_SECONDS


@dataclass(frozen=True)
class Kind:
    """What becomes of a picture: the field of the report, and whether it is encoded and stored."""

    report: str
    encode: bool
    store: bool


UNCHANGED = Kind("unchanged", False, False)


class Intake:
    """Sorts the pictures of one addition and keeps its report.

    Args:
        known: what the index holds; what is to be stored is noted there.
        skip_bad: report what cannot be read, instead of raising.
        prepare: a picture as the model reads it, so that a batch of photographs is never held in full.
    """

    def __init__(self, known: Known, skip_bad: bool, prepare: Callable[[Image.Image], Any]) -> None:
        self.known, self.skip_bad, self.prepare, self.report = known, skip_bad, prepare, Added()
        self.taken: dict[str, Record] = {}

    def sort(
        self, chunk: Sequence[Item | SampleError], pool: Executor
    ) -> tuple[list[tuple[Record, Any]], list[Record]]:
        """Records and prepared pictures to encode, and records to store with the vectors that are there.

        Raises:
            ImageError, SampleError or ValueError: a picture cannot be read, or its id stands for another one.
        """
        new: list[tuple[Record, Any]] = []
        old: list[Record] = []
        for item, (record, image, error) in zip(chunk, pool.map(self._look, chunk), strict=True):
            error = error or self._clash(record)
            if error is not None:
                if not self.skip_bad:
                    raise error
                self.report.bad[item.sample_id if isinstance(item, SampleError) else item.id] = str(error)
                continue
            kind = UNCHANGED if record["id"] in self.taken else self._kind(record)
            self.taken[record["id"]] = record
            getattr(self.report, kind.report).append(record["id"])
            if kind.encode and not isinstance(item, SampleError):
                new.append((record, self.prepare(item.image.load()) if image is None else image))
            elif kind.store:
                old.append(record)
            if kind.store:
                self.known.note(record)
        return new, old

    def _look(self, item: Item | SampleError) -> tuple[Record, Any, ValueError | None]:
        """A picture's record, the prepared picture where its content is new, or why it cannot be read."""
        if isinstance(item, SampleError):
            return {}, None, item
        try:
            record = item.record()
            return record, None if record["key"] in self.known.keys else self.prepare(item.image.load()), None
        except ImageError as error:
            return {}, None, error

    def _clash(self, record: Record) -> ValueError | None:
        """Why a picture's id cannot be told from that of another one in this addition."""
        before = self.taken.get(record["id"], record)
        if before["key"] != record["key"]:
            return ValueError(f"two different pictures have the id {record['id']!r}; give them different ids")
        if before["metadata"] != record["metadata"]:
            return ValueError(f"picture {record['id']!r} comes twice, with different metadata; keep one of them")
        return None

    def _kind(self, record: Record) -> Kind:
        old = self.known.records.get(record["id"])
        if record["key"] not in self.known.keys or (old is not None and old["key"] != record["key"]):
            return Kind("added" if old is None else "replaced", True, True)
        if old is None or old == record:
            return UNCHANGED
        return Kind("replaced", False, True)
