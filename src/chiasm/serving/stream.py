"""Answers on their way to a client: several tickets as one stream, clients that leave, and server-sent events."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from chiasm.generation.engine import Piece, Ticket
from chiasm.serving.errors import ApiError

T = TypeVar("T")
PING_SECONDS = 15.0
LATE = "no answer began in time; try again later"


class Gone(Exception):
    """The client has left."""


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the client leaves.

    Raises:
        Gone: it has left.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaves(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def pieces(tickets: Sequence[Ticket], seconds: float) -> AsyncIterator[tuple[int, Piece | None] | None]:
    """Pieces of all answers as they come, each with the number of its answer; no piece is an answer's end.

    None comes where nothing else did for a while. After so many seconds the answers are cut off.

    Raises:
        ApiError: one was cut off that had not begun.
    """
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def forward(number: int, ticket: Ticket) -> None:
        try:
            async for piece in ticket:
                queue.put_nowait((number, piece))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(forward(*numbered)) for numbered in enumerate(tickets)]
    deadline = time.monotonic() + seconds
    left, begun = len(tickets), set[int]()
    try:
        while left:
            rest = deadline - time.monotonic()
            if rest <= 0:
                cancel(tickets)
            try:
                async with asyncio.timeout(min(PING_SECONDS, rest) if rest > 0 else PING_SECONDS):
                    number, piece = await queue.get()  # `wait_for` may swallow a cancellation that comes with a piece
            except TimeoutError:
                if not 0 < rest <= PING_SECONDS:  # then it is the end of their time
                    yield None
                continue
            if isinstance(piece, BaseException):
                raise piece
            if piece is not None:
                begun.add(number)
            elif number not in begun and tickets[number].finish_reason == "cancelled":
                raise ApiError(503, LATE, code="timeout", headers={"Retry-After": "5"})
            left -= piece is None
            yield number, piece
    finally:
        cancel(tickets)
        for task in tasks:
            task.cancel()


def cancel(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; at their end `closed` is told whether the last one is out: else the client has left."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], closed: Callable[[bool], object]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = False

        async def tell(message: Message) -> None:
            nonlocal whole
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await super().__call__(scope, receive, tell)
        finally:
            self._closed(whole)
