"""The same index on a Qdrant server, for more than one machine; `:memory:` is Qdrant in this process."""

import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.retrieval.adding import Known
from chiasm.retrieval.index import Conditions, Gone, Index
from chiasm.retrieval.records import Encoder, Hit
from chiasm.retrieval.where import RANGES, Where, conditions

PAGE, BATCH = 1_000, 256
NUMBERS = 1_000_000
"""Of vectors in one request: about 20 MB of JSON, and a server takes 32 as it comes."""
TIMEOUT = 60
"""Seconds that a request may take."""
RANGE_NAMES = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}
IN_MEMORY = ":memory:"
PLAIN_KEY = re.compile(r"[\w-]+")
"""A key that stands in a path without quotes."""


def is_qdrant(location: str | Path) -> bool:
    """Whether a location is a server's address, or `:memory:`."""
    return str(location).startswith(("http://", "https://", IN_MEMORY))


class QdrantIndex(Index):
    """A collection: its metadata hold the model, a payload a record. `QDRANT_API_KEY` is sent if it is set."""

    def __init__(self, location: str, encoder: Encoder | None, client: Any = None) -> None:
        self.client, self.collection = (client, _address(location)[1]) if client else _connect(location)
        if not self.client.collection_exists(self.collection):
            raise FileNotFoundError(f"{location} holds no collection {self.collection!r}; make it with chiasm index")
        self._model: Any = (self.client.get_collection(self.collection).config.metadata or {}).get("chiasm")
        if self._model is None:
            raise ValueError(f"collection {self.collection!r} was not made by Chiasm; choose another name")
        super().__init__(location, encoder)

    @classmethod
    def make(cls, location: str, encoder: Encoder, model: dict[str, Any]) -> "QdrantIndex":
        """A new collection; its shape is that of the encoder's vectors."""
        from PIL import Image
        from qdrant_client import models

        client, collection = _connect(location)
        if client.collection_exists(collection):
            raise FileExistsError(f"collection {collection!r} exists; choose another name, or add to it")
        blank = encoder.embed_images([Image.new("RGB", (32, 32), "white")])
        several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        client.create_collection(
            collection,
            models.VectorParams(
                size=blank.shape[-1],
                distance=models.Distance.DOT,
                multivector_config=several if blank.ndim == 3 else None,
            ),
            metadata={"chiasm": model | {"several": str(blank.ndim == 3).lower()}},
        )
        return cls(location, encoder, client)

    @property
    def model(self) -> dict[str, Any]:
        return self._model

    def __len__(self) -> int:
        return self.client.count(self.collection, exact=True).count

    def items(self, where: Conditions = None) -> Iterator[Hit]:
        place = None
        while True:
            points, place = self.client.scroll(
                self.collection, scroll_filter=_filter(conditions(where)), limit=PAGE, offset=place
            )
            yield from (Hit.of(point.payload, 0.0) for point in points)
            if place is None:
                return

    def _nearest(self, vectors: Float[Tensor, "B D"], k: int, where: Conditions) -> list[list[Hit]]:
        from qdrant_client import models

        asked = _filter(conditions(where))
        queries = [vector if self._model["several"] == "false" else [vector] for vector in vectors.float().tolist()]
        requests = [models.QueryRequest(query=q, limit=k, filter=asked, with_payload=True) for q in queries]
        step = _at_once(vectors.shape[-1])
        return [
            [Hit.of(point.payload, point.score) for point in found.points]
            for start in range(0, len(requests), step)
            for found in self.client.query_batch_points(self.collection, requests[start : start + step])
        ]

    @contextmanager
    def _writing(self) -> Iterator[Known]:
        yield Known(hit.record for hit in self.items())

    def _append(self, records: list[dict[str, Any]], vectors: Float[Tensor, "rows K D"], gone: Gone) -> None:
        from qdrant_client import models

        rows = vectors if self._model["several"] == "true" else vectors[:, 0]
        points = [
            models.PointStruct(id=_point(record["id"]), vector=row, payload=record)
            for record, row in zip(records, rows.tolist(), strict=True)
        ]
        step, stored = _at_once(vectors[0].numel()), {record["id"] for record in records}
        for start in range(0, len(points), step):
            part = points[start : start + step]
            names = [name for record in records[start : start + step] for name in gone.get(record["id"], ())]
            left = [name for name in names if name not in stored]
            if not left:
                self.client.upsert(self.collection, part, wait=True)
                continue
            upsert = models.UpsertOperation(upsert=models.PointsList(points=part))
            delete = models.DeleteOperation(delete=models.PointIdsList(points=[_point(name) for name in left]))
            self.client.batch_update_points(self.collection, [upsert, delete], wait=True)

    def _vectors(self, ids: Sequence[str]) -> Float[Tensor, "rows K D"]:
        points = self.client.retrieve(self.collection, [_point(name) for name in ids], with_vectors=True)
        found = {point.id: torch.tensor(point.vector) for point in points}
        rows = torch.stack([found[_point(name)] for name in ids])
        return rows if self._model["several"] == "true" else rows[:, None]

    def _remove(self, ids: Sequence[str]) -> None:
        from qdrant_client import models

        points = models.PointIdsList(points=[_point(name) for name in ids])
        self.client.delete(self.collection, points, wait=True)


def _at_once(numbers: int) -> int:
    """Points of so many numbers each that one request holds."""
    return max(1, min(BATCH, NUMBERS // numbers))


def _point(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def _address(location: str) -> tuple[str, str]:
    """The server and the collection."""
    if location.startswith(IN_MEMORY):
        return IN_MEMORY, location.removeprefix(IN_MEMORY).strip("/") or "pictures"
    parts = urlsplit(location)
    collection = parts.path.strip("/")
    if not collection or "/" in collection:
        raise ValueError(f"{location!r} names no collection, expected http://host:6333/collection")
    return f"{parts.scheme}://{parts.netloc}", collection


def _connect(location: str) -> tuple[Any, str]:
    server, collection = _address(location)
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise ValueError("a Qdrant index needs the package qdrant-client: pip install 'chiasm[retrieval]'") from None
    if server == IN_MEMORY:
        return QdrantClient(IN_MEMORY), collection
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Api key is used with an insecure connection")
        client = QdrantClient(
            url=server, api_key=os.environ.get("QDRANT_API_KEY"), check_compatibility=False, timeout=TIMEOUT
        )
    return _Client(client, location), collection


class _Client:
    """A server's client, whose faults are `ConnectionError`s of one line."""

    def __init__(self, client: Any, location: str) -> None:
        self._client, self._location = client, location

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, getattr(self._client, name))

    def _call(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            return call(*arguments, **options)
        except ResponseHandlingException as error:
            raise ConnectionError(f"no Qdrant server answers for {self._location} ({error.source})") from error
        except UnexpectedResponse as error:
            said = error.content.decode(errors="replace")[:200]
            fix = "; set QDRANT_API_KEY" if error.status_code in (401, 403) else ""
            raise ConnectionError(
                f"the Qdrant server refuses {self._location}: {error.status_code} {error.reason_phrase}, {said}{fix}"
            ) from error


def _filter(asked: list[Where]) -> Any:
    """The conditions in Qdrant's words."""
    from qdrant_client import models

    if not asked:
        return None
    must: list[Any] = []
    must_not: list[Any] = []
    for one in asked:
        key = f"metadata.{one.key}" if PLAIN_KEY.fullmatch(one.key) else f'metadata."{one.key}"'
        if one.operator in RANGES:
            limits = models.Range(**{RANGE_NAMES[one.operator]: float(one.values[0])})
            must.append(models.FieldCondition(key=key, range=limits))
            continue
        same = models.Filter(should=[_same(key, value) for value in one.meanings()])
        (must_not if one.operator == "!=" else must).append(same)
    return models.Filter(must=must or None, must_not=must_not or None)


def _same(key: str, value: Any) -> Any:
    from qdrant_client import models

    if isinstance(value, str | bool):
        return models.FieldCondition(key=key, match=models.MatchValue(value=value))
    return models.FieldCondition(key=key, range=models.Range(gte=value, lte=value))
