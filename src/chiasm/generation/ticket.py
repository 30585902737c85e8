"""A request on its way through the engine: pieces of its answer as they come, and how it ended."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass


@dataclass
class Piece:
    """What one token adds to an answer.

    Args:
        text: may be empty where a token ends inside a character or a possible stop string.
        token: its id.
        logprob: of the token, where log-probabilities were asked for and no stop string cut it out.
        top: the likeliest tokens and their log-probabilities.
    """

    text: str
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class Ticket:
    """Iterate over it, with `for` or `async for`, for the pieces of the answer; an error in decoding is raised there.

    Attributes:
        finish_reason: after the end `stop`, `length` or `cancelled`.
        prompt_tokens, completion_tokens: as they are counted in the model's own tokens, visual ones included.
        cached_tokens: tokens of the prompt that were read from the prefix cache.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = prompt_tokens, 0, 0
        self.finish_reason: str | None = None
        self.cancelled = False
        self._pieces: deque[Piece] = deque()
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Ends the answer after the token that is being decoded; its slot is free for the next request."""
        self.cancelled = True

    def text(self) -> str:
        """The whole answer, when it is there."""
        return "".join(piece.text for piece in self)

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self.finish_reason)
                piece = self._pieces.popleft() if self._pieces else None
            if piece is None:
                break
            yield piece
        self._raise()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, more = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(more.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                more.clear()
                while self._pieces:
                    yield self._pieces.popleft()
                if self.finish_reason and not self._pieces:
                    break
                await more.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)
        self._raise()

    def put(self, piece: Piece) -> None:
        """The engine's side: one more piece."""
        with self._changed:
            self._pieces.append(piece)
            self.completion_tokens += 1
            self._notify()

    def finish(self, reason: str, failure: BaseException | None = None) -> None:
        """The engine's side: the answer is over."""
        with self._changed:
            if self.finish_reason is None:
                self.finish_reason, self._failure = reason, failure
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._wakers:
            wake()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure
