"""A line for what runs a few at a time in threads: a place lasts as long as its call, and a full line says so."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, TypeVar

from chiasm.serving.errors import overloaded

T = TypeVar("T")


class Turn:
    """For what runs one after the other, or a few at once, and how much of it is in line."""

    def __init__(self, places: int = 1) -> None:
        self.places, self.waiting = asyncio.Semaphore(places), 0

    async def run(
        self,
        threads: Executor,
        line: int,
        function: Callable[..., T],
        *args: Any,
        abandoned: Callable[[T], object] | None = None,
    ) -> T:
        """Runs a function when its turn has come, which lasts until that ends, also where nobody waits for it any more.

        Args:
            abandoned: gets the result if nobody waits for it any more.

        Raises:
            ApiError: as many as `line` wait already.
        """
        loop = asyncio.get_running_loop()
        if self.waiting >= line:
            raise overloaded(f"{self.waiting} requests are waiting already; try again")
        self.waiting += 1
        try:
            await self.places.acquire()
        finally:
            self.waiting -= 1
        try:
            future = threads.submit(function, *args)
        except BaseException:
            self.places.release()
            raise

        def leave(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is in line any more
                loop.call_soon_threadsafe(self.places.release)

        future.add_done_callback(leave)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if abandoned is not None:
                future.add_done_callback(lambda done: _give(done, abandoned))
            raise


def _give(future: Future[T], abandoned: Callable[[T], object]) -> None:
    if not future.cancelled() and future.exception() is None:
        abandoned(future.result())
