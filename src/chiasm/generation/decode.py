"""Answers from a generative model: batches, streams, and prompts with any number of pictures."""

import math
from collections.abc import Iterator
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
    """How tokens are chosen: `temperature` 0 takes the likeliest, above it samples within `top_k` and `top_p`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def arguments(self) -> dict[str, Any]:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}, expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}, expected 0 (greedy) or a finite number above")
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": 1,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
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
