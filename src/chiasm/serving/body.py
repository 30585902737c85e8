"""Request bodies: read within limits of size, time and memory, and parsed only where their JSON is sane."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from chiasm.serving.errors import ApiError, brief, of_validation, overloaded
from chiasm.serving.settings import Limits

T = TypeVar("T")
MORE_TO_DRAIN = 4
"""A body that is too large is read to its end up to so many times the limit, so that its client hears the answer."""

AT_ONCE = 16_384
"""Bytes of a body that are parsed and checked at once; others do not wait for a larger one."""


class Budget:
    """Memory that all requests share; one that does not get its part is asked to come back."""

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0
        self.lock = threading.Lock()

    def lease(self) -> "Lease":
        return Lease(self)


class Lease:
    """What one request has of the budget, until it is over and no thread works on it; any thread may ask for more."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._held, self._over, self._workers = budget, 0, False, 0

    def take(self, size: int) -> None:
        """Raises a 429 where others hold too much; a request that could never fit is the client's mistake."""
        with self._budget.lock:
            self.check()
            if self._held + size > self._budget.total:
                raise ApiError(413, "this request's pictures need more memory than the server gives", code="too_large")
            if self._budget.used + size > self._budget.total:
                raise overloaded("the server's memory for requests is full at the moment; try again")
            self._budget.used += size
            self._held += size

    def give(self, size: int | None = None) -> None:
        """Returns a part before the request is over, or all of it."""
        with self._budget.lock:
            self._return(self._held if size is None else min(size, self._held))

    def check(self) -> None:
        """Raises where the request is over: nothing more is done for a client that has left."""
        if self._over:
            raise ApiError(400, "the request is over", code="over")

    def work(self, function: Callable[..., T], *args: Any) -> T:
        """Calls a function: what was taken stays taken until it ends, also where the client leaves meanwhile."""
        with self._budget.lock:
            self.check()
            self._workers += 1
        try:
            return function(*args)
        finally:
            with self._budget.lock:
                self._workers -= 1
                self._settle()

    def release(self) -> None:
        with self._budget.lock:
            self._over = True
            self._settle()

    def _settle(self) -> None:
        if self._over and not self._workers:
            self._return(self._held)

    def _return(self, size: int) -> None:
        self._budget.used -= size
        self._held -= size


class LimitedRequest(Request):
    """A request whose body is read and parsed within the limits.

    Attributes:
        kind: what FastAPI checks the body with.
    """

    limits: Limits
    lease: Lease
    kind: Any

    async def body(self) -> bytes:
        """Only its beginning: whether there is one is all that FastAPI asks, and it keeps that until the answer."""
        if not hasattr(self, "_whole"):
            self._check_type()
            try:
                async with asyncio.timeout(self.limits.body_seconds):
                    self._whole = await self._read()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {self.limits.body_seconds:g} s",
                    code="request_timeout",
                    headers={"Connection": "close"},
                ) from None
        return bytes(self._whole[:1])

    def _check_type(self) -> None:
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415,
                f"content-type {brief(kind)!r} is not read here; send application/json",
                code="unsupported_media_type",
            )
        if (coding := self.headers.get("content-encoding", "identity").lower()) != "identity":
            raise ApiError(
                415,
                f"content-encoding {brief(coding)!r} is not read here; send plain JSON",
                code="unsupported_media_type",
            )

    async def _read(self) -> bytearray:
        limit, seen, body = self.limits.body_bytes, 0, bytearray()
        async for chunk in self.stream():
            seen += len(chunk)
            if seen > MORE_TO_DRAIN * limit:
                break
            if seen > limit:
                body.clear()
                continue
            self.lease.take(len(chunk))
            body += chunk
        if seen > limit:
            raise ApiError(
                413,
                f"the body is larger than {limit:,} bytes",
                code="request_too_large",
                headers={"Connection": "close"},
            )
        return body

    async def json(self) -> Any:
        """Read once: the texts in it take the place of the bytes."""
        await self.body()
        body, self._whole = self._whole, bytearray()
        return await asyncio.to_thread(self._checked, body) if len(body) > AT_ONCE else parse(body, self.limits)

    def _checked(self, body: bytearray) -> Any:
        """A large body is checked here, beside the event loop; FastAPI takes what comes out of it as it is."""
        value, mistakes = self.kind.validate(parse(body, self.limits), loc=("body",))
        if mistakes:
            raise of_validation(RequestValidationError(mistakes))
        return value


def limited_route(limits: Limits) -> type[APIRoute]:
    """Routes whose requests are read within the limits."""

    class Reader(LimitedRequest):
        pass

    Reader.limits = limits

    class LimitedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def limited(request: Request) -> Response:
                reader = Reader(request.scope, request.receive)
                reader.lease, reader.kind = lease_of(request), self.body_field
                return await handle(reader)

            return limited

    return LimitedRoute


def lease_of(request: Request) -> Lease:
    """The request's part of the memory that all share."""
    lease: Lease = request.scope["chiasm.lease"]
    return lease


def parse(body: bytes | bytearray, limits: Limits) -> Any:
    """JSON in UTF-8, neither too deep nor of too many values, whose texts are whole Unicode.

    Raises:
        ApiError: it is not that; `json.JSONDecodeError` where it is no JSON at all.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_utf8"
        ) from None
    if sum(text.count(mark) for mark in ",[{") > limits.json_values:
        raise ApiError(400, f"the body has more than {limits.json_values:,} JSON values", code="too_many_values")
    try:
        value = json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _too_deep(limits) from None
    except ValueError as error:
        raise ApiError(400, f"the body holds a number that is none: {error}", code="invalid_json") from None
    _check(value, limits)
    return value


def _check(value: Any, limits: Limits) -> None:
    """Goes through a value without recursion."""
    rest = [(value, 1)]
    while rest:
        item, depth = rest.pop()
        if depth > limits.json_depth:
            raise _too_deep(limits)
        if isinstance(item, dict):
            rest += [(key, depth) for key in item]
            rest += [(member, depth + 1) for member in item.values()]
        elif isinstance(item, list):
            rest += [(member, depth + 1) for member in item]
        elif isinstance(item, str) and not item.isascii():
            _check_text(item)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, "a text of the body holds half of a surrogate pair", code="invalid_unicode") from None


def _too_deep(limits: Limits) -> ApiError:
    return ApiError(400, f"the body is nested deeper than {limits.json_depth} levels", code="too_deep")


def _refuse(constant: str) -> None:
    raise ValueError(constant)
