"""Pictures from addresses: only where allowed, only public ones, after DNS and at every redirect."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from asking import CHAT, ask, data_url
from fastapi.testclient import TestClient
from test_connections import until

from chiasm.serving.errors import ApiError
from chiasm.serving.fetch import Fetcher, is_public
from chiasm.serving.names import Lookups
from chiasm.serving.pictures import from_data_url
from chiasm.serving.settings import Limits

PICTURE = from_data_url(data_url(), "")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
     "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "ff02::1", "2001:db8::1", "fec0::1",
     "::127.0.0.1", "::ffff:0:127.0.0.1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


class Site(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.headers["Host"])
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/slow.png":
            threading.Event().wait(3)
        elif self.path == "/picture.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURE)
        elif self.path == "/huge.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"\0" * 400_000)
        else:
            self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    Site.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Names:
    """A resolver whose second answer for a name differs from its first, as in DNS rebinding."""

    def __init__(self, **names: list[list[str]]) -> None:
        self.names, self.calls = names, 0

    async def __call__(self, host: str, port: int) -> list[str]:
        self.calls += 1
        answers = self.names.get(host.partition(".")[0], [[host]])
        return answers.pop(0) if len(answers) > 1 else answers[0]


def fetcher(names: Names, **options: Any) -> Fetcher:
    """Here 127.0.0.1 stands for the public Internet, and everything else for what is private."""
    return Fetcher(300_000, 1.0, names, allowed=lambda address: address == "127.0.0.1", ports=None, **options)


def test_urls_are_refused_by_default(client: Callable[..., TestClient]) -> None:
    error = client().post(CHAT, json=ask("http://example.com/a.png")).json()["error"]
    assert error["code"] == "image_urls_not_allowed" and "--image-urls" in error["message"]


def test_private_names_are_refused_by_the_real_filter(client: Callable[..., TestClient]) -> None:
    api = client(image_urls=True)
    for url in ("http://localhost/a.png", "http://127.0.0.1/", "http://[::1]/", "http://2130706433/", "http://0x7f.1/"):
        assert api.post(CHAT, json=ask(url)).json()["error"]["code"] in ("address_not_allowed", "invalid_image")
    for url in ("http://a:b@example.com/", "http://127.0.0.1:8000/", "http:///a", "https://1.1.1.1:22/"):
        assert api.post(CHAT, json=ask(url)).json()["error"]["code"] == "invalid_image"


def test_a_picture_is_fetched_and_seen(client: Callable[..., TestClient], site: ThreadingHTTPServer) -> None:
    names = Names(pictures=[["127.0.0.1"], ["10.0.0.1"]])
    api = client(image_urls=True, fetcher=fetcher(names))
    url = f"http://pictures.example:{site.server_port}"
    answer = api.post(CHAT, json=ask(f"{url}/picture.png"))
    assert answer.status_code == 200, answer.text
    assert (
        answer.json()["choices"][0]["message"] == api.post(CHAT, json=ask(data_url())).json()["choices"][0]["message"]
    )
    assert Site.asked == [f"pictures.example:{site.server_port}"] and names.calls == 1


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/to/http://inside.example/", "address_not_allowed", "inside.example"),
        ("/to//to//to//to//to//picture.png", "invalid_image", "redirects"),
        ("/to/file:///etc/passwd", "invalid_image", "http(s)"),
        ("/none.png", "invalid_image", "404"),
        ("/huge.png", "invalid_image", "larger"),
        ("/slow.png", "invalid_image", "1 s"),
    ],
)
def test_what_is_not_fetched(
    client: Callable[..., TestClient], site: ThreadingHTTPServer, path: str, code: str, words: str
) -> None:
    names = Names(pictures=[["127.0.0.1"]], inside=[["10.0.0.1"]])
    api = client(image_urls=True, fetcher=fetcher(names))
    error = api.post(CHAT, json=ask(f"http://pictures.example:{site.server_port}{path}")).json()["error"]
    assert error["code"] == code and words in error["message"]


def test_a_fetched_picture_takes_memory_while_it_comes(
    client: Callable[..., TestClient], site: ThreadingHTTPServer
) -> None:
    limits = Limits(memory_bytes=100_000)
    api = client(image_urls=True, fetcher=fetcher(Names(pictures=[["127.0.0.1"]])), limits=limits)
    url = f"http://pictures.example:{site.server_port}/huge.png"
    for _ in range(2):
        assert api.post(CHAT, json=ask(url)).json()["error"]["code"] == "too_large"


def test_names_in_other_scripts(client: Callable[..., TestClient], site: ThreadingHTTPServer) -> None:
    names = Names(**{"xn--hxajbheg2az3al": [["127.0.0.1"]]})
    api = client(image_urls=True, fetcher=fetcher(names))
    answer = api.post(CHAT, json=ask(f"http://παράδειγμα.example:{site.server_port}/picture.png"))
    assert answer.status_code == 200 and Site.asked == [f"xn--hxajbheg2az3al.example:{site.server_port}"]


def test_a_name_with_one_private_address_is_refused(client: Callable[..., TestClient]) -> None:
    api = client(image_urls=True, fetcher=fetcher(Names(mixed=[["127.0.0.1", "10.0.0.1"]], none=[[]])))
    for name in ("mixed", "none"):
        assert api.post(CHAT, json=ask(f"http://{name}.example/a")).json()["error"]["code"] == "address_not_allowed"


class Silence:
    """A name server that leaves everybody waiting for `*.silent.example` until `answer` is set."""

    def __init__(self) -> None:
        self.asked, self.answer, self._lookup = threading.Semaphore(0), threading.Event(), socket.getaddrinfo

    def __call__(self, host: Any, *rest: Any, **named: Any) -> Any:
        if not str(host).endswith(".silent.example"):
            return self._lookup(host, *rest, **named)
        self.asked.release()
        assert self.answer.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 80))]


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silence]:
    silent = Silence()
    monkeypatch.setattr(socket, "getaddrinfo", silent)
    yield silent
    silent.answer.set()


def test_names_that_hang_keep_no_body_waiting(address: Callable[..., str], silence: Silence) -> None:
    """More of them than the event loop has threads of its own; a large body is parsed in one of those."""
    url, crowd = address(image_urls=True, limits=Limits(fetch_seconds=60, lookups=2)), 40
    with ThreadPoolExecutor(crowd) as threads:
        bodies = [ask(f"http://{number}.silent.example/a.png") for number in range(crowd)]
        asked = [threads.submit(httpx.post, url + CHAT, json=body, timeout=60) for body in bodies]
        try:
            until(lambda: f"chiasm_requests_open {crowd + 1}.0" in httpx.get(url + "/metrics").text)
            assert all(silence.asked.acquire(timeout=30) for _ in range(2))
            large = httpx.post(url + CHAT, json=ask(text="a" * 70_000), timeout=30)
            assert large.json()["error"]["code"] == "context_length_exceeded"
            assert not any(one.done() for one in asked)
        finally:
            silence.answer.set()
        assert {one.result().json()["error"]["code"] for one in asked} == {"address_not_allowed"}


def test_names_wait_in_a_line_that_has_an_end(silence: Silence) -> None:
    async def crowd() -> None:
        lookups = Lookups(1, 1)
        first, second = (asyncio.create_task(lookups(f"{name}.silent.example", 80)) for name in "ab")
        await asyncio.to_thread(silence.asked.acquire)
        with pytest.raises(ApiError, match="1 requests are waiting") as full:
            await lookups("c.silent.example", 80)
        assert full.value.status_code == 429
        second.cancel()
        await asyncio.wait([second])
        third = asyncio.create_task(lookups("d.silent.example", 80))
        first.cancel()  # its lookup goes on, and so does its place
        await asyncio.wait([first])
        assert lookups._turn.waiting == 1
        silence.answer.set()
        assert await third == ["10.0.0.1"]
        lookups.close()

    asyncio.run(crowd())
