"""Clients on real connections: those that leave, dawdle or read nothing, and the end of the server's life."""

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from asking import CHAT, ask, data_url, said

import tiny
from chiasm.generation.decode import Decoding
from chiasm.generation.ticket import Ticket
from chiasm.serving.app import create_app
from chiasm.serving.server import EngineBroken, address_of, listen, run, server
from chiasm.serving.settings import Limits, Settings


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def head(body: bytes, length: int | None = None) -> bytes:
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode()


def words(answer: httpx.Response) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(address: Callable[..., str], metronome: Any, stream: bool) -> None:
    model = metronome
    url = address(model)
    body = json.dumps(ask(data_url(), max_tokens=4000, stream=stream)).encode()
    leaving = connect(url)
    leaving.sendall(head(body) + body)
    until(lambda: model.engine.stats().running == 1)
    leaving.close()
    until(lambda: model.engine.stats().running == 0)
    assert model.engine.stats().generated_tokens < 4000
    assert httpx.post(url + CHAT, json=ask(), timeout=30).status_code == 200
    until(lambda: "chiasm_clients_vanished_total 1.0" in httpx.get(url + "/metrics").text)


def test_a_client_that_leaves_is_counted_where_its_answer_stops_at_once(
    address: Callable[..., str], metronome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_once(ticket: Ticket) -> None:
        ticket.cancelled = True
        ticket.finish("cancelled")

    monkeypatch.setattr(Ticket, "cancel", stop_at_once)
    url = address(metronome)
    with httpx.stream("POST", url + CHAT, json=ask(max_tokens=4000, stream=True), timeout=30) as answer:
        assert next(answer.iter_lines())
    until(lambda: "chiasm_clients_vanished_total 1.0" in httpx.get(url + "/metrics").text, 20)
    assert httpx.post(url + CHAT, json=ask(max_tokens=3, stream=True), timeout=30).text.endswith("[DONE]\n\n")
    assert "chiasm_clients_vanished_total 1.0" in httpx.get(url + "/metrics").text


def test_slow_clients_are_left_and_harm_nobody(address: Callable[..., str]) -> None:
    url = address(limits=Limits(header_seconds=0.5, body_seconds=0.5))
    silent, slow_head, slow_body = connect(url), connect(url), connect(url)
    slow_head.sendall(b"POST /v1/chat")
    slow_body.sendall(head(b"", 1000) + b"{")
    assert httpx.post(url + CHAT, json=ask(), timeout=30).status_code == 200
    assert silent.recv(100) == b"" and slow_head.recv(100) == b""
    answer = b"".join(iter(lambda: slow_body.recv(4000), b""))
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer


@pytest.mark.parametrize(
    ("path", "status"), [("GET /health", b"200"), (f"POST {CHAT}", b"415"), ("POST /nothing", b"404")]
)
def test_a_body_that_nobody_reads_keeps_no_connection(address: Callable[..., str], path: str, status: bytes) -> None:
    url = address(limits=Limits(header_seconds=0.5))
    dripping = connect(url)
    dripping.sendall(f"{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n".encode())
    assert dripping.recv(4000).startswith(b"HTTP/1.1 " + status)
    dripping.settimeout(0.05)

    def left() -> bool:
        try:
            dripping.sendall(b"x")
            return dripping.recv(4000) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    until(left)


def test_broken_http(address: Callable[..., str]) -> None:
    url = address()
    for words in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"A" * 100_000,
    ):
        broken = connect(url)
        broken.sendall(words)
        broken.shutdown(socket.SHUT_WR)
        broken.settimeout(10)
        with suppress(ConnectionError):
            assert broken.recv(4000)[:12] in (b"HTTP/1.1 400", b"")
        broken.close()
    assert httpx.get(url + "/health").status_code == 200


def test_one_connection_too_many_is_told_so(address: Callable[..., str]) -> None:
    url = address(limits=Limits(connections=3))
    idle = [connect(url) for _ in range(3)]
    until(lambda: httpx.get(url + "/health").status_code == 429)
    crowded = httpx.post(url + CHAT, json=ask())
    assert crowded.status_code == 429 and crowded.json()["error"]["code"] == "rate_limit_exceeded"
    assert crowded.headers["retry-after"] == "1" and crowded.headers["connection"] == "close"
    for connection in idle:
        connection.close()
    until(lambda: httpx.get(url + "/health").status_code == 200)


async def _crowd(url: str, clients: int) -> list[Any]:
    """Answers of those who stay; every third client leaves after a moment."""
    chance = random.Random(1)

    async def visit(number: int) -> Any:
        body = ask(data_url(tiny.picture(number % 5)), text=f"{number % 7}?", max_tokens=12, stream=number % 2 == 0)
        leaves = chance.uniform(0, 0.4) if number % 3 == 0 else None
        with suppress(TimeoutError):
            return await asyncio.wait_for(client.post(url + CHAT, json=body), leaves)

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        found = await asyncio.gather(*map(visit, range(clients)))
    return [answer for number, answer in enumerate(found) if number % 3]


@pytest.mark.slow
def test_a_hundred_clients_of_whom_a_third_leaves(address: Callable[..., str], chat_model: Any) -> None:
    model = chat_model()
    url = address(model)
    answers = asyncio.run(_crowd(url, 100))
    assert {answer.status_code for answer in answers} == {200}
    bodies = [json.loads(answer.request.content) for answer in answers]
    got = [said(answer.text) if body["stream"] else words(answer) for answer, body in zip(answers, bodies, strict=True)]
    assert got == [words(httpx.post(url + CHAT, json=body | {"stream": False})) for body in bodies]
    assert any(got) and {body["stream"] for body in bodies} == {True, False}
    until(lambda: model.engine.stats().running == model.engine.stats().waiting == 0)
    until(lambda: "chiasm_requests_open 1.0" in httpx.get(url + "/metrics").text)


def test_a_client_that_does_not_read_is_left(address: Callable[..., str], metronome: Any) -> None:
    model = metronome
    url = address(model, limits=Limits(write_seconds=0.5))
    body = json.dumps(ask(max_tokens=4000, n=8, stream=True, logprobs=True, top_logprobs=20)).encode()
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    deaf.connect((urlsplit(url).hostname, urlsplit(url).port))
    deaf.sendall(head(body) + body)
    until(lambda: model.engine.stats().running > 0)
    assert httpx.post(url + CHAT, json=ask(), timeout=60).status_code == 200
    until(lambda: model.engine.stats().running == 0, 60)
    assert model.engine.stats().generated_tokens < 8 * 4000
    deaf.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_ends_the_server(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whatever watches over the process starts it anew; the other model's answer is finished."""
    broken, good, opened, listening = (
        chat_model("broken"),
        chat_model("good"),
        threading.Event(),
        listen("127.0.0.1", 0),
    )
    app, failures = create_app([broken, good], Settings()), []

    def serve() -> None:
        try:
            run(app, listening, Limits(), opened.set)
        except EngineBroken as error:
            failures.append(str(error))

    serving = threading.Thread(target=serve)
    serving.start()
    assert opened.wait(30)
    url = address_of(listening)
    answers: list[httpx.Response] = []
    body = ask(model="good", max_tokens=120)
    asking = threading.Thread(target=lambda: answers.append(httpx.post(url + CHAT, json=body, timeout=60)))
    asking.start()
    until(lambda: good.engine.stats().running == 1)
    monkeypatch.setattr(broken.engine, "_read", lambda request: 1 / 0)
    assert httpx.post(url + CHAT, json=ask(model="broken"), timeout=60).status_code == 500
    asking.join(60)
    serving.join(60)
    assert answers[0].json()["usage"]["completion_tokens"] == 120
    assert len(failures) == 1 and "'broken'" in failures[0]


def test_a_stop_finishes_what_runs(chat_model: Any) -> None:
    model, opened, listening = chat_model(), threading.Event(), listen("127.0.0.1", 0)
    running = server(create_app([model], Settings()), Limits(), opened.set)
    serving = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    serving.start()
    assert opened.wait(30)
    url = address_of(listening)
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(url + CHAT, json=ask(max_tokens=120), timeout=60))
    )
    asking.start()
    until(lambda: model.engine.stats().running == 1)
    running.should_exit = True
    asking.join(60)
    serving.join(60)
    assert answers[0].json()["usage"]["completion_tokens"] == 120 and not serving.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")
    with pytest.raises(RuntimeError, match="closed"):
        model.engine.submit(ask()["messages"], [], Decoding())
