"""Answers from a generative model: batches, streams, and prompts with any number of pictures."""

from collections.abc import Iterator
from contextlib import nullcontext
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from chiasm.data.chat import Message
from chiasm.data.pixels import least_tokens
from chiasm.data.processor import ChiasmProcessor
from chiasm.generation.choose import Biases, Chooser, generator
from chiasm.generation.constraint import Constraint, ConstraintProcessor, token_reader
from chiasm.generation.decoding import Decoding
from chiasm.generation.text import StopStrings, TextStream, Trim, before_stop
from chiasm.language.adapter import ContextError, context_length, vocabulary
from chiasm.language.generation_settings import SAMPLING, change

__all__ = ["Decoding", "arguments", "end_tokens", "generate", "prepare", "stop_at_end_of_turn", "stream"]


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
    images, context = [list(group) for group in images], context_length(model.config)
    shown = max((least_tokens(processor.image_processor, group) for group in images), default=0)
    if context is not None and shown >= context:  # before their patches are made, which may take gigabytes
        raise ContextError(
            f"the pictures alone are {shown} tokens, but the language model's context is {context}; "
            "show fewer or smaller ones",
            context - shown,
        )
    inputs = processor(messages=messages, images=images)
    tokens = inputs["input_ids"].shape[1]
    apart = model.config.is_encoder_decoder and max(tokens, max_new_tokens) <= (context or tokens)
    if context is not None and tokens + max_new_tokens > context and not apart:
        raise ContextError(
            f"a prompt of {tokens} tokens and max_new_tokens={max_new_tokens} are {tokens + max_new_tokens} tokens, "
            f"but the language model's context is {context}; shorten the prompt or lower max_new_tokens",
            context if model.config.is_encoder_decoder and tokens <= context else context - tokens,
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
        change(model.generation_config, eos_token_id=[stop for stop in known if stop is not None] + [end])


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens that end an answer."""
    stops = model.generation_config.eos_token_id
    return {stop for stop in (stops if isinstance(stops, list) else [stops]) if stop is not None}


def never_tokens(model: PreTrainedModel) -> list[int]:
    """Tokens that no answer has: the placeholder, and those that the model's own settings suppress."""
    never = [model.config.image_token_id, *(model.generation_config.suppress_tokens or [])]
    return [token for token in never if token < vocabulary(model.language)]


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
    beams = decoding.beams > 1 and decoding.temperature > 0  # who draw among themselves
    with _OwnDraws([generator(decoding, model.device) for _ in messages]) if beams else nullcontext():
        tokens = model.generate(**inputs, **arguments(model, processor, decoding, inputs))
    answers = processor.tokenizer.batch_decode(tokens[:, _start(model, inputs) :], skip_special_tokens=True)
    return [before_stop(answer, decoding.stop).strip() for answer in answers]


def _start(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> int:
    """Where answers begin in what `transformers.generate` hands back; an encoder–decoder's start token has no text."""
    return 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]


def arguments(
    model: PreTrainedModel, processor: ChiasmProcessor, decoding: Decoding, inputs: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """All that `transformers.generate` is told beside the inputs."""
    told: dict[str, Any] = {"pad_token_id": processor.tokenizer.pad_token_id, **decoding.arguments()}
    rows, processors = len(inputs["input_ids"]), LogitsProcessorList()
    if decoding.logprobs is not None:
        raise ValueError(f"logprobs={decoding.logprobs}: log-probabilities are told by chiasm.generation.engine only")
    decoding.check(vocabulary(model.language))
    if decoding.biased:
        processors.append(Biases(decoding, _start(model, inputs) + model.config.is_encoder_decoder))
    if decoding.stop:
        stop = StopStrings(processor.tokenizer, decoding.stop, _start(model, inputs))
        told["stopping_criteria"] = StoppingCriteriaList([stop])
    if decoding.constrained:
        ends, size = end_tokens(model), model.get_output_embeddings().out_features
        reader = token_reader(processor.tokenizer, size)
        first = Constraint(reader, decoding, ends)
        constraints = [first, *(first.again() for _ in range(1, rows))]
        processors.append(ConstraintProcessor(constraints, ends))
    if decoding.temperature > 0 and decoding.beams == 1:
        told |= dict.fromkeys(SAMPLING) | {"do_sample": False}
        processors.append(Chooser(decoding, model.device, rows))
    return told | {"logits_processor": processors}


class _OwnDraws(TorchFunctionMode):
    """This thread draws every row of a batch by random numbers of its own, whatever others draw."""

    def __init__(self, generators: list[torch.Generator | None]) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.multinomial:
            return function(*args, **kwargs)
        shares, *rest = args
        rows = zip(shares, self.generators, strict=True)
        return torch.stack([function(row, *rest, **kwargs, generator=own) for row, own in rows])


class _Pieces(BaseStreamer, StoppingCriteria):
    """What `generate` hands over: the prompt first, then a token at a time; as text in a queue, None at the end.

    Attributes:
        left: whether nobody listens any more, so that decoding may stop.
    """

    def __init__(self, text: TextStream) -> None:
        self.text, self.queue, self.started = text, SimpleQueue[str | None](), False
        self.left = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.left, device=input_ids.device)

    def put(self, value: torch.Tensor) -> None:
        if self.started:
            self.queue.put("".join(self.text.push(token) for token in value.flatten().tolist()))
        self.started = True

    def end(self) -> None:
        self.queue.put(self.text.finish())
        self.queue.put(None)


def stream(
    model: PreTrainedModel,
    processor: ChiasmProcessor,
    messages: list[Message],
    images: list[Any],
    decoding: Decoding,
) -> Iterator[str]:
    """Pieces of one answer as they are decoded; an error in decoding is raised here.

    Who leaves before the end stops the decoding after the token that is being made.
    """
    inputs = prepare(model, processor, [messages], [images], decoding.max_new_tokens)
    told = arguments(model, processor, decoding, inputs)
    streamer = _Pieces(TextStream(processor.tokenizer, decoding.stop))
    told["stopping_criteria"] = StoppingCriteriaList([*told.get("stopping_criteria", ()), streamer])
    failure: list[BaseException] = []

    def decode() -> None:
        try:
            with torch.inference_mode():
                model.generate(**inputs, streamer=streamer, **told)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=decode, daemon=True)
    thread.start()
    try:
        yield from filter(None, map(Trim(), iter(streamer.queue.get, None)))
    finally:
        streamer.left = True
    thread.join()
    if failure:
        raise failure[0]
