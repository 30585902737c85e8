"""Servers on tiny random models: in the process for most tests, on a port for those about connections."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import pytest
from fastapi.testclient import TestClient

import chiasm
import tiny
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine, EngineStats, Piece, Ticket
from chiasm.serving.app import create_app
from chiasm.serving.served import ChatModel, Served
from chiasm.serving.server import address_of, listen, server
from chiasm.serving.settings import Limits, Settings


@pytest.fixture(scope="session")
def vlm() -> chiasm.VLM:
    """A tiny model whose answers are letters at random."""
    return chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer())


@pytest.fixture
def chat_model(vlm: chiasm.VLM) -> Iterator[Callable[..., ChatModel]]:
    """Makes served models, whose engines end with the test."""
    with ExitStack() as stack:

        def make(name: str = "tiny", of: chiasm.VLM = vlm, **options: Any) -> ChatModel:
            engine = Engine(of.model, of.processor, **options)
            stack.callback(engine.close, finish=False)
            return ChatModel(name, of.model, of.processor, engine)

        yield make


class Metronome:
    """An engine whose answers are a letter every few milliseconds, until their length or a cancellation."""

    def __init__(self, seconds: float = 0.005) -> None:
        self.seconds, self.running, self.generated = seconds, 0, 0
        self._threads: list[threading.Thread] = []

    def check_room(self, count: int = 1) -> None:
        pass

    def submit_all(self, messages: list[Any], images: list[Any], decodings: list[Decoding]) -> list[Ticket]:
        return [self.submit(decoding) for decoding in decodings]

    def submit(self, decoding: Decoding) -> Ticket:
        ticket = Ticket(1)
        self.running += 1
        self._threads.append(threading.Thread(target=self._answer, args=(ticket, decoding.max_new_tokens)))
        self._threads[-1].start()
        return ticket

    def _answer(self, ticket: Ticket, length: int) -> None:
        for _ in range(length):
            if ticket.cancelled:
                break
            ticket.put(Piece("a", 65, -0.5, [(65, -0.5)] * 20))
            self.generated += 1
            time.sleep(self.seconds)
        self.running -= 1
        ticket.finish("cancelled" if ticket.cancelled else "length")

    @property
    def alive(self) -> bool:
        return True

    def stats(self) -> EngineStats:
        return EngineStats(self.running, 0, 0, 0, self.generated, *[0] * (len(fields(EngineStats)) - 5))

    def close(self, finish: bool = True) -> None:
        for thread in self._threads:
            thread.join()


@pytest.fixture
def metronome(vlm: chiasm.VLM) -> ChatModel:
    """A served model with answers that take their time."""
    return ChatModel("tiny", vlm.model, vlm.processor, Metronome())


@pytest.fixture
def client(chat_model: Callable[..., ChatModel]) -> Iterator[Callable[..., TestClient]]:
    """Makes clients of applications in this process."""
    with ExitStack() as stack:

        def make(*models: Served, fetcher: Any = None, limits: Limits | None = None, **settings: Any) -> TestClient:
            app = create_app(models or [chat_model()], Settings(limits=limits or Limits(), **settings), fetcher)
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make


@pytest.fixture
def address(chat_model: Callable[..., ChatModel]) -> Iterator[Callable[..., str]]:
    """Starts real servers on loopback and gives their addresses."""
    with ExitStack() as stack:

        def start(*models: Served, limits: Limits | None = None, **settings: Any) -> str:
            limits, opened, listening = limits or Limits(), threading.Event(), listen("127.0.0.1", 0)
            app = create_app(models or [chat_model()], Settings(limits=limits, **settings))
            running = server(app, limits, opened.set)
            thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
            thread.start()

            def stop() -> None:
                running.should_exit = True
                thread.join(30)

            stack.callback(stop)
            assert opened.wait(30)
            return address_of(listening)

        yield start
