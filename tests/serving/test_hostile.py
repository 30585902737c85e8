"""What clients send that they should not: every one of them gets one clear answer, and nobody else notices."""

import base64
import gzip
import json
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any
from urllib.parse import quote

import pytest
import torch
from asking import CHAT, ask, data_url
from fastapi._compat import ModelField
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError

import tiny
from chiasm.generation.decode import Decoding
from chiasm.generation.ticket import Ticket
from chiasm.serving import pictures
from chiasm.serving.pictures import from_data_url
from chiasm.serving.schema import ChatRequest
from chiasm.serving.settings import Limits

LIMITS = Limits(body_bytes=200_000, pixels=10_000, images=3, body_seconds=2)


@pytest.fixture
def api(client: Callable[..., TestClient]) -> TestClient:
    return client(limits=LIMITS)


def code(response: Any, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error["code"]


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it has this size, whatever its data is."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def pickled() -> bytes:
    file = BytesIO()
    torch.save({"a": torch.zeros(3)}, file)
    return file.getvalue()


NO_PICTURES = {
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><rect width='9' height='9'/></svg>",
    "html": b"<!doctype html><script>alert(1)</script>",
    "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "empty": b"",
    "noise": bytes(range(256)) * 8,
    "pickle": pickled(),
    "truncated": base64.b64decode(data_url().partition(",")[2])[:200],
    "lying png": png(50, 50, zlib.compress(b"\0" * 9)),
    "corrupt deflate": png(50, 50, b"\xff" * 60),
    "truncated jpeg": base64.b64decode(data_url(kind="JPEG").partition(",")[2])[:300],
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused(api: TestClient, name: str) -> None:
    assert code(api.post(CHAT, json=ask(data_url(NO_PICTURES[name])))) == "invalid_image"


@pytest.mark.parametrize(
    "url", ["", "cat.png", "file:///etc/passwd", "data:image/png,abc", "data:image/png;base64,@@@", "ftp://a/b.png"]
)
def test_what_is_no_data_url_is_refused(api: TestClient, url: str) -> None:
    assert code(api.post(CHAT, json=ask(url))) in ("invalid_image", "invalid_value")


def test_data_urls_as_browsers_read_them(api: TestClient) -> None:
    head, _, data = data_url().partition(",")
    spaced = f"{data[:40]} \r\n{data[40:]}\t"
    for url in (
        f"{head},{quote(data, safe='')}",
        f"{head},{data.rstrip('=')}",
        f"data:image/png;charset=utf-8;base64,{data}",
        f" data:image/png ; base64 , {spaced}\n",
    ):
        response = api.post(CHAT, json=ask(url))
        assert response.status_code == 200, response.text


def test_spaces_in_a_data_url_take_no_memory() -> None:
    url = "data:image/png;base64," + "AA " * 1_000_000
    tracemalloc.start()
    assert len(from_data_url(url, "image")) == 1_500_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(url)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_pictures_of_every_kind_are_seen(api: TestClient, kind: str, mode: str) -> None:
    picture = tiny.picture().convert("RGB" if (kind, mode) in (("JPEG", "P"), ("WEBP", "1")) else mode)
    assert api.post(CHAT, json=ask(data_url(picture, kind))).status_code == 200


def test_a_bomb_is_refused_before_it_is_decoded(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError("decoded")

    bomb = png(60_000, 60_000, zlib.compress(b"\0" * 1_000_000))
    monkeypatch.setattr(Image.Image, "load", decode)
    response = api.post(CHAT, json=ask(data_url(bomb)))
    assert code(response) == "invalid_image" and "pixels" in response.json()["error"]["message"]
    assert code(api.post(CHAT, json=ask(data_url(png(5000, 1))))) == "invalid_image"


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_jpeg_of_endless_scans_is_refused(api: TestClient, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A scan of a few bytes goes through the whole picture: thousands of them would take minutes."""
    file = BytesIO()
    several = {"save_all": True, "append_images": [tiny.picture()]} if kind == "MPO" else {}
    tiny.picture().save(file, kind, progressive=True, **several)
    data = file.getvalue()
    assert Image.open(file).format == kind
    first, second = (data.find(b"\xff\xda", data.find(b"\xff\xda") + skip) for skip in (0, 1))
    assert api.post(CHAT, json=ask(data_url(data, "JPEG"))).status_code == 200
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    response = api.post(CHAT, json=ask(data_url(data[:second] + data[first:second] * 200 + data[second:], "JPEG")))
    assert code(response) == "invalid_image" and "scans" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": [{"role": "user", "content": [1] * 90_000}]}, "messages[0].content[0]"),
        ({"stop": [1] * 90_000}, "stop[0]"),
        ({f"field{number}": 1 for number in range(90_000)}, None),
        ({"messages": [{f"field{number}": 1 for number in range(90_000)}]}, "messages[0]"),
    ],
)
def test_one_mistake_is_told_and_not_a_hundred_thousand(
    client: Callable[..., TestClient], fields: dict[str, Any], expected: str | None
) -> None:
    response = client().post(CHAT, json=ask() | fields)
    assert code(response) and response.json()["error"]["param"] == expected
    with pytest.raises(ValidationError) as mistakes:
        ChatRequest.model_validate(ask() | fields)
    assert mistakes.value.error_count() == 1


def test_numbers_at_the_edge_of_what_is_allowed(api: TestClient) -> None:
    drawn = [{"temperature": 1e-300}, {"temperature": 2, "top_p": 1e-300}, {"temperature": 2, "min_p": 1}]
    for fields in (*drawn, {"repetition_penalty": 0.01, "logprobs": True}, {"seed": -(2**63)}, {"top_k": 2**31}):
        response = api.post(CHAT, json=ask(**fields))
        assert response.status_code == 200, response.text
    for fields in ({"repetition_penalty": 1e-300}, {"temperature": 1e999}, {"seed": 2**63}, {"max_tokens": 0}):
        body = json.dumps(ask(**fields)).replace("Infinity", "1e999")
        assert code(api.post(CHAT, content=body, headers={"content-type": "application/json"}))


def test_limits_of_a_request(api: TestClient) -> None:
    assert code(api.post(CHAT, json=ask(*[data_url()] * 4))) == "too_many_images"
    big = api.post(CHAT, json=ask(text="a" * 300_000))
    assert code(big, 413) == "request_too_large"
    assert code(api.post(CHAT, json=ask(text="a" * 100_000))) == "context_length_exceeded"
    assert code(api.post(CHAT, content=b"x" * 2_000_000, headers={"content-type": "application/json"}), 413)
    assert api.post(CHAT, json=ask(*[data_url()] * 3)).status_code == 200


def test_memory_is_shared_and_given_back(client: Callable[..., TestClient]) -> None:
    api = client(limits=replace(LIMITS, memory_bytes=12_000))
    for _ in range(5):
        assert api.post(CHAT, json=ask(text="a" * 9000, max_tokens=1)).status_code == 400  # longer than the context
    assert code(api.post(CHAT, json=ask(text="a" * 20_000)), 413) == "too_large"
    app: Any = api.app
    assert next(m for m in app.user_middleware if "shared" in m.kwargs).kwargs["shared"].budget.used == 0


@pytest.mark.parametrize(("kind", "decoding"), [("PNG", 12), ("WEBP", 22)])
def test_a_picture_has_more_memory_while_it_is_decoded(
    client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch, kind: str, decoding: int
) -> None:
    api = client()
    app: Any = api.app
    budget = next(m for m in app.user_middleware if "shared" in m.kwargs).kwargs["shared"].budget
    used, decode = [], pictures.decode

    def noting(*given: Any) -> Image.Image:
        used.append(budget.used)
        return decode(*given)

    monkeypatch.setattr(pictures, "decode", noting)
    body = json.dumps(ask(*[data_url(kind=kind)] * 2)).encode()
    assert api.post(CHAT, content=body, headers={"content-type": "application/json"}).status_code == 200
    size = tiny.picture().width * tiny.picture().height
    assert [one - len(body) for one in used] == [decoding * size, (decoding + 4) * size]
    assert budget.used == 0


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "RGB"])
def test_pictures_are_changed_without_copies_of_all_of_them(mode: str) -> None:
    """What Pillow holds is not traced: rows of bytes and arrays are."""
    size, file = (600, 800), BytesIO()
    Image.new(mode, size).save(file, "PNG")
    tracemalloc.start()
    try:
        picture = pictures.decode(file.getvalue(), "a")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size[0] * size[1] and (picture.mode, picture.size, picture.info) == ("RGB", size, {})


BODIES: dict[str, tuple[bytes, str]] = {
    "broken utf-8": (b'{"model": "\xff\xfe"}', "invalid_utf8"),
    "half a surrogate": (json.dumps(ask(text="a\ud800b")).encode(), "invalid_unicode"),
    "half a surrogate in a key": (b'{"\\ud800": 1}', "invalid_unicode"),
    "no json": (b"{", "invalid_json"),
    "nothing": (b"", "invalid_body"),
    "a list": (b"[]", "invalid_body"),
    "null": (b"null", "invalid_body"),
    "nan": (b'{"temperature": NaN}', "invalid_json"),
    "a long number": (b'{"seed": ' + b"9" * 9000 + b"}", "invalid_json"),
    "deep": (b'{"model": ' + b"[" * 200 + b"]" * 200 + b"}", "too_deep"),
    "deeper": (b"[" * 90_000 + b"]" * 90_000, "too_deep"),
    "too many values": (b"[" + b"1," * 90_000 + b"1]", "too_many_values"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_not_what_they_should_be(client: Callable[..., TestClient], name: str) -> None:
    api = client(limits=replace(LIMITS, json_values=95_000 if name == "deeper" else 80_000))
    body, expected = BODIES[name]
    assert code(api.post(CHAT, content=body, headers={"content-type": "application/json"})) == expected


def test_a_page_elsewhere_cannot_send_without_asking_first(api: TestClient) -> None:
    body = json.dumps(ask())
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert code(api.post(CHAT, content=body, headers={"content-type": kind}), 415) == "unsupported_media_type"
    preflight = api.options(CHAT, headers={"origin": "http://evil.example", "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in preflight.headers


def test_packed_bodies_are_not_unpacked(api: TestClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = api.post(CHAT, content=gzip.compress(json.dumps(ask()).encode()), headers=headers)
    assert code(response, 415) == "unsupported_media_type" and "gzip" in response.json()["error"]["message"]


def test_names_of_the_server(client: Callable[..., TestClient]) -> None:
    api = client(hosts=("localhost", "127.0.0.1"))
    assert api.get("/v1/models", headers={"host": "localhost:8000"}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "", "[::1"):
        assert code(api.get("/v1/models", headers={"host": host}), 403) == "host_not_allowed"


def test_keys(client: Callable[..., TestClient]) -> None:
    api = client(api_keys=("one-key", "other-key"))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic one-key"},
        {"authorization": "Bearer"},
    ):
        for path in ("/v1/models", "/metrics", "/v1/models/tiny"):
            assert code(api.get(path, headers=headers), 401) == "invalid_api_key"
        assert code(api.post(CHAT, json=ask(), headers=headers), 401) == "invalid_api_key"
    for key in ("one-key", "other-key"):
        assert api.post(CHAT, json=ask(), headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert api.get("/health").status_code == 200 and api.get("/").status_code == 200


def test_a_full_line_says_when_to_come_back(
    client: Callable[..., TestClient], chat_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chat_model(max_batch=1, max_waiting=1)
    api = client(model)
    tickets = [model.engine.submit(ask()["messages"], [], Decoding(max_new_tokens=900)) for _ in range(1)]
    while model.engine.stats().waiting:
        pass
    tickets.append(model.engine.submit(ask()["messages"], [], Decoding(max_new_tokens=900)))
    monkeypatch.setattr(pictures, "decode", lambda *_: pytest.fail("decoded"))
    response = api.post(CHAT, json=ask(data_url()))
    assert code(response, 429) == "rate_limit_exceeded" and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "rate_limit_error"
    for ticket in tickets:
        ticket.cancel()


def test_an_answer_has_its_time(client: Callable[..., TestClient]) -> None:
    api = client(limits=replace(LIMITS, request_seconds=0.3))
    answer = api.post(CHAT, json=ask(max_tokens=900)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] < 900


@pytest.mark.parametrize("ping", [15, 0.05])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_never_began_is_an_error(
    client: Callable[..., TestClient], metronome: Any, monkeypatch: pytest.MonkeyPatch, stream: bool, ping: float
) -> None:
    def wait(ticket: Ticket, length: int) -> None:
        while not ticket.cancelled:
            time.sleep(0.01)
        ticket.finish("cancelled")

    monkeypatch.setattr(metronome.engine, "_answer", wait)
    monkeypatch.setattr("chiasm.serving.stream.PING_SECONDS", ping)
    response = client(metronome, limits=replace(LIMITS, request_seconds=0.3)).post(CHAT, json=ask(stream=stream))
    if stream and ping < 0.3:  # the stream has begun
        *_, last = response.text.strip().split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "timeout" and 'finish_reason":"' not in response.text
    else:
        assert code(response, 503) == "timeout" and response.headers["retry-after"] == "5"


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "m\n" * 50_000},
        {"k\n" * 50_000: 1},
        {"max_tokens": 10**4000},
        {"n": 10**4000},
        {"messages": [{"role": "user", "content": "a", "k" * 90_000: 1}]},
    ],
)
def test_errors_repeat_the_beginning_alone(api: TestClient, changed: dict[str, Any]) -> None:
    response = api.post(CHAT, json=ask() | changed)
    error = response.json()["error"]
    assert response.status_code in (400, 404) and len(response.content) < 600
    assert "\n" not in error["message"] + error["param"] and "…" in error["message"]


def test_large_bodies_are_checked_beside_the_loop(
    client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, validate = [], ModelField.validate

    def noting(self: ModelField, value: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(value, dict):
            threads.append(threading.get_ident())
        return validate(self, value, *rest, **options)

    monkeypatch.setattr(ModelField, "validate", noting)
    api = client()
    assert api.post(CHAT, json=ask()).status_code == 200
    (loop,) = threads
    threads.clear()
    many = [{"type": "text", "text": "a"}] * 3000
    assert code(api.post(CHAT, json=ask(messages=[{"role": "user", "content": many}]))) == "context_length_exceeded"
    assert code(api.post(CHAT, json=ask(messages=[{"role": "user", "content": [*many, 1]}]))) == "invalid_type"
    assert len(threads) == 2 and loop not in threads


def test_schemas_that_are_none(api: TestClient) -> None:
    for schema in (
        {"type": "king"},
        {"$ref": "#/nowhere"},
        {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/x"}}},
    ):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        assert api.post(CHAT, json=ask(response_format=form)).status_code in (200, 400)
    huge = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(4000)}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": huge}}
    assert code(api.post(CHAT, json=ask(response_format=form)))


def test_a_page_on_an_allowed_origin_reads_refusals(client: Callable[..., TestClient]) -> None:
    api = client(api_keys=("one-key",), origins=("https://page.example",))
    origin = {"Origin": "https://page.example"}
    for told in (api.post(CHAT, json=ask(), headers=origin), api.get("/v1/models", headers=origin)):
        assert told.status_code == 401 and told.headers["access-control-allow-origin"] == origin["Origin"]
        assert told.headers["access-control-expose-headers"] == "Retry-After"
    asking = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert api.options(CHAT, headers=asking).status_code == 200
    stranger = api.get("/v1/models", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize("path", ["/health", "/", "/page.js"])
def test_who_watches_over_a_server_may_ask_for_no_body(client: Callable[..., TestClient], path: str) -> None:
    told = client().head(path)
    assert told.status_code == 200 and told.content == b""
