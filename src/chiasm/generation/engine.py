"""Many requests at once on one model: a thread owns it, requests wait in line, and answers come piece by piece.

Requests join and leave between two tokens (continuous batching, Orca; PagedAttention, arXiv 2309.06180).
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chiasm.data.chat import Message
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.generation.constraint import constraints_of, token_reader
from chiasm.generation.decode import Decoding, end_tokens, never_tokens, prepare
from chiasm.generation.decoders import make_decoder
from chiasm.generation.pictures import PictureCache
from chiasm.generation.prefix_cache import PrefixCache
from chiasm.generation.prompt import read_prompt
from chiasm.generation.request import Request, new_request
from chiasm.generation.ticket import Piece, Ticket
from chiasm.language.adapter import vocabulary

__all__ = ["Closed", "Engine", "EngineStats", "Piece", "QueueFull", "Ticket"]

TURN = 256
"""Tokens after which a request gives its place to one that waits."""


class Closed(RuntimeError):
    """The engine takes no more requests."""


class QueueFull(RuntimeError):
    """As many requests wait as may; `retry_after` is a guess at the seconds until one of them starts."""

    def __init__(self, waiting: int, retry_after: float, reason: str = "requests are waiting already") -> None:
        super().__init__(f"{waiting} {reason}; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineStats:
    """What the engine does at this moment, and what it has done since its start.

    Args:
        prefix_hits: prompts of which the beginning was there; `prefix_tokens` counts the tokens.
        pixel_bytes: of the pictures of requests that are there.
        parked_bytes: kept of requests that gave their places to others.
    """

    running: int
    waiting: int
    requests: int
    prompt_tokens: int
    generated_tokens: int
    image_hits: int
    image_misses: int
    image_bytes: int
    prefix_hits: int
    prefix_misses: int
    prefix_tokens: int
    prefix_bytes: int
    pixel_bytes: int
    parked_bytes: int


class Engine:
    """Answers requests in the order in which they come, up to `max_batch` of them together.

    A request that has had many tokens gives its place to one that waits, and goes on behind it.

    Args:
        max_batch: requests that are decoded at the same time.
        max_waiting: requests that may wait for that, for the first time or again.
        image_cache_bytes: visual tokens of pictures seen before that are kept.
        prefix_cache_bytes: keys and values of prompts read before that are kept.
        pixel_bytes: of the pictures of all requests that are there; those of one may be more.
        parked_bytes: kept of requests that gave their places to others; what is beyond it is read again.
        weights: `float32` gives the model's own tokens; `int8` and `int4` are packed copies, faster and a little off,
            where the model is of a known shape and the machine has a C++ compiler.
        release: with packed weights, whether the language model's own ones are let go. `model` then reads prompts
            through the packed ones, for other engines too, and can no more be trained, saved or converted.
    """

    def __init__(
        self,
        model: FusionModel,
        processor: ChiasmProcessor,
        *,
        max_batch: int = 8,
        max_waiting: int = 128,
        image_cache_bytes: int = 256 << 20,
        prefix_cache_bytes: int = 512 << 20,
        pixel_bytes: int = 1 << 30,
        parked_bytes: int = 512 << 20,
        weights: str = "float32",
        release: bool = False,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.pixel_bytes, self.parked_bytes = pixel_bytes, parked_bytes
        self.pictures, self.prefixes = PictureCache(model, image_cache_bytes), PrefixCache(prefix_cache_bytes)
        self.decoder = make_decoder(model, max_batch, self.pictures, self.prefixes, weights, release)
        self._ends, self._never = end_tokens(model), never_tokens(model)
        self._vocabulary = vocabulary(model.language)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._changed = threading.Condition()
        self._preparing, self._picturing = threading.Lock(), threading.Lock()
        self._closed = self._aborted = False
        self._counts = {"requests": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._run, name="chiasm-engine", daemon=True)
        self._thread.start()

    def submit(self, messages: list[Message], images: list[Any], decoding: Decoding) -> Ticket:
        """Puts a request in line.

        Raises:
            QueueFull: too many requests wait.
            ValueError: a conversation, picture or decoding that cannot be; the prompt is too long.
            Closed: the engine was closed, or has broken.
        """
        return self.submit_all(messages, images, [decoding])[0]

    def submit_all(self, messages: list[Message], images: list[Any], decodings: Sequence[Decoding]) -> list[Ticket]:
        """The same for several answers to one prompt, which is prepared once: all of them are in line, or none."""
        for decoding in decodings:
            decoding.check(self._vocabulary)
            if decoding.beams > 1:
                raise ValueError(f"beams={decoding.beams}: the engine follows one; use VLM.generate for more")
        self.check_room(len(decodings))
        with self._picturing if images else self._preparing:  # words alone do not wait for pictures
            longest = max(decoding.max_new_tokens for decoding in decodings)
            prompt = read_prompt(prepare(self.model, self.processor, [messages], [images], longest))
        bound = zip(decodings, constraints_of(decodings, self._reader, self._ends), strict=True)
        requests = [new_request(self.model, self.processor, prompt, *pair) for pair in bound]
        with self._changed:
            self._admit(len(requests), prompt.pixel_bytes)
            self._waiting.extend(requests)
            self._counts["requests"] += len(requests)
            self._changed.notify_all()
        return [request.ticket for request in requests]

    def check_room(self, count: int = 1) -> None:
        """Refuses as `submit_all` would at this moment, before anything is prepared for so many answers."""
        if count > (most := self.max_batch + self.max_waiting):
            raise ValueError(f"{count} answers to one prompt, expected at most the {most} that the line holds")
        with self._changed:
            self._admit(count)

    def _reader(self) -> Any:
        with self._preparing:
            return token_reader(self.processor.tokenizer, self._vocabulary)

    def _admit(self, count: int, size: int = 0) -> None:
        if self._closed:
            raise Closed("the engine is closed and takes no more requests")
        waiting, held = len(self._waiting), self._pixels()
        seconds = max(1.0, self._seconds * waiting / self.max_batch)
        if waiting + count > self.max_waiting + self.max_batch - len(self._running):
            raise QueueFull(waiting, seconds)
        if size and held and held + size > self.pixel_bytes:
            raise QueueFull(waiting + len(self._running), seconds, "requests have large pictures already")

    def _pixels(self) -> int:
        return sum({id(one.prompt): one.prompt.pixel_bytes for one in (*self._running, *self._waiting)}.values())

    @property
    def alive(self) -> bool:
        """Whether it takes requests: it is neither closed nor broken."""
        return not self._closed

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        images, prefixes = self.pictures.kept, self.prefixes
        with self._changed:
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                **self._counts,
                image_hits=images.hits,
                image_misses=images.misses,
                image_bytes=images.bytes,
                prefix_hits=prefixes.hits,
                prefix_misses=prefixes.misses,
                prefix_tokens=prefixes.tokens,
                prefix_bytes=prefixes.blocks.bytes,
                pixel_bytes=self._pixels(),
                parked_bytes=self._parked(),
            )

    def close(self, finish: bool = True) -> None:
        """Takes no more requests, and waits until those that are there have ended: answered, or cancelled."""
        with self._changed:
            self._closed, self._aborted = True, self._aborted or not finish
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        """The thread's life; whatever ends it before its time is told to every request that is there."""
        try:
            self._serve()
        except BaseException as error:
            with self._changed:
                self._closed = True
                for request in [*self._running, *self._waiting]:
                    request.ticket.finish("error", error)
                self._running, self._waiting = [], deque()
            raise

    @torch.inference_mode()
    def _serve(self) -> None:
        """Pieces of the prompt with the fewest unread tokens and of the one that came first are read in turns."""
        shortest = False
        while self._arrange():
            if reading := [request for request in self._running if request.reading]:
                shortest = not shortest
                self._read(min(reading, key=lambda request: request.unread) if shortest else reading[0])
            decoding = [request for request in self._running if not request.reading]
            for group in [decoding] if self.decoder.together else [[one] for one in decoding]:
                if group:
                    self._step(group)

    def _arrange(self) -> bool:
        """Waits for work, lets go who is cancelled, and fills free places; False when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
            for request in [*self._running, *self._waiting]:
                if request.ticket.cancelled or self._aborted:
                    self._leave(request, "cancelled")
            wanted = len(self._waiting) - (self.max_batch - len(self._running))
            for request in [one for one in self._running if one.turn >= TURN][: max(wanted, 0)]:
                self._park(request)
            while self._waiting and len(self._running) < self.max_batch:
                self._running.append(self._waiting.popleft())
            return bool(self._running) or not self._closed

    def _park(self, request: Request) -> None:
        """A request gives its place to another one, and stands behind it; where there is no room for what it holds,
        that is let go, and read again from its tokens."""
        try:
            size = self.decoder.size(request.sequence)
            if self._parked() + size <= self.parked_bytes:
                self.decoder.park(request.sequence)
                request.parked = size
            else:
                self.decoder.end(request.sequence)
                request.sequence, request.reading = None, True
        except Exception as error:
            self._leave(request, "error", error)
            return
        self._running.remove(request)
        request.turn = 0
        self._waiting.append(request)

    def _parked(self) -> int:
        return sum(request.parked for request in (*self._running, *self._waiting))

    def _read(self, request: Request) -> None:
        """The next piece of a prompt and of what was answered before, and the next token behind the last one."""
        try:
            if request.sequence is None:
                request.started = request.started if request.answered else time.monotonic()
                request.sequence = self.decoder.begin(request.prompt, request.room, request.answer)
                if not request.answered:
                    request.ticket.cached_tokens = request.sequence.cached
            logits = self.decoder.read(request.sequence)
        except Exception as error:
            self._leave(request, "error", error)
            return
        if logits is not None:
            request.reading = False
            self._counts["prompt_tokens"] += 0 if request.answered else request.ticket.prompt_tokens
            self._add([request], logits[None])

    def _step(self, requests: list[Request]) -> None:
        """The next token of requests that have read their prompts; one that cannot go on is told apart and let go."""
        try:
            for request in requests:
                if request.parked:
                    self.decoder.resume(request.sequence)
                    request.parked = 0
            last = [request.tokens[-1] for request in requests]
            logits = self.decoder.step([request.sequence for request in requests], last)
        except Exception as error:
            if len(requests) == 1:
                self._leave(requests[0], "error", error)
            for request in requests if len(requests) > 1 else []:
                self._step([request])
            return
        self._add(requests, logits)

    def _add(self, requests: list[Request], logits: torch.Tensor) -> None:
        """Chooses a token for each request, and lets go those whose answers have ended."""
        logits[:, self._never] = -torch.inf
        likeliest = logits.argmax(dim=1).tolist()
        for request, row, best in zip(requests, logits, likeliest, strict=True):
            try:
                token, told = (best, (None, None)) if request.plain else request.choose(row)
                reason = request.add(token, told, self._ends)
            except Exception as error:
                self._leave(request, "error", error)
                continue
            self._counts["generated_tokens"] += 1
            if reason is not None:
                self._leave(request, reason)

    def _leave(self, request: Request, reason: str, failure: BaseException | None = None) -> None:
        with self._changed:
            for line in (self._running, self._waiting):
                if request in line:
                    line.remove(request)
        if request.sequence is not None:
            try:
                self.decoder.end(request.sequence)
            except Exception as error:
                reason, failure = "error", failure or error
            self._seconds = 0.9 * self._seconds + 0.1 * (time.monotonic() - request.started)
        request.ticket.finish(reason, failure)
