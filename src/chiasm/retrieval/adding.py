"""What an addition does with each picture: encode it, store its metadata anew, leave it as it is, or refuse it."""

import os
import time
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


class Known:
    """What an index holds, by id and by content, while it is written."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records: dict[str, Record] = {}
        self.holders: dict[str, list[str]] = {}
        for record in records:
            self.note(record)

    def note(self, record: Record) -> None:
        self.forget(record["id"])
        self.records[record["id"]] = record
        self.holders.setdefault(record["key"], []).append(record["id"])

    def forget(self, name: str) -> None:
        if (old := self.records.pop(name, None)) is None:
            return
        self.holders[old["key"]].remove(name)
        if not self.holders[old["key"]]:
            del self.holders[old["key"]]


@dataclass(frozen=True)
class Reused:
    """A record to store with the vectors of the picture `of`, which has the same content; those that are gone go."""

    record: Record
    of: str
    gone: tuple[str, ...] = ()


@dataclass
class Pending:
    """Pictures that are looked at but not yet on disk: records, their vectors, and ids that go by a new one's id."""

    records: list[Record] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    by_content: dict[str, Tensor] = field(default_factory=dict)
    gone: dict[str, tuple[str, ...]] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def hold(self, records: Sequence[Record], vectors: Tensor) -> None:
        self.records += records
        self.vectors.append(vectors)
        self.by_content |= {record["key"]: rows for record, rows in zip(records, vectors, strict=True)}

    def due(self) -> bool:
        return len(self.records) >= COMMIT_ITEMS or time.monotonic() - self.since > COMMIT_SECONDS


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
        self.moving: dict[str, int] = {}

    def sort(
        self, chunk: Sequence[Item | SampleError], pool: Executor
    ) -> tuple[list[tuple[Record, Any]], list[Reused]]:
        """Records and prepared pictures to encode, and records to store with the vectors that are there.

        Raises:
            ImageError, SampleError or ValueError: a picture cannot be read, or its id stands for another one.
        """
        new: list[tuple[Record, Any]] = []
        old: list[Reused] = []
        for item, (record, image, error) in zip(chunk, pool.map(self._look, chunk), strict=True):
            error = error or self._clash(record, getattr(item, "by_place", False))
            if error is not None:
                if not self.skip_bad:
                    raise error
                self.report.bad[item.sample_id if isinstance(item, SampleError) else item.id] = str(error)
                continue
            same = record["id"] in self.taken or record == self.known.records.get(record["id"])
            self.taken[record["id"]] = record
            if same:
                self.report.unchanged.append(record["id"])
                continue
            reused = self._reused(record)
            getattr(self.report, self._kind(record, reused)).append(record["id"])
            if reused is not None:
                old.append(reused)
            elif not isinstance(item, SampleError):
                new.append((record, self.prepare(item.image.load()) if image is None else image))
            for name in () if reused is None else reused.gone:
                self.known.forget(name)
            self.known.note(record)
        return new, old

    def _look(self, item: Item | SampleError) -> tuple[Record, Any, ValueError | None]:
        """A picture's record, the prepared picture where its content is new, or why it cannot be read."""
        if isinstance(item, SampleError):
            return {}, None, item
        try:
            record = item.record()
            return record, None if record["key"] in self.known.holders else self.prepare(item.image.load()), None
        except ImageError as error:
            return {}, None, error

    def _clash(self, record: Record, by_place: bool) -> ValueError | None:
        """Why a picture's id cannot be told from that of another one in this addition, or from that of a picture which
        has the same place in another folder."""
        before = self.taken.get(record["id"], record)
        if before["key"] != record["key"]:
            return ValueError(f"two different pictures have the id {record['id']!r}; give them different ids")
        if before["metadata"] != record["metadata"]:
            return ValueError(f"picture {record['id']!r} comes twice, with different metadata; keep one of them")
        known = self.known.records.get(record["id"], record)
        moved = None not in (known["path"], record["path"]) and known["path"] != record["path"]
        if by_place and moved and known["key"] != record["key"] and not _is_gone(known):
            return ValueError(
                f"picture {record['path']} would take the place of {known['path']}, which is another one, is still "
                f"there, and has the id {record['id']!r} too; add the folder above both, or delete the older one first"
            )
        return None

    def _reused(self, record: Record) -> Reused | None:
        """Whose vectors a picture takes, and whose place; None where its content is new."""
        name, key = record["id"], record["key"]
        if key not in self.known.holders:
            return None
        if self.known.records.get(name, {}).get("key") == key:
            return Reused(record, name)
        holders, gone = self.known.holders[key], []
        if key not in self.moving:
            gone = [one for one in holders if one not in self.taken and _is_gone(self.known.records[one])]
            self.moving[key] = len(gone)
        return Reused(record, holders[0], tuple(gone))

    def _kind(self, record: Record, reused: Reused | None) -> str:
        """The field of the report; of so many files that are gone, as many pictures have moved."""
        if reused is not None and reused.of != record["id"] and self.moving[record["key"]]:
            self.moving[record["key"]] -= 1
            return "moved"
        return "replaced" if record["id"] in self.known.records else "added"


def _is_gone(record: Record) -> bool:
    """Whether a picture's file is not there any more; one that cannot be looked at may be."""
    try:
        return record["path"] is not None and not os.stat(record["path"])
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
