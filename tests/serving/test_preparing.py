"""Pictures that take long keep no question of words alone waiting, and nobody makes more work by leaving."""

import asyncio
import gc
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from asking import CHAT, ask, data_url
from fastapi.testclient import TestClient
from PIL import Image

import chiasm
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine
from chiasm.serving import pictures
from chiasm.serving.body import Budget, LimitedRequest
from chiasm.serving.errors import ApiError
from chiasm.serving.schema import ChatRequest
from chiasm.serving.settings import Limits
from tiny import picture


class Door:
    """What stands in the way of pictures until it is opened."""

    def __init__(self) -> None:
        self.open, self.waiting, self.most, self.passed = threading.Event(), 0, 0, 0
        self._lock = threading.Lock()

    def through(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
            assert self.open.wait(30)
            with self._lock:
                self.waiting, self.passed = self.waiting - 1, self.passed + 1
            return function(*args, **kwargs)

        return wait

    def until(self, count: int) -> None:
        end = time.monotonic() + 30
        while self.waiting < count:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.open.set()


def test_words_do_not_wait_for_pictures(
    address: Callable[..., str], door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "decode", door.through(pictures.decode))
    url = address(limits=Limits(pending=2)) + CHAT
    with ThreadPoolExecutor() as threads:
        slow = [threads.submit(httpx.post, url, json=ask(data_url(), max_tokens=1), timeout=60) for _ in range(4)]
        door.until(2)
        for _ in range(3):
            assert httpx.post(url, json=ask(max_tokens=1), timeout=20).status_code == 200
        assert door.most == 2 and not any(one.done() for one in slow)
        door.open.set()
        assert [one.result().status_code for one in slow] == [200] * 4


def test_nor_for_pictures_that_are_prepared(
    address: Callable[..., str], chat_model: Any, door: Door, vlm: chiasm.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine resizes pictures, and the reader of a form takes its time."""
    model = chat_model()
    monkeypatch.setattr(vlm.processor, "image_processor", Behind(vlm.processor.image_processor, door))
    url = address(model, limits=Limits(pending=2)) + CHAT
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [1]}}}
    with ThreadPoolExecutor() as threads:
        slow = [threads.submit(httpx.post, url, json=ask(data_url(), max_tokens=1), timeout=60) for _ in range(4)]
        door.until(1)
        assert httpx.post(url, json=ask(max_tokens=1), timeout=20).status_code == 200
        assert httpx.post(url, json=ask(max_tokens=9, response_format=form), timeout=20).status_code == 200
        door.open.set()
        assert [one.result().status_code for one in slow] == [200] * 4


class Behind:
    """An image processor behind a door."""

    def __init__(self, inner: Any, door: Door) -> None:
        self._inner, self._door = inner, door

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._door.through(self._inner)(*args, **kwargs)


def test_engines_prepare_words_beside_pictures(vlm: chiasm.VLM, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(vlm.model, vlm.processor)
    monkeypatch.setattr(vlm.processor, "image_processor", Behind(vlm.processor.image_processor, door))
    asked = ask(max_tokens=1)["messages"]
    pictured = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    slow = threading.Thread(target=engine.submit, args=(pictured, [picture()], Decoding(max_new_tokens=1)))
    slow.start()
    door.until(1)
    done = threading.Event()
    threading.Thread(
        target=lambda: engine.submit(asked, [], Decoding(max_new_tokens=1)) and done.set(), daemon=True
    ).start()
    assert done.wait(20)
    door.open.set()
    slow.join()
    engine.close()


def test_who_leaves_keeps_the_place_of_its_picture(
    address: Callable[..., str], door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred clients that hang up do not have a hundred pictures decoded at once, or at all."""
    monkeypatch.setattr(pictures, "decode", door.through(pictures.decode))
    url = address(limits=Limits(pending=2)) + CHAT
    for _ in range(6):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=ask(data_url(), max_tokens=1), timeout=0.3)
    metrics, deadline = url.replace(CHAT, "/metrics"), time.monotonic() + 60
    while "chiasm_clients_vanished_total 6.0" not in httpx.get(metrics).text:
        assert time.monotonic() < deadline
    assert door.most == 2
    door.open.set()
    assert httpx.post(url, json=ask(data_url(), max_tokens=1), timeout=30).status_code == 200
    assert door.most == 2 and door.passed == 3


def test_a_request_that_is_over_takes_no_more_memory() -> None:
    budget = Budget(100)
    lease = budget.lease()
    lease.take(60)
    lease.release()
    with pytest.raises(ApiError, match="over"):
        lease.take(10)
    assert budget.used == 0


def test_memory_is_given_back_when_its_thread_is_done(door: Door) -> None:
    """A client that leaves while its picture is decoded makes no room by it."""
    budget = Budget(100)
    lease = budget.lease()
    lease.take(60)
    with ThreadPoolExecutor() as threads:
        working = threads.submit(lease.work, door.through(lambda: "done"))
        door.until(1)
        lease.release()
        assert budget.used == 60
        door.open.set()
        assert working.result() == "done" and budget.used == 0
    with pytest.raises(ApiError, match="over"):
        lease.work(lambda: pytest.fail("begun"))


def budget_of(api: TestClient) -> Budget:
    app: Any = api.app
    return next(m for m in app.user_middleware if "shared" in m.kwargs).kwargs["shared"].budget


def test_questions_in_line_hold_files_and_not_pixels(
    client: Callable[..., TestClient], chat_model: Any, door: Door, vlm: chiasm.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many pictures are decoded as are prepared at once, however many wait for it."""
    model, size = chat_model(), (400, 300)
    monkeypatch.setattr(vlm.processor, "image_processor", Behind(vlm.processor.image_processor, door))
    api = client(model, limits=Limits(pending=2))
    budget, body = budget_of(api), ask(data_url(Image.new("RGB", size)), max_tokens=1)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(api.post, CHAT, json=body) for _ in range(8)]
        door.until(1)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            assert budget.used < 2 * pictures.DECODING * size[0] * size[1] + 8 * len(str(body))
            time.sleep(0.01)
        door.open.set()
        assert [one.result().status_code for one in asked] == [200] * 8
    assert budget.used == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_has_begun_holds_nothing(
    client: Callable[..., TestClient], metronome: Any, stream: bool
) -> None:
    api, url = client(metronome), data_url(Image.new("RGB", (400, 300)))
    body = ask(url, max_tokens=400, stream=stream, metadata={"a": "b" * 100_000})
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(api.post, CHAT, json=body)
        deadline = time.monotonic() + 30
        while metronome.engine.generated < 3 or budget_of(api).used:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert metronome.engine.running == 1
        held = [one for one in gc.get_objects() if type(one) is ChatRequest]
        assert not any(one.messages or one.metadata for one in held)
        assert asked.result().status_code == 200


def test_a_body_is_in_memory_once() -> None:
    """FastAPI keeps what it reads until the answer: it is told only whether there is a body."""
    size, part = 8 * 2**20, 2**16
    ends = b'["', b'"]'
    chunks = iter([ends[0], *[None] * (size // part), ends[1]])

    async def receive() -> dict[str, Any]:
        chunk = next(chunks)
        return {"type": "http.request", "body": chunk or b"a" * part, "more_body": chunk != ends[1]}

    async def read() -> tuple[bytes, Any]:
        headers = [(b"content-type", b"application/json")]
        request = LimitedRequest({"type": "http", "method": "POST", "headers": headers}, receive)
        request.limits, request.lease, request.kind = Limits(), Budget(2**30).lease(), Anything()
        return await request.body(), await request.json()

    tracemalloc.start()
    try:
        told, value = asyncio.run(read())
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert told == b"[" and len(value[0]) == size
    assert held < 1.1 * size and peak < 3.5 * size


class Anything:
    """A field that takes whatever comes."""

    def validate(self, value: Any, loc: tuple[str, ...]) -> tuple[Any, list[Any]]:
        return value, []
