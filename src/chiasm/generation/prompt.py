"""A request's prompt as decoders read it: tokens, pictures, and what both are known by."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
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

    def keys(self, image_token_id: int, lengths: Sequence[int]) -> list[bytes]:
        """What each place of the sequence is known by: a word by its id, a placeholder by its picture.

        Args:
            lengths: placeholders of each picture.
        """
        shown = chain.from_iterable(repeat(*one) for one in zip(self.pictures, lengths, strict=True))
        return [next(shown, word(token)) if token == image_token_id else word(token) for token in self.tokens]

    def packed_keys(self, marks: list[int]) -> list[bytes]:
        """The same where pictures are packed into rows of patches: each of these tokens by all pictures and grids."""
        names = sorted(name for name in self.inputs if name.startswith("pixel_values") or name.endswith("_grid_thw"))
        pictures = _digest([self.inputs[name] for name in names if self.inputs[name] is not None])
        return [pictures if token in marks else word(token) for token in self.tokens]


def word(token: int) -> bytes:
    """What a token is known by."""
    return token.to_bytes(8, "little")


def read_prompt(inputs: Inputs) -> Prompt:
    """A prompt with its pictures one after the other, and their hashes; packed patches are none by themselves."""
    if "pixel_values" in inputs and "image_sizes" not in inputs:
        pictures, masks = real_pictures(inputs["pixel_values"], inputs.get("pixel_attention_mask"))
        inputs = inputs | {"pixel_values": pictures, "pixel_attention_mask": masks}
        inputs = {name: value for name, value in inputs.items() if value is not None}
    rows = [inputs[name] for name in PICTURE_INPUTS if name in inputs]
    packed = any(inputs.get(name) is not None for name in ("image_grid_thw", "video_grid_thw"))
    count = rows[0].shape[0] if rows and not packed else 0
    return Prompt(inputs, tuple(_digest([_filled(row[index]) for row in rows]) for index in range(count)))


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
