"""What goes into an index and what comes out: pictures with metadata, hits, and the report of an addition."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from chiasm.data.readers import read
from chiasm.data.schema import ANY_SIZE, ImageRef


class Encoder(Protocol):
    """A `DualEncoder`."""

    model: nn.Module

    def prepare(self, image: Any) -> Any:
        """One picture as the model reads it."""

    def embed_prepared(self, prepared: Sequence[Any]) -> Float[Tensor, "images ..."]:
        """What `embed_images` gives for pictures that are prepared."""

    def embed_images(self, images: Any) -> Float[Tensor, "images ..."]:
        """One vector a picture, or K."""

    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "texts D"]:
        """One vector a text."""


@dataclass(frozen=True)
class Item:
    """A picture to add.

    Args:
        origin: its place in a data set (data, sample, picture), where it is no file.
        by_place: whether its id is its file's place in a folder, which a picture in another folder can have too.
    """

    id: str
    image: ImageRef
    metadata: dict[str, Any] = field(default_factory=dict)
    origin: tuple[str, int, int] | None = None
    by_place: bool = False

    def record(self) -> dict[str, Any]:
        """What the index remembers of it; `key` is the sha256 of its content."""
        key = self.image.key()
        path = None if self.image.path is None else str(self.image.path.resolve())
        where = {} if self.origin is None or path is not None else {"origin": list(self.origin)}
        return {"id": self.id, "key": key, "path": path, "metadata": self.metadata, **where}


@dataclass(frozen=True)
class Hit:
    """A picture that was found. `score` is the cosine; `path` is None for a picture that is no file."""

    id: str
    score: float
    path: Path | None
    metadata: dict[str, Any]
    record: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def of(cls, record: dict[str, Any], score: float) -> "Hit":
        path = record["path"]
        return cls(record["id"], score, None if path is None else Path(path), record["metadata"], record)

    def image(self) -> ImageRef:
        """The picture itself, from where it was when it was added, as large as it may be.

        Raises:
            ValueError: it was in memory, or the data set holds another one there now.
        """
        if self.path is not None:
            return ImageRef.of(self.path, max_pixels=ANY_SIZE)
        if "origin" not in self.record:
            raise ValueError(f"picture {self.id} was added from memory, so only its vectors are there")
        data, sample, number = self.record["origin"]
        try:
            found: ImageRef | None = read(data)[sample].images[number]
        except IndexError:
            found = None
        if found is None or found.key() != self.record["key"]:
            raise ValueError(f"picture {self.id} is no longer where it was in {data}; index the data again")
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        path = None if self.path is None else str(self.path)
        return {"id": self.id, "score": self.score, "path": path, "metadata": self.metadata}


def distinct(hits: Sequence[Hit], copies: bool, left_out: str | None) -> list[Hit]:
    """Hits without the content to leave out and, unless copies are wanted, the first of each content alone."""
    first: dict[str, Hit] = {}
    for hit in (hit for hit in hits if hit.record["key"] != left_out):
        first.setdefault(hit.id if copies else hit.record["key"], hit)
    return list(first.values())


def merged(lists: Sequence[Sequence[Hit]], copies: bool) -> list[Hit]:
    """Hits of several vectors of one query, each picture, or each content, with its best score; best first."""
    best: dict[str, Hit] = {}
    for hit in (hit for hits in lists for hit in hits):
        name = hit.id if copies else hit.record["key"]
        if name not in best or hit.score > best[name].score:
            best[name] = hit
    return sorted(best.values(), key=lambda hit: -hit.score)


@dataclass(frozen=True)
class Added:
    """What an addition did: ids that are new, took the place of an older picture, stand for a file that was
    elsewhere, were there, or failed."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """In one line."""
        parts = {"added": self.added, "replaced": self.replaced, "moved": self.moved}
        parts |= {"already there": self.unchanged, "skipped": list(self.bad)}
        return ", ".join(f"{len(ids)} {what}" for what, ids in parts.items() if ids or what == "added")
