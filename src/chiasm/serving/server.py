"""The server around the application: slow clients, the end of its life, and its address."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from chiasm.serving.errors import overloaded
from chiasm.serving.settings import Limits

KEEP_ALIVE_SECONDS = 30


class EngineBroken(RuntimeError):
    """A model's engine has stopped by itself, and the server with it."""


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any free one.

    Raises:
        OSError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from error


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(app: FastAPI, listening: socket.socket, limits: Limits, ready: Callable[[], None] | None = None) -> None:
    """Serves until SIGINT or SIGTERM, and then finishes the answers that have begun.

    Args:
        ready: called as soon as requests are answered.

    Raises:
        EngineBroken: a model can answer no more; whoever watches over the process starts it anew.
    """
    serving = server(app, limits, ready)
    serving.run(sockets=[listening])
    if serving.broken is not None:
        raise EngineBroken(f"the engine of {serving.broken!r} has broken, so the server has ended; the log says why")


def server(app: FastAPI, limits: Limits, ready: Callable[[], None] | None = None) -> "Server":
    """uvicorn, with these limits."""
    config = uvicorn.Config(
        app,
        http=patient(limits),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )
    return Server(config, app.state.broken, ready)


class Server(uvicorn.Server):
    """uvicorn that also ends when a model can answer no more.

    Attributes:
        broken: the model's name, where that was the end.
    """

    def __init__(
        self, config: uvicorn.Config, find_broken: Callable[[], str | None], ready: Callable[[], None] | None
    ) -> None:
        super().__init__(config)
        self.broken: str | None = None
        self._find_broken, self._ready = find_broken, ready

    async def on_tick(self, counter: int) -> bool:
        ends = await super().on_tick(counter)
        if not ends:
            self.broken = self._find_broken()
        return ends or self.broken is not None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._ready is not None:
            self._ready()


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def patient(limits: Limits) -> type[asyncio.Protocol]:
    """HTTP/1.1 that waits so long, and no longer, for a request's head and for a client to read."""

    class PatientProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _stuck: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self.app = _crowded
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE:  # or a body that nobody reads
                self._wait_for_head()
            else:
                _stop(self._timer)
                self._timer = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self._stuck or self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _stop(self._stuck)
            self._stuck = None

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            _stop(self._timer, self._stuck)

        def _wait_for_head(self) -> None:
            self._timer = self._timer or self.loop.call_later(limits.header_seconds, self.transport.abort)

    return PatientProtocol


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    """What a connection beyond the limit is told."""
    error = overloaded("as many connections are open as may; try again", headers={"Connection": "close"})
    await error.response()(scope, receive, send)


def _stop(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()
