"""Many requests at once on one model: a thread owns it, requests wait in line, and answers come piece by piece."""

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chiasm.data.chat import Message
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.generation.choose import adjusted, choose, logprobs
from chiasm.generation.decode import Decoding, prepare
from chiasm.generation.sequential import SequentialDecoder
from chiasm.generation.text import TextStream
from chiasm.generation.ticket import Piece, Ticket

__all__ = ["Engine", "EngineStats", "Piece", "QueueFull", "Ticket"]


class QueueFull(RuntimeError):
    """As many requests wait as may; `retry_after` is a guess at the seconds until one of them starts."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineStats:
    """What the engine does at this moment, and what it has done since its start."""

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


@dataclass
class Request:
    """One request on its way."""

    ticket: Ticket
    inputs: dict[str, Tensor]
    decoding: Decoding
    text: TextStream
    generator: torch.Generator | None
    tokens: list[int]
    sequence: Any = None
    logits: Tensor | None = None
    answered: int = 0


class Engine:
    """Answers requests in the order in which they come, up to `max_batch` of them in turns.

    Args:
        max_batch: requests that are decoded at the same time.
        max_waiting: requests that may wait for that.
        image_cache_bytes: visual tokens of pictures seen before that are kept.
        prefix_cache_bytes: keys and values of prompts seen before that are kept.
    """

    def __init__(
        self,
        model: FusionModel,
        processor: ChiasmProcessor,
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        image_cache_bytes: int = 256 << 20,
        prefix_cache_bytes: int = 512 << 20,
    ) -> None:
        self.model, self.processor = model, processor
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.decoder = SequentialDecoder(model)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._changed = threading.Condition()
        self._preparing = threading.Lock()
        self._closed = self._aborted = False
        self._counts = {"requests": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self._seconds = 1.0
        stops = model.generation_config.eos_token_id
        self._ends = set(stops if isinstance(stops, list) else [stops])
        self._thread = threading.Thread(target=self._run, name="chiasm-engine", daemon=True)
        self._thread.start()

    def submit(self, messages: list[Message], images: list[Any], decoding: Decoding) -> Ticket:
        """Puts a request in line.

        Raises:
            QueueFull: too many requests wait.
            ValueError: a conversation, picture or decoding that cannot be; the prompt is too long.
            RuntimeError: the engine is closed.
        """
        decoding.check()
        if decoding.beams > 1:
            raise ValueError(f"beams={decoding.beams}: the engine follows one; use generate for beams")
        with self._changed:
            self._admit()
        with self._preparing:
            inputs = prepare(self.model, self.processor, [messages], [images], decoding.max_new_tokens)
        tokens = inputs["input_ids"][0].tolist()
        generator = None
        if decoding.seed is not None:
            generator = torch.Generator().manual_seed(decoding.seed)
        text = TextStream(self.processor.tokenizer, decoding.stop)
        request = Request(Ticket(len(tokens)), inputs, decoding, text, generator, tokens)
        with self._changed:
            self._admit()
            self._waiting.append(request)
            self._counts["requests"] += 1
            self._changed.notify_all()
        return request.ticket

    def _admit(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed and takes no more requests")
        if len(self._waiting) >= self.max_waiting:
            seconds = max(1.0, self._seconds * len(self._waiting) / self.max_batch)
            raise QueueFull(len(self._waiting), seconds)

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        with self._changed:
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                **self._counts,
                image_hits=0,
                image_misses=0,
                image_bytes=0,
                prefix_hits=0,
                prefix_misses=0,
                prefix_tokens=0,
                prefix_bytes=0,
            )

    def close(self, finish: bool = True) -> None:
        """Takes no more requests, and waits until those that are there have ended: answered, or cancelled."""
        with self._changed:
            self._closed, self._aborted = True, self._aborted or not finish
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._next_round():
            for request in list(self._running):
                self._guarded(request)

    def _next_round(self) -> bool:
        """Waits for work and fills free places; False when the engine is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
            if self._aborted:
                for request in (*self._running, *self._waiting):
                    request.ticket.finish("cancelled")
                self._running, self._waiting = [], deque()
            while self._waiting and len(self._running) < self.max_batch:
                self._running.append(self._waiting.popleft())
            return bool(self._running) or not self._closed

    @torch.inference_mode()
    def _guarded(self, request: Request) -> None:
        """One token of one request; what goes wrong with it harms no other."""
        started = time.monotonic()
        try:
            if request.ticket.cancelled:
                self._end(request, "cancelled")
                return
            if request.sequence is None:
                request.sequence, request.logits = self.decoder.start(request.inputs)
                self._counts["prompt_tokens"] += len(request.tokens)
            else:
                request.logits = self.decoder.step(request.sequence, request.tokens[-1])
            self._choose(request)
        except Exception as error:
            request.ticket.finish("error", error)
            self._end(request, "error")
        self._seconds = 0.99 * self._seconds + 0.01 * (time.monotonic() - started) * request.decoding.max_new_tokens

    def _choose(self, request: Request) -> None:
        decoding = request.decoding
        assert request.logits is not None
        seen = torch.tensor(request.tokens, device=request.logits.device) if decoding.repetition_penalty != 1 else None
        logits = adjusted(request.logits, seen, decoding, self.model.config.image_token_id)
        token = choose(logits, decoding, request.generator)
        told = logprobs(logits, token, decoding.logprobs) if decoding.logprobs is not None else (None, None)
        request.tokens.append(token)
        request.answered += 1
        self._counts["generated_tokens"] += 1
        text = request.text.push(token)
        reason = None
        if token in self._ends or request.text.stopped:
            reason = "stop"
        elif request.answered >= decoding.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += request.text.finish()
        request.ticket.put(Piece(text, token, *told))
        if reason is not None:
            self._end(request, reason)

    def _end(self, request: Request, reason: str) -> None:
        with self._changed:
            self._running.remove(request)
            request.ticket.finish(reason)
