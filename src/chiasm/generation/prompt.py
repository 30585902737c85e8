"""A request's prompt as decoders read it: tokens, pictures, and what both are known by."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, repeat
from typing import Any

import torch
from torch import Tensor

from chiasm.fusion.generation_inputs import PICTURE_INPUTS
from chiasm.fusion.pictures import real_pictures

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """Model inputs of one conversation, and a name for each picture by its content.

    Args:
        inputs: as the processor makes them, of one row.
        pictures: a hash over all that visual tokens depend on, for every picture.
    """

    inputs: Inputs
    pictures: tuple[bytes, ...]

    @property
    def tokens(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()

    @cached_property
    def pixel_bytes(self) -> int:
        """What its pictures hold as the model takes them."""
        inputs = (value for value in self.inputs.values() if isinstance(value, Tensor))
        return sum(value.nbytes for value in inputs if value.is_floating_point())

    def keys(self, image_token_id: int, lengths: Sequence[int]) -> list[bytes]:
        """What each place of the sequence is known by: a word by its id, a placeholder by its picture.

        Args:
            lengths: placeholders of each picture.
        """
        shown = chain.from_iterable(repeat(*one) for one in zip(self.pictures, lengths, strict=True))
        return [next(shown, word(token)) if token == image_token_id else word(token) for token in self.tokens]

    def shares(self, image_token_id: int) -> list[int]:
        """Placeholders of each picture, by its share of the patches, or of the pictures where all are alike."""
        grids, places = self.inputs.get("image_grid_thw"), self.tokens.count(image_token_id)
        rows = [1] * len(self.pictures) if grids is None else _patches(grids)
        return [places * own // sum(rows) for own in rows]

    def behind(self, start: int, image_token_id: int) -> tuple[Inputs, int]:
        """Words and pictures from a place on, or from the beginning of the picture that this is in; and where that is.

        Of patches and codes, whose pictures are read one by one.
        """
        ids, ends = self.inputs["input_ids"], list(accumulate(self.shares(image_token_id), initial=0))
        read = self.tokens[:start].count(image_token_id)
        done = sum(end <= read for end in ends[1:])
        if done == len(self.pictures):
            return {"input_ids": ids[:, start:]}, start
        begin = min(start, int((ids[0] == image_token_id).nonzero()[ends[done]]))
        pixels, grids = self.inputs["pixel_values"], self.inputs.get("image_grid_thw")
        if grids is None:
            return {"input_ids": ids[:, begin:], "pixel_values": pixels[done:]}, begin
        rows = sum(_patches(grids)[:done])
        return {"input_ids": ids[:, begin:], "pixel_values": pixels[rows:], "image_grid_thw": grids[done:]}, begin


def word(token: int) -> bytes:
    """What a token is known by."""
    return token.to_bytes(8, "little")


def read_prompt(inputs: Inputs) -> Prompt:
    """A prompt with its pictures one after the other, and their hashes."""
    if "pixel_values" in inputs and "image_sizes" not in inputs:
        pictures, masks = real_pictures(inputs["pixel_values"], inputs.get("pixel_attention_mask"))
        inputs = inputs | {"pixel_values": pictures, "pixel_attention_mask": masks}
        inputs = {name: value for name, value in inputs.items() if value is not None}
    rows: list[Any] = [inputs[name] for name in PICTURE_INPUTS if name in inputs]
    if (grids := inputs.get("image_grid_thw")) is not None:
        rows = [inputs["pixel_values"].split(_patches(grids)), grids]
    count = len(rows[0]) if rows else 0
    return Prompt(inputs, tuple(_digest([_filled(row[index]) for row in rows]) for index in range(count)))


def _patches(grids: Tensor) -> list[int]:
    """How many each picture has."""
    return grids.prod(dim=1).tolist()


def _filled(part: Tensor) -> Tensor:
    """A picture without the tiles of zeros that fill it up to the largest of its prompt."""
    if part.ndim != 4:
        return part
    return part[: max(part.flatten(1).ne(0).any(dim=1).nonzero().flatten().tolist(), default=-1) + 1]


def _digest(parts: list[Tensor]) -> bytes:
    known = hashlib.blake2b(digest_size=16)
    for part in parts:
        known.update(f"{part.dtype}{tuple(part.shape)}".encode())
        known.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return known.digest()


def picture_inputs(inputs: Inputs, chosen: list[int]) -> Inputs:
    """The inputs of some of the pictures."""
    return {name: inputs[name][chosen] for name in PICTURE_INPUTS if name in inputs}
