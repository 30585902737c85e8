"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, with the status their clients expect."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

log = logging.getLogger("chiasm.serving")
ECHO = 100
"""Letters of what a client sent that an error repeats."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What every failed request answers."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error that is told to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code or ("invalid_value" if status == 400 else None), param

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": str(self.detail), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def brief(value: str) -> str:
    """What a client sent as an error repeats it: on one line, and only its beginning where it is long."""
    line = " ".join(value[: ECHO + 1].split())
    return line if len(value) <= ECHO else f"{line[:ECHO]}…"


TYPES = {429: "rate_limit_error", 503: "server_error"}


def overloaded(message: str, seconds: float = 1, headers: Mapping[str, str] | None = None) -> ApiError:
    """Too much at once: the client may ask again after so many seconds."""
    headers = {"Retry-After": str(max(1, round(seconds))), **(headers or {})}
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers)


def of_exception(error: BaseException) -> ApiError:
    """A failure while an answer was computed: the client's, which says so, or ours, which tells no details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        long = type(error).__name__ == "ContextError"
        return ApiError(400, " ".join(str(error).split()), code="context_length_exceeded" if long else "invalid_value")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


KINDS = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported_parameter": "unsupported_parameter",
}
KIND_FIELDS = {"role_unknown": ("role",), "type_unknown": ("type",)}
"""Where an object is of no known kind, the field that says its kind."""
MESSAGES = {
    "unsupported_parameter": "Unsupported parameter: '{param}' is not supported by this server.",
    "missing": "Missing required parameter: '{param}'.",
    "extra_forbidden": "Unknown parameter: '{param}'.",
    "json_invalid": "The body is not JSON: {detail}.",
}


def of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request, as OpenAI tells it."""
    first = error.errors()[0]
    kind, context = first["type"], first.get("ctx", {})
    param = brief(_parameter((*first["loc"], *KIND_FIELDS.get(kind, ()))))
    detail = context.get("error", first["msg"]) if kind == "json_invalid" else first["msg"]
    template = MESSAGES.get(kind, "Invalid value for '{param}': {detail}.")
    code = KINDS.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    if first["loc"] == ("body",) and kind in ("missing", "model_attributes_type"):
        return ApiError(400, "The body is empty or not an object; send a JSON object.", code="invalid_body")
    if kind == "too_many_fields":
        return ApiError(400, f"Invalid value for '{param or 'body'}': {detail}.", param=param or None, code=kind)
    if kind == "json_invalid":
        return ApiError(400, template.format(detail=detail), code="invalid_json")
    return ApiError(400, template.format(param=param, detail=str(detail).rstrip(".")), param=param or None, code=code)


def _parameter(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from a place in the body; names of union members, which begin with #, are left out."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("#"):
            path += f".{part}" if path else part
    return path


def install(app: FastAPI) -> None:
    """Every error of the application takes OpenAI's shape."""

    async def http(request: Request, error: StarletteHTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error.response()
        codes = {404: "unknown_url", 405: "method_not_supported"}
        asked = f": {request.method} {brief(request.url.path)}" if error.status_code in codes else ""
        known = ApiError(error.status_code, f"{error.detail}{asked}", code=codes.get(error.status_code))
        known.headers = dict(error.headers or {})
        return known.response()

    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).response()

    async def fault(request: Request, error: Exception) -> JSONResponse:
        return of_exception(error).response()

    handlers: dict[Any, Callable[[Request, Any], Awaitable[JSONResponse]]] = {
        StarletteHTTPException: http,
        RequestValidationError: validation,
        Exception: fault,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "Something in the request is wrong; `param` and `code` say what",
        401: "No API key, or an unknown one",
        403: "A Host name that this server does not answer to",
        404: "No such model, or one that gives embeddings where answers were asked for, or the other way round",
        408: "The body came too slowly",
        413: "The body is too large",
        415: "The body is not declared as JSON",
        429: "Too much at once; Retry-After says when to ask again",
        500: "A fault of the server",
        503: "No answer in time, or the server is stopping",
    }.items()
}
