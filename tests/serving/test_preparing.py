"""Pictures that take long keep no question of words alone waiting, and nobody makes more work by leaving."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from asking import CHAT, ask, data_url

import chiasm
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine
from chiasm.serving import pictures
from chiasm.serving.body import Budget
from chiasm.serving.errors import ApiError
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
