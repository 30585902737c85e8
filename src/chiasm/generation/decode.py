"""Answers from a generative model: batches, streams, and prompts with any number of pictures."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from transformers import PreTrainedModel, TextIteratorStreamer

from chiasm.data.chat import Message
from chiasm.data.processor import ChiasmProcessor
from chiasm.language.adapter import ContextError, context_length


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token, above it samples within `top_k`, `top_p` and `min_p`.
        top_k: the so many likeliest; 0 is all.
        top_p: the likeliest that together have this share.
        min_p: those with at least this share of the likeliest one's probability.
        repetition_penalty: above 1, tokens of the prompt and the answer become less likely.
        beams: hypotheses that are followed at once; 1 is none beside the answer.
        stop: strings that end the answer and are not part of it.
        seed: of the sampling; None takes a new one each time.
        logprobs: log-probabilities of so many likeliest tokens beside the chosen one; None tells none.
        choices: the answer is one of these texts.
        json_schema: the answer is JSON of this schema.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    beams: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    choices: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raises a ValueError that names the first value out of its range."""
        ranges: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a finite number above"),
            ("top_k", self.top_k >= 0, "0 (all) or a number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number above 0"),
            ("beams", self.beams >= 1, "at least 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of texts that are not empty"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "None or a number of tokens"),
            ("choices", not isinstance(self.choices, str) and all(self.choices), "a tuple of texts that are not empty"),
        )
        for name, right, expected in ranges:
            if not right:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected {expected}")
        if self.choices and self.json_schema is not None:
            raise ValueError("choices and json_schema are both given; an answer can follow only one of them")

    @property
    def constrained(self) -> bool:
        """Whether an answer must have a form."""
        return bool(self.choices) or self.json_schema is not None

    def arguments(self) -> dict[str, Any]:
        """Arguments of `transformers.generate`."""
        self.check()
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": self.beams,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            chosen |= {"min_p": self.min_p} if self.min_p else {}
        return chosen


def prepare(
    model: PreTrainedModel,
    processor: ChiasmProcessor,
    messages: list[list[Message]],
    images: list[list[Any]],
    max_new_tokens: int,
) -> dict[str, torch.Tensor]:
    """Left-padded inputs of a batch of conversations on the model's device and in its dtype.

    Raises:
        ContextError: with the answer they are longer than the language model's context.
    """
    inputs = processor(messages=messages, images=[list(group) for group in images])
    tokens, context = inputs["input_ids"].shape[1], context_length(model.config)
    if context is not None and tokens + max_new_tokens > context:
        raise ContextError(
            f"a prompt of {tokens} tokens and max_new_tokens={max_new_tokens} are {tokens + max_new_tokens} tokens, "
            f"but the language model's context is {context}; shorten the prompt or lower max_new_tokens"
        )
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def stop_at_end_of_turn(model: PreTrainedModel, processor: ChiasmProcessor) -> None:
    """Generation ends at the chat template's end-of-turn mark as well as at the end of text."""
    stops = model.generation_config.eos_token_id
    known = stops if isinstance(stops, list) else [stops]
    end = processor.end_of_turn_id()
    if end is not None and end not in known:
        model.generation_config.eos_token_id = [stop for stop in known if stop is not None] + [end]


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens that end an answer."""
    stops = model.generation_config.eos_token_id
    return {stop for stop in (stops if isinstance(stops, list) else [stops]) if stop is not None}


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    processor: ChiasmProcessor,
    messages: list[list[Message]],
    images: list[list[Any]],
    decoding: Decoding,
) -> list[str]:
    """One answer for each conversation; a batch answers as its members would alone."""
    if len(messages) != len(images):
        raise ValueError(f"{len(messages)} conversation(s) but {len(images)} list(s) of images; pass one list each")
    if not messages:
        return []
    inputs = prepare(model, processor, messages, images, decoding.max_new_tokens)
    tokens = model.generate(**inputs, pad_token_id=processor.tokenizer.pad_token_id, **decoding.arguments())
    prompt = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answers = processor.tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def stream(
    model: PreTrainedModel,
    processor: ChiasmProcessor,
    messages: list[Message],
    images: list[Any],
    decoding: Decoding,
) -> Iterator[str]:
    """Pieces of one answer as they are decoded; an error in decoding is raised here."""
    inputs = prepare(model, processor, [messages], [images], decoding.max_new_tokens)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def decode() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    **inputs,
                    streamer=streamer,
                    pad_token_id=processor.tokenizer.pad_token_id,
                    **decoding.arguments(),
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=decode, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failure:
        raise failure[0]
