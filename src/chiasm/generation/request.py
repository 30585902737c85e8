"""One request's answer: from logits to a token, its text, and whether that was the end."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessorList

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.generation.choose import adjusted, biased, choose, generator, logprobs
from chiasm.generation.constraint import Constraint
from chiasm.generation.decoding import Decoding
from chiasm.generation.prompt import Prompt
from chiasm.generation.published import published
from chiasm.generation.text import TextStream
from chiasm.generation.ticket import Piece, Ticket


@dataclass(eq=False)
class Request:
    """A request on its way through the engine.

    Args:
        tokens: of the prompt and the answer so far.
        sequence: its place with the decoder, once it has one.
        reading: whether some of its prompt is still to be read.
        parked: bytes that are kept of it while it has given its place to another one.
        turn: tokens since it got its place.
        held: pieces of which nothing is shown yet, and where their text begins; a stop string may still cut them out.
        untold: text that waits for them.
        published: what the model's own settings do to logits, with the repetition penalty; None is nothing.
    """

    ticket: Ticket
    prompt: Prompt
    decoding: Decoding
    text: TextStream
    generator: torch.Generator | None
    constraint: Constraint | None
    tokens: list[int]
    sequence: Any = None
    reading: bool = True
    parked: int = 0
    answered: int = 0
    turn: int = 0
    held: list[tuple[int, Piece]] = field(default_factory=list)
    untold: str = ""
    started: float = field(default_factory=time.monotonic)
    published: LogitsProcessorList | None = None

    @property
    def room(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return self.ticket.prompt_tokens + self.decoding.max_new_tokens

    @property
    def answer(self) -> list[int]:
        """Tokens that it has answered so far."""
        return self.tokens[len(self.tokens) - self.answered :]

    @property
    def plain(self) -> bool:
        """Whether its token is just the likeliest one."""
        decoding = self.decoding
        untouched = decoding.temperature == 0 and decoding.repetition_penalty == 1 and self.published is None
        return untouched and not decoding.biased and self.constraint is None and decoding.logprobs is None

    @property
    def unread(self) -> int:
        """Tokens that are still to be read; of a prompt that was not begun, all."""
        return len(self.prompt.tokens) + self.answered - (0 if self.sequence is None else self.sequence.length)

    def choose(self, logits: Float[Tensor, " V"]) -> tuple[int, tuple[Any, Any]]:
        """The next token, and its log-probabilities where they are asked for."""
        if self.published is not None:
            logits = self.published(torch.tensor([self.tokens], device=logits.device), logits[None].float())[0]
        else:
            penalised = self.decoding.repetition_penalty != 1
            seen = torch.tensor(self.tokens, device=logits.device) if penalised else None
            logits = adjusted(logits, seen, self.decoding)
        logits = biased(logits, self.answer, self.decoding)
        if self.constraint is not None:
            logits = self.constraint.allowed(logits)
        token = choose(logits, self.decoding, self.generator)
        told = None if self.decoding.logprobs is None else logprobs(logits, token, self.decoding.logprobs)
        return token, told or (None, None)

    def add(self, token: int, told: tuple[Any, Any], ends: set[int]) -> str | None:
        """Hands the token's piece to the caller; the reason if the answer ends with it."""
        self.tokens.append(token)
        self.answered += 1
        self.turn += 1
        begin = self.text.arrived
        text = self.text.push(token)
        complete = self.constraint is not None and self.constraint.complete(token)
        reason = None
        if token in ends or self.text.stopped or complete:
            reason = "stop"
        elif self.answered >= self.decoding.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += self.text.finish()
        self._tell(begin, text, Piece("", token, *told), reason is not None)
        return reason

    def _tell(self, begin: int, text: str, piece: Piece, over: bool) -> None:
        """Hands over the pieces that are sure; one that a stop string cut out has no log-probabilities any more."""
        self.held.append((begin, piece))
        shown = self.text.shown
        sure = over or self.decoding.logprobs is None or not self.decoding.stop
        count = len(self.held) if sure else sum(start < shown for start, _ in self.held)
        ready, self.held = self.held[:count], self.held[count:]
        self.untold += text
        if ready:
            ready[-1][1].text, self.untold = self.untold, ""
        for start, one in ready:
            if self.text.stopped and start >= shown:
                one.logprob = one.top = None
            self.ticket.put(one)


def new_request(
    model: FusionModel, processor: ChiasmProcessor, prompt: Prompt, decoding: Decoding, constraint: Constraint | None
) -> Request:
    """A request that waits for its place."""
    tokens = prompt.tokens
    if model.config.is_encoder_decoder:
        tokens = [model.language.generation_config.decoder_start_token_id]
    ticket, text = Ticket(len(prompt.tokens)), TextStream(processor.tokenizer, decoding.stop)
    habits = published(model, decoding, len(tokens), prompt.inputs["input_ids"])
    own = generator(decoding, model.device)
    return Request(ticket, prompt, decoding, text, own, constraint, tokens, published=habits)
