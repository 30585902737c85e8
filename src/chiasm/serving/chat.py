"""`POST /v1/chat/completions`."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse

from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Closed, Piece, QueueFull, Ticket
from chiasm.generation.text import Trim
from chiasm.language.adapter import ContextError, vocabulary
from chiasm.serving.answers import ChatCompletion
from chiasm.serving.body import Lease, lease_of, limited_route
from chiasm.serving.errors import RESPONSES, ApiError, brief, of_exception, overloaded
from chiasm.serving.logprobs import TokenTexts
from chiasm.serving.prompt import Prompt, load, read_prompt
from chiasm.serving.schema import ChatRequest
from chiasm.serving.served import ChatModel, Shared
from chiasm.serving.settings import Settings
from chiasm.serving.stream import EventStream, Gone, cancel, pieces, while_there
from chiasm.serving.turn import Turn

GONE = 499
"""A status that nobody receives: the client has left."""
SAMPLED = ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
"""Fields of a request that `Decoding` has by the same names."""
NEEDED = {"stream", "stream_options", "logprobs", "top_logprobs"}
"""Fields of a request that say what its answer looks like."""


def router(shared: Shared) -> APIRouter:
    """The route, on these models."""
    routes = APIRouter(route_class=limited_route(shared.settings.limits))
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    streamed = {"text/event-stream": {"itemSchema": event | {"description": "a chunk as JSON; the last is [DONE]"}}}
    described = {200: {"model": ChatCompletion, "content": streamed}, **RESPONSES}

    @routes.post("/v1/chat/completions", responses=described, response_model=None, tags=["chat"])
    async def create_chat_completion(request: Request, body: Annotated[ChatRequest, Body()]) -> Response:
        """An answer to a conversation with pictures, whole or as a stream."""
        answering = Answering(shared, body)
        try:
            return await while_there(request, answering.response(lease_of(request)))
        except Gone:
            shared.metrics.vanished.inc()
            return Response(status_code=GONE)

    return routes


class Answering:
    """One request and its answers."""

    def __init__(self, shared: Shared, body: ChatRequest) -> None:
        self.shared, self.body = shared, body
        self.model: ChatModel = shared.chat_model(body.model)
        self.count = body.n or 1
        self.decoding = decoding_of(body, shared.settings)
        check_tokens(self.decoding.get("logit_bias", ()), vocabulary(self.model.model.language))
        self.texts = TokenTexts(self.model.processor.tokenizer)
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }
        self._begun = time.monotonic()
        self._first = False

    async def response(self, lease: Lease) -> Response:
        """The whole answer, or its stream from the first piece on, so that what fails before has its own status."""
        try:
            self.model.engine.check_room(self.count)
        except Exception as error:
            raise _refusal(error) from None
        tickets = await self._submit(await read_prompt(self.shared, self.model, self.body.messages, lease), lease)
        self._forget()
        lease.give()  # the engine has a bound of its own for what it holds
        seconds = self.shared.settings.limits.request_seconds
        try:
            coming = pieces(tickets, seconds)
            if not self.body.stream:
                return JSONResponse(await self._whole(tickets, coming))
            first = await anext(coming)
        except BaseException as error:
            cancel(tickets)
            if isinstance(error, Exception):
                raise of_exception(error) from error
            raise
        return EventStream(self._events(tickets, first, coming), lambda whole: self._closed(tickets, whole))

    async def _submit(self, prompt: Prompt, lease: Lease) -> list[Ticket]:
        def submit() -> list[Ticket]:
            engine = self.model.engine
            images = load(prompt.pictures, self.shared.settings.limits, lease)
            lease.check()
            try:
                return engine.submit_all(prompt.messages, images, self._decodings())
            except ContextError as error:
                if error.room < 1 or not self.body_names_no_length:
                    raise
                return engine.submit_all(prompt.messages, images, self._decodings(max_new_tokens=error.room))

        try:
            return await self.shared.prepared(self._turn(prompt), lease, submit, abandoned=cancel)
        except Exception as error:
            raise _refusal(error) from error

    def _forget(self) -> None:
        """Lets go of what is not needed for the answer's form; FastAPI holds the request as long as this."""
        for name in ChatRequest.model_fields.keys() - NEEDED:
            setattr(self.body, name, None)

    def _turn(self, prompt: Prompt) -> Turn:
        """The line for what takes longest in it."""
        if prompt.pictures:
            return self.shared.pictured
        return self.shared.worded if self.decoding["json_schema"] is None else self.shared.formed

    def _decodings(self, **changed: Any) -> list[Decoding]:
        """One for each answer, with a seed of its own where the request has one."""
        options = self.decoding | changed
        seeds = [None if options["seed"] is None else (options["seed"] + n) % 2**63 for n in range(self.count)]
        return [Decoding(**options | {"seed": seed}) for seed in seeds]

    @property
    def body_names_no_length(self) -> bool:
        return self.body.max_tokens is None and self.body.max_completion_tokens is None

    async def _whole(self, tickets: list[Ticket], coming: AsyncIterator[Any]) -> dict[str, Any]:
        got: list[list[Piece]] = [[] for _ in tickets]
        async for event in coming:
            if event is not None and event[1] is not None:
                self._note_first()
                got[event[0]].append(event[1])
        choices = []
        for number, (ticket, answer) in enumerate(zip(tickets, got, strict=True)):
            text = "".join(piece.text for piece in answer).strip()
            choices.append(
                {
                    "index": number,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": self._logprobs(answer),
                    "finish_reason": _reason(ticket),
                }
            )
        return {"object": "chat.completion", **self.head, "choices": choices, "usage": _usage(tickets)}

    async def _events(self, tickets: list[Ticket], first: Any, coming: AsyncIterator[Any]) -> AsyncIterator[str]:
        """Chunks as server-sent events; space around an answer is left out, as in a whole one."""
        include = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        trims = [Trim() for _ in tickets]
        try:
            for number in range(len(tickets)):
                yield self._chunk(include, number, {"role": "assistant", "content": "", "refusal": None})
            event = first
            while True:
                if event is None:
                    yield ": waiting\n\n"
                elif event[1] is None:
                    yield self._chunk(include, event[0], {}, finish_reason=_reason(tickets[event[0]]))
                else:
                    self._note_first()
                    number, piece = event
                    text, logprobs = trims[number](piece.text), self._logprobs([piece])
                    if text or (logprobs and logprobs["content"]):
                        yield self._chunk(include, number, {"content": text}, logprobs)
                try:
                    event = await anext(coming)
                except StopAsyncIteration:
                    break
            if include:
                yield _sse({"object": "chat.completion.chunk", **self.head, "choices": [], "usage": _usage(tickets)})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _sse(of_exception(error).body())

    def _chunk(
        self, include: bool, number: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> str:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage: dict[str, Any] = {"usage": None} if include else {}
        return _sse({"object": "chat.completion.chunk", **self.head, "choices": [choice], **usage})

    def _logprobs(self, answer: list[Piece]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        entries = [self.texts.entry(piece, self.body.top_logprobs or 0) for piece in answer]
        return {"content": [entry for entry in entries if entry is not None], "refusal": None}

    def _note_first(self) -> None:
        if not self._first:
            self._first = True
            self.shared.metrics.first.labels(self.model.name).observe(time.monotonic() - self._begun)

    def _closed(self, tickets: list[Ticket], whole: bool) -> None:
        if not whole:
            self.shared.metrics.vanished.inc()
        cancel(tickets)


def decoding_of(body: ChatRequest, settings: Settings) -> dict[str, Any]:
    """The fields of `Decoding` that a request asks for, within the server's limits."""
    limits = settings.limits
    for name in ("max_completion_tokens", "max_tokens"):
        if (given := getattr(body, name)) is not None and given > limits.tokens:
            told = brief(str(given))
            raise ApiError(
                400, f"{name} is too large: {told}; this server answers at most {limits.tokens} tokens.", param=name
            )
    if body.n is not None and body.n > limits.choices:
        raise ApiError(
            400, f"n is too large: {brief(str(body.n))}; this server gives at most {limits.choices}.", param="n"
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs", code="invalid_value")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true.", param="stream_options", code="invalid_value")
    chosen = {
        "max_new_tokens": body.max_completion_tokens or body.max_tokens or min(limits.default_tokens, limits.tokens),
        "temperature": settings.temperature if body.temperature is None else body.temperature,
        "stop": stop,
        "seed": body.seed,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "json_schema": _json_schema(body, limits.schema_bytes),
    }
    if body.logit_bias is not None:
        chosen["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return chosen | {name: value for name in SAMPLED if (value := getattr(body, name)) is not None}


def check_tokens(tokens: Iterable[int], known: int) -> None:
    """Refuses ids of tokens that the model does not have."""
    if any(token >= known for token in tokens):
        message = f"a token id of logit_bias is outside of the vocabulary: 0 to {known - 1}"
        raise ApiError(400, message, param="logit_bias", code="unknown_token")


def _json_schema(body: ChatRequest, most: int) -> dict[str, Any] | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if len(json.dumps(form.json_schema.schema_)) > most:
        raise ApiError(
            400, f"the JSON schema is larger than {most:,} bytes", param="response_format.json_schema.schema"
        )
    return form.json_schema.schema_


def _refusal(error: Exception) -> ApiError:
    """What an engine does not take, as the client is told."""
    if isinstance(error, QueueFull):
        return overloaded(f"{error}", error.retry_after)
    if isinstance(error, Closed):
        return ApiError(503, "the server is stopping", code="stopping")
    return of_exception(error)


def _reason(ticket: Ticket) -> str:
    """An answer that the server cut off for its time is one that was too long."""
    return "stop" if ticket.finish_reason == "stop" else "length"


def _usage(tickets: list[Ticket]) -> dict[str, Any]:
    prompt, answered = tickets[0].prompt_tokens, sum(ticket.completion_tokens for ticket in tickets)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "prompt_tokens_details": {"cached_tokens": tickets[0].cached_tokens},
    }


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"  # ASCII: some clients end lines at U+2028 too
