"""One answer at a time on the model as it is: a cache for each request, for any fusion and language model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from chiasm.fusion.base import FusionModel
from chiasm.generation.pictures import PictureCache
from chiasm.generation.prompt import Inputs, Prompt
from chiasm.language.adapter import accepts

AGAIN = 16
"""Tokens of an answer that lost its place, which are taken again between two tokens of the others."""


@dataclass(eq=False)
class OwnCache:
    """What decoding one request has to keep.

    Args:
        prompt: until it is read.
        again: tokens that were answered before, and are taken again behind it.
        inputs: what every forward gets beside its token.
        length: tokens so far, where they count in the attention mask.
    """

    prompt: Prompt | None
    again: list[int] = field(default_factory=list)
    inputs: Inputs = field(default_factory=dict)
    length: int = 0
    cached: int = 0


class SequentialDecoder:
    """Steps of single requests through `model.forward`, for models whose requests cannot share one."""

    together = False

    def __init__(self, model: FusionModel, pictures: PictureCache) -> None:
        self.model, self.pictures = model, pictures
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.takes_features = accepts(model, "image_features")

    def begin(self, prompt: Prompt, room: int, answer: Sequence[int] = ()) -> OwnCache:
        """A place for a prompt, and what was answered before."""
        return OwnCache(prompt, list(answer))

    def read(self, sequence: OwnCache) -> Float[Tensor, " V"] | None:
        """Reads a prompt, or takes the next tokens behind it again; when they were the last, the logits of the next
        one."""
        if sequence.prompt is not None:
            prompt, sequence.prompt = sequence.prompt, None
            logits = self._read(sequence, prompt)
        else:
            again, sequence.again = sequence.again[:AGAIN], sequence.again[AGAIN:]
            logits = [self._step(sequence, token) for token in again][-1]
        return None if sequence.again else logits

    def _read(self, sequence: OwnCache, prompt: Prompt) -> Float[Tensor, " V"]:
        if self.seq2seq:
            return self._encode(sequence, prompt)
        output = self.model(**self._inputs(prompt), use_cache=True, logits_to_keep=1)
        sequence.inputs = {"cache": output.cache}
        if getattr(output, "image_cache", None) is not None:
            sequence.inputs["image_cache"] = output.image_cache
        sequence.length = prompt.inputs["input_ids"].shape[1]
        return output.logits[0, -1]

    def _inputs(self, prompt: Prompt) -> Inputs:
        """A prompt's inputs, with pictures as the encoder left them where the model has one."""
        if not self.takes_features or not prompt.pictures:
            return prompt.inputs
        return prompt.inputs | {"pixel_values": None, "image_features": self.pictures.features(prompt)}

    def _encode(self, sequence: OwnCache, prompt: Prompt) -> Float[Tensor, " V"]:
        tokens = self.pictures.visual_tokens(prompt)
        embeddings = self.model.embed(prompt.inputs["input_ids"], None, tokens)
        language, mask = self.model.language, prompt.inputs["attention_mask"]
        encoded = language.get_encoder()(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        sequence.inputs = {"encoder_outputs": BaseModelOutput(encoded), "attention_mask": mask}
        return self.step([sequence], [language.generation_config.decoder_start_token_id])[0]

    def step(self, sequences: list[OwnCache], tokens: list[int]) -> Float[Tensor, "B V"]:
        """Logits of the tokens behind these, one for each request."""
        return torch.stack([self._step(*pair) for pair in zip(sequences, tokens, strict=True)])

    def _step(self, sequence: OwnCache, token: int) -> Float[Tensor, " V"]:
        ids = torch.tensor([[token]], device=self.model.device)
        sequence.length += 1
        if self.seq2seq:
            output = self.model.language(decoder_input_ids=ids, use_cache=True, **sequence.inputs)
            sequence.inputs["cache"] = output.cache
            return output.logits[0, -1]
        mask = torch.ones(1, sequence.length, dtype=torch.long, device=ids.device)
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **sequence.inputs)
        if "image_cache" in sequence.inputs:
            sequence.inputs["image_cache"] = output.image_cache
        return output.logits[0, -1]

    def end(self, sequence: OwnCache) -> None:
        """Nothing to free: the cache goes with the request."""
        sequence.inputs = {}

    def size(self, sequence: OwnCache) -> int:
        """Bytes that it holds."""
        return _size(sequence.inputs, set())

    def park(self, sequence: OwnCache) -> None:
        """Nothing to do: a request that waits keeps its cache."""

    def resume(self, sequence: OwnCache) -> None:
        """Nothing to do."""


def _size(value: Any, seen: set[int]) -> int:
    """Bytes of all tensors in an object, each counted once."""
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_size(part, seen) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(_size(part, seen) for part in value)
    return _size(getattr(value, "__dict__", {}), seen)
