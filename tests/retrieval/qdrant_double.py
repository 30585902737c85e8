"""A double of a Qdrant server: the HTTP calls that an index makes, checked, and answered by Qdrant in this process.

Paths and methods are those of https://api.qdrant.tech; bodies are checked by the models of its OpenAPI schema, which
refuse what the schema does not know. Any other call, a larger body than a server takes, or a wrong key is refused.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError
from qdrant_client import QdrantClient, models
from qdrant_client.http.models import models as rest

LARGEST = 32 << 20
"""Bytes of a body that a server takes, as it comes."""


class Double:
    """What stands behind the server's address. `calls`: method and path of each; `broken`: every further call fails."""

    def __init__(self, key: str | None = None, largest: int = LARGEST) -> None:
        self.client, self.key, self.largest = QdrantClient(":memory:"), key, largest
        self.calls: list[tuple[str, str]] = []
        self.broken, self.lock = False, Lock()

    def answer(self, method: str, path: str, body: bytes, key: str | None) -> tuple[int, Any]:
        """Status and result."""
        self.calls.append((method, path))
        if self.broken:
            return 500, "it is broken"
        if key != self.key:
            return 401, "Must provide an API key or an Authorization bearer token"
        if len(body) > self.largest:
            return 413, f"JSON payload ({len(body)} bytes) is larger than allowed (limit: {self.largest} bytes)."
        for known, pattern, call in CALLS:
            if known == method and (found := re.fullmatch(pattern, path)):
                try:
                    with self.lock:
                        return 200, call(self.client, found[1], json.loads(body) if body else None)
                except (ValidationError, json.JSONDecodeError) as error:
                    return 400, f"Format error in JSON body: {error}"
                except ValueError as error:
                    return 404, str(error)
        return 404, f"no such call: {method} {path}"


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True)


def _create(client: QdrantClient, name: str, body: Any) -> bool:
    asked = rest.CreateCollection.model_validate(body)
    return client.create_collection(name, vectors_config=asked.vectors, metadata=asked.metadata)


def _count(client: QdrantClient, name: str, body: Any) -> Any:
    asked = rest.CountRequest.model_validate(body)
    return {"count": client.count(name, count_filter=asked.filter, exact=bool(asked.exact)).count}


def _scroll(client: QdrantClient, name: str, body: Any) -> Any:
    asked = rest.ScrollRequest.model_validate(body)
    options = {"limit": asked.limit or 10, "offset": asked.offset, "with_vectors": asked.with_vector or False}
    found, after = client.scroll(name, scroll_filter=asked.filter, with_payload=asked.with_payload, **options)
    return {"points": [_plain(point) for point in found], "next_page_offset": after}


def _query(client: QdrantClient, name: str, body: Any) -> Any:
    asked = rest.QueryRequestBatch.model_validate(body)
    return [_plain(found) for found in client.query_batch_points(name, asked.searches)]


def _upsert(client: QdrantClient, name: str, body: Any) -> Any:
    client.upsert(name, rest.PointsList.model_validate(body).points)
    return {"operation_id": 0, "status": "completed"}


def _retrieve(client: QdrantClient, name: str, body: Any) -> Any:
    asked = rest.PointRequest.model_validate(body)
    options: dict[str, Any] = {"with_payload": asked.with_payload, "with_vectors": asked.with_vector or False}
    return [_plain(point) for point in client.retrieve(name, asked.ids, **options)]


def _delete(client: QdrantClient, name: str, body: Any) -> Any:
    client.delete(name, models.PointIdsList.model_validate(body))
    return {"operation_id": 0, "status": "completed"}


def _batch(client: QdrantClient, name: str, body: Any) -> Any:
    asked = rest.UpdateOperations.model_validate(body)
    client.batch_update_points(name, asked.operations)
    return [{"operation_id": 0, "status": "completed"} for _ in asked.operations]


COLLECTION = r"/collections/([^/]+)"
CALLS: list[tuple[str, str, Callable[[QdrantClient, str, Any], Any]]] = [
    ("GET", rf"{COLLECTION}/exists", lambda client, name, _: {"exists": client.collection_exists(name)}),
    ("GET", COLLECTION, lambda client, name, _: _plain(client.get_collection(name))),
    ("PUT", COLLECTION, _create),
    ("POST", rf"{COLLECTION}/points/count", _count),
    ("POST", rf"{COLLECTION}/points/scroll", _scroll),
    ("POST", rf"{COLLECTION}/points/query/batch", _query),
    ("PUT", rf"{COLLECTION}/points", _upsert),
    ("POST", rf"{COLLECTION}/points", _retrieve),
    ("POST", rf"{COLLECTION}/points/delete", _delete),
    ("POST", rf"{COLLECTION}/points/batch", _batch),
]


class _Handler(BaseHTTPRequestHandler):
    double: Double
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, result = self.double.answer(self.command, urlsplit(self.path).path, body, self.headers.get("api-key"))
        told = {"result": result, "status": "ok"} if status == 200 else {"status": {"error": result}}
        content = json.dumps(told | {"time": 0.0}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = _any

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def served(double: Double) -> Iterator[str]:
    """The double's address while it listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"double": double}))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
