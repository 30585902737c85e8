"""`Index`: pictures that are found by text or by picture; in a folder, or on a Qdrant server behind the same calls."""

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.data.schema import ImageRef, SampleError
from chiasm.retrieval.adding import Intake, Known, Pending, Reused
from chiasm.retrieval.preparation import Preparation, difference, preparation_of
from chiasm.retrieval.records import Added, Encoder, Hit, Item, distinct, merged
from chiasm.retrieval.where import Where, conditions
from chiasm.training.fingerprint import model_fingerprint

THREADS = 4
MORE = 4
"""So many times the records are asked for again where too many were copies."""
NOWHERE = "in memory"
"""Source of a model that was not loaded from anywhere."""

Conditions = str | Where | Sequence[str | Where] | None
Progress = Callable[[int], None]
Gone = Mapping[str, Sequence[str]]


class Index(ABC):
    """Pictures by what they show. `create` and `open` choose where: a folder, or `http://host:6333/collection`."""

    def __init__(self, location: str, encoder: Encoder | None) -> None:
        self.location = location
        self._encoder: Encoder | None = None
        self.note: str | None = None
        if encoder is not None:
            self.attach(encoder)

    def attach(self, encoder: Encoder) -> "Index":
        """Searches and adds with this model from now on; `note` says what could not be compared.

        Raises:
            ValueError: another model made the index, or its processor was another.
        """
        found = model_fingerprint(encoder.model)
        if found != self.model["fingerprint"]:
            raise ValueError(
                f"index {self.location} was made by model {self.model['source']} with weights "
                f"{self.model['fingerprint'][:12]}, this model's are {found[:12]}; use that model, or index again "
                "into another folder"
            )
        self.note = self._compare_preparation(encoder)
        self._encoder = encoder
        return self

    def _compare_preparation(self, encoder: Encoder) -> str | None:
        if "preparation" not in self.model:
            return (
                f"index {self.location} is older than this check: whether its pictures were prepared as the model "
                "prepares them now is not known; index again if the processor has changed"
            )
        before, now = self.model["preparation"], _preparation(encoder)
        changed = None if before is None or now is None else difference(before, now)
        if changed is not None:
            raise ValueError(
                f"index {self.location} was made with another processor: this one {changed}; use that of "
                f"{self.model['source']} as it was, or index again into another folder"
            )
        return None

    @staticmethod
    def create(location: str | Path, encoder: Encoder, source: str = NOWHERE) -> "Index":
        """An empty index.

        Args:
            location: a new folder, `http(s)://host:port/collection`, or `:memory:`.
            encoder: makes the vectors; the index remembers a fingerprint of its weights and of its processor.
            source: where the encoder was loaded from, for whoever opens the index.
        """
        from chiasm.retrieval.folder import FolderIndex
        from chiasm.retrieval.qdrant import QdrantIndex, is_qdrant

        weights, preparation = model_fingerprint(encoder.model), _preparation(encoder)
        model = {"source": source, "fingerprint": weights, "preparation": preparation}
        if is_qdrant(location):
            return QdrantIndex.make(str(location), encoder, model)
        return FolderIndex.make(Path(location), encoder, model)

    @staticmethod
    def open(
        location: str | Path, encoder: Encoder | None = None, *, way: str = "auto", verify: bool = True
    ) -> "Index":
        """An index as it is now.

        Args:
            encoder: the model that made it; without one, only vectors can be searched for.
            way: of a folder: `exact`, `faiss`, or `auto`: exact up to 200,000 vectors, then faiss if it is installed.
            verify: of a folder: compare every file with its checksum, not with its size alone.

        Raises:
            ValueError: another model made the index, or it is damaged.
        """
        from chiasm.retrieval.folder import FolderIndex
        from chiasm.retrieval.qdrant import QdrantIndex, is_qdrant

        if is_qdrant(location):
            return QdrantIndex(str(location), encoder)
        return FolderIndex(Path(location), encoder, way, verify)

    def add(
        self,
        items: Iterable[Item | SampleError],
        *,
        skip_bad: bool = False,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> Added:
        """Adds pictures; those whose content is there already are not looked at again.

        A picture of a known id with other content takes the older one's place; other metadata take the place of older
        ones. What was added stays added if this is stopped: nothing is lost after `COMMIT_SECONDS`. An id that is a
        file's place in a folder does not take that of another folder's, whose file is still there.

        Args:
            skip_bad: leave out what cannot be read and report it, instead of stopping.
            progress: called with the number of pictures looked at since the last call.

        Raises:
            ImageError, SampleError or ValueError: a picture cannot be read, or its id is that of another one, and
                `skip_bad` is not set.
        """
        stream, pending = iter(items), Pending()
        with self._writing() as known, ThreadPoolExecutor(THREADS) as pool:
            intake = Intake(known, skip_bad, self.encoder.prepare)
            while chunk := list(islice(stream, batch_size)):
                try:
                    new, old = intake.sort(chunk, pool)
                except ValueError:
                    self._flush(pending)
                    raise
                self._embed(new, old, pending)
                if pending.due():
                    self._flush(pending)
                    pending = Pending()
                if progress is not None:
                    progress(len(chunk))
            self._flush(pending)
            self._finish()
        return intake.report

    def search(self, text: str, k: int = 10, where: Conditions = None, copies: bool = False) -> list[Hit]:
        """The k pictures that go best with a text, best first."""
        return self.search_texts([text], k, where, copies)[0]

    def search_texts(
        self, texts: Sequence[str], k: int = 10, where: Conditions = None, copies: bool = False
    ) -> list[list[Hit]]:
        """The k best pictures of every text."""
        return self.search_vectors(_rows(self.encoder.embed_texts(list(texts)))[:, 0], k, where, copies)

    def search_images(
        self,
        images: Sequence[Any],
        k: int = 10,
        where: Conditions = None,
        exclude_self: bool = False,
        copies: bool = False,
    ) -> list[list[Hit]]:
        """The k pictures most like each of these; where a picture has several vectors, its best one counts.

        Args:
            images: files, bytes or PIL pictures.
            exclude_self: leave out what has the very content of the query, under whatever id.
        """
        references = [image if isinstance(image, ImageRef) else ImageRef.of(image) for image in images]
        vectors = _rows(self.encoder.embed_images([reference.load() for reference in references]))
        left_out = [
            reference.key() if exclude_self else None for reference in references for _ in range(vectors.shape[1])
        ]
        found = iter(self._found(vectors.flatten(0, 1), k, where, copies, left_out))
        return [merged(list(islice(found, vectors.shape[1])), copies)[:k] for _ in references]

    def search_vectors(
        self, vectors: Float[Tensor, "B D"], k: int = 10, where: Conditions = None, copies: bool = False
    ) -> list[list[Hit]]:
        """The k best pictures of every vector of length 1.

        Args:
            where: conditions that the pictures meet.
            copies: show the same content under each of its ids, not under one alone.
        """
        return self._found(vectors, k, where, copies, [None] * len(vectors))

    def _found(
        self, vectors: Float[Tensor, "B D"], k: int, where: Conditions, copies: bool, left_out: list[str | None]
    ) -> list[list[Hit]]:
        """As many records are asked for as it takes to have k without copies and without the content to leave out."""
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        found: list[list[Hit]] = [[] for _ in left_out]
        short, asked = list(range(len(left_out))), k + any(left_out)
        while short:
            nearest = self._nearest(vectors[short], asked, where)
            for place, hits in zip(short, nearest, strict=True):
                found[place] = distinct(hits, copies, left_out[place])[:k]
            full = [len(hits) == asked for hits in nearest]
            short = [place for place, more in zip(short, full, strict=True) if more and len(found[place]) < k]
            asked *= MORE
        return found

    @property
    def encoder(self) -> Encoder:
        """The model. Raises ValueError where the index was opened without one."""
        if self._encoder is None:
            raise ValueError(
                f"index {self.location} was opened without a model; attach(chiasm.load(index.model['source']))"
            )
        return self._encoder

    @property
    @abstractmethod
    def model(self) -> dict[str, Any]:
        """`source`, `fingerprint` (of the weights) and `preparation` of the model that made the index."""

    @abstractmethod
    def __len__(self) -> int:
        """Pictures."""

    @abstractmethod
    def items(self, where: Conditions = None) -> Iterator[Hit]:
        """What is in the index, with a score of 0."""

    @abstractmethod
    def _nearest(self, vectors: Float[Tensor, "B D"], k: int, where: Conditions) -> list[list[Hit]]:
        """The k best records of every vector."""

    def delete(self, ids: Sequence[str] = (), where: Conditions = None) -> list[str]:
        """Deletes pictures by id, or all that meet the conditions; returns their ids.

        Raises:
            ValueError: an id is not there, or nothing says what to delete.
        """
        asked = conditions(where)
        if not ids and not asked:
            raise ValueError("nothing says what to delete; give ids or conditions")
        if ids and asked:
            raise ValueError("give ids or conditions, not both")
        with self._writing() as known:
            alike = {unicodedata.normalize("NFC", name): name for name in known.records}
            ids = [n if n in known.records else alike.get(unicodedata.normalize("NFC", n), n) for n in ids]
            unknown = [name for name in ids if name not in known.records]
            if unknown:
                raise ValueError(f"index {self.location} holds no picture {unknown[0]!r}; its ids are in the list")
            names = list(dict.fromkeys(ids)) if ids else [hit.id for hit in self.items(asked)]
            if names:
                self._remove(names)
        return names

    def compact(self) -> None:  # noqa: B027
        """Gives back the space of what was deleted, where that does not happen by itself."""

    @abstractmethod
    def _remove(self, ids: Sequence[str]) -> None: ...

    @abstractmethod
    def _writing(self) -> AbstractContextManager[Known]: ...

    @abstractmethod
    def _append(self, records: list[dict[str, Any]], vectors: Float[Tensor, "rows K D"], gone: Gone) -> None:
        """Stores rows in one step, in place of older ones of the same id and of those that are gone.

        Args:
            gone: by a new record's id, the older ones that it takes the place of.
        """

    @abstractmethod
    def _vectors(self, ids: Sequence[str]) -> Float[Tensor, "rows K D"]:
        """The vectors of pictures that are there, while writing."""

    def _finish(self) -> None:  # noqa: B027
        """The end of an addition."""

    def _embed(self, new: list[tuple[dict[str, Any], Any]], old: list[Reused], pending: Pending) -> None:
        if new:
            vectors = _rows(self.encoder.embed_prepared([image for _, image in new]))
            pending.hold([record for record, _ in new], vectors)
        if old:
            stored = {one.record["key"]: one.of for one in reversed(old) if one.record["key"] not in pending.by_content}
            there = dict(zip(stored, self._vectors(list(stored.values())), strict=True)) if stored else {}
            there |= pending.by_content
            pending.hold([one.record for one in old], torch.stack([there[one.record["key"]] for one in old]))
            pending.gone |= {one.record["id"]: one.gone for one in old if one.gone}

    def _flush(self, pending: Pending) -> None:
        if pending.records:
            self._append(pending.records, torch.cat(pending.vectors), pending.gone)


def _preparation(encoder: Encoder) -> Preparation | None:
    """How a model prepares pictures and texts; None where it has no processor to be asked."""
    processor = getattr(encoder, "processor", None)
    return None if processor is None else preparation_of(processor)


def _rows(vectors: Tensor) -> Float[Tensor, "rows K D"]:
    """Vectors of length 1, K a picture."""
    rows = vectors if vectors.ndim == 3 else vectors[:, None]
    return torch.nn.functional.normalize(rows.detach().float().cpu(), dim=-1)
