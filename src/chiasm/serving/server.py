"""The server around the application: slow clients, the end of its life, and its address."""

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from chiasm.serving.settings import Limits

KEEP_ALIVE_SECONDS = 30


def server(app: FastAPI, host: str, port: int, limits: Limits, ready: Callable[[str], None] | None = None) -> uvicorn.Server:
    """A server that runs until it gets SIGINT or SIGTERM, and then finishes the answers that have begun.

    Args:
        ready: gets the address as soon as it is open.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=patient(limits),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )
    return _Server(config, ready)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        await super().startup(*args, **kwargs)
        if self.started and self._ready is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")


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
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._wait_for_head()
            else:
                self._timer = _stop(self._timer)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self._stuck or self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stuck = _stop(self._stuck)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer, self._stuck = _stop(self._timer), _stop(self._stuck)
            super().connection_lost(exc)
            self._stuck = _stop(self._stuck)

        def _wait_for_head(self) -> None:
            self._timer = self._timer or self.loop.call_later(limits.header_seconds, self.transport.abort)

    return PatientProtocol


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
