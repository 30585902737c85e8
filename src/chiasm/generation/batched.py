"""Requests with different pictures and lengths in one forward: a slot of a static KV cache for each of them.

Prompts are read in pieces, and what was read before comes from the prefix cache. Logits are those of a request alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from chiasm.fusion.base import FusionModel
from chiasm.fusion.cross_attention import KeysValues, Look, looking
from chiasm.fusion.intermediate import ImageCache, IntermediateFusionModel
from chiasm.fusion.sequence import PositionedModel
from chiasm.generation.masks import slot_masks
from chiasm.generation.pictures import PictureCache
from chiasm.generation.prefix_cache import PrefixCache
from chiasm.generation.prompt import Prompt, word
from chiasm.generation.slots import Slots, SlotView
from chiasm.language.adapter import accepts
from chiasm.positions.sequence import AXES

CHUNK = 256
"""Tokens of a prompt that are read between two tokens of the others."""
AGAIN = 32
"""The same of an answer that lost its place: as few as a step takes, so that they are what they were."""


@dataclass(eq=False)
class Row:
    """One request's place in the cache.

    Args:
        keys: what each token is known by, for the prefix cache.
        length: tokens that are in the slot.
        cached: of them, those that the prefix cache had.
        prompt: tokens of the prompt; those behind them were answered.
        room: tokens that it may grow to.
        unread: embeddings of the rest.
        bidirectional: tokens at the beginning that see each other in both directions.
        images: with intermediate fusion, what tokens look at.
        visible: which picture each unread token sees.
        coordinates: of the unread tokens, where they have rows and columns.
        ahead: by how much the next token's position is ahead of the number of tokens.
    """

    slot: int
    keys: list[bytes]
    length: int
    cached: int
    prompt: int
    room: int
    unread: Float[Tensor, "1 S D_l"] | None = None
    bidirectional: int = 0
    images: ImageCache | None = None
    visible: Bool[Tensor, "1 S I"] | None = None
    coordinates: Int[Tensor, "axes 1 S"] | None = None
    ahead: int = 0
    parked: Tensor | None = field(default=None, repr=False)


class BatchedDecoder:
    """Reads prompts and takes steps of many requests; the language model's own forward does the work."""

    together = True
    """Whether requests share a step: what fails in it can then be tried again for each of them alone."""
    again = AGAIN
    """Tokens of an answer that are read again at once."""

    def __init__(self, model: FusionModel, slots: Slots, pictures: PictureCache, prefixes: PrefixCache) -> None:
        self.model, self.slots, self.pictures, self.prefixes = model, slots, pictures, prefixes
        self.config = model.language.config.get_text_config()
        self._joined: tuple[list[Row], list[KeysValues]] = ([], [])

    def begin(self, prompt: Prompt, room: int, answer: Sequence[int] = ()) -> Row:
        """A place for a prompt, with what the prefix cache has of it.

        Args:
            room: tokens of the prompt and the longest answer.
            answer: tokens that were answered before, and are read again.
        """
        asked = prompt.inputs["input_ids"]
        ids = torch.cat([asked, asked.new_tensor(answer)[None]], dim=1) if answer else asked
        keys, bidirectional = self._keys(prompt), 0
        keys += map(word, answer)
        if self.model.config.attention == "prefix" and "token_type_ids" in prompt.inputs:
            bidirectional = int((prompt.inputs["token_type_ids"][0] == 0).sum())
        known = None if bidirectional else self.prefixes.find(keys)
        start = 0 if known is None else known.shape[-2]
        sequence = Row(-1, keys, start, start, asked.shape[1], room, bidirectional=bidirectional)
        if isinstance(self.model, IntermediateFusionModel):
            self._show(self.model, sequence, prompt, ids)
        elif isinstance(self.model, PositionedModel):
            self._place(self.model, sequence, prompt, ids)
        else:
            rest = ids[:, start:]
            seen = (rest == self.model.config.image_token_id).any()
            tokens = self.pictures.visual_tokens(prompt) if seen else None
            sequence.unread = self.model.embed(ids if seen else rest, None, tokens)[:, -rest.shape[1] :]
        sequence.slot = self.slots.take(room)
        if known is not None:
            try:
                self.slots.write(sequence.slot, known)
            except BaseException:
                self.slots.leave(sequence.slot)
                raise
        return sequence

    def _keys(self, prompt: Prompt) -> list[bytes]:
        """What each place of a prompt is known by."""
        mark, count = self.model.config.image_token_id, len(prompt.pictures)
        if isinstance(self.model, PositionedModel):
            return prompt.keys(mark, prompt.shares(mark))
        return prompt.keys(mark, self.model.picture_lengths(prompt.inputs, count) if count else [])

    def _show(self, model: IntermediateFusionModel, sequence: Row, prompt: Prompt, ids: Int[Tensor, "1 S"]) -> None:
        """Keys and values of the pictures, and which of them each token sees."""
        placeholders = model.placeholders(ids, None)
        sequence.unread = model.embed(ids, None, placeholders)[:, sequence.length :]
        images = model.remember(self.pictures.visual_tokens(prompt), placeholders, None)
        if images is not None:
            ends = model.places(model.cross_attention.settings.end_of_text, ids, None)
            visible, sequence.images = images.read(placeholders, ends)
            sequence.visible = visible[:, sequence.length :]

    def _place(self, model: PositionedModel, sequence: Row, prompt: Prompt, ids: Int[Tensor, "1 S"]) -> None:
        """Embeddings and coordinates of what is unread; pictures that were read are not encoded."""
        start, asked, total = sequence.length, sequence.prompt, ids.shape[1]
        answer = ids[:, max(start, asked) :]
        rest, begin = prompt.behind(min(start, asked), model.config.image_token_id)
        unread = model.embed_prompt(**rest)[:, min(start, asked) - begin :]
        sequence.unread = torch.cat([unread, model.embed(answer, None, None)], dim=1)
        coordinates = model.prompt_positions(prompt.inputs)
        if coordinates is not None:
            sequence.ahead = int(coordinates.max()) + 1 - asked
            behind = torch.arange(asked, total, device=ids.device) + sequence.ahead
            whole = torch.cat([coordinates, behind.expand(len(coordinates), 1, -1)], dim=-1)
            sequence.coordinates = whole[..., start:]

    def read(self, sequence: Row) -> Float[Tensor, " V"] | None:
        """Reads the next piece of a prompt, or of what was answered behind it; when it was the last, the logits of the
        next token."""
        assert sequence.unread is not None
        asked = sequence.prompt - sequence.length
        size = min(asked, asked if sequence.bidirectional else CHUNK) if asked > 0 else self.again
        size = min(sequence.unread.shape[1], size)
        embeddings, sequence.unread = sequence.unread[:, :size], sequence.unread[:, size:]
        look = None
        if isinstance(self.model, IntermediateFusionModel) and sequence.images is not None:
            assert sequence.visible is not None
            look = self.model.look(sequence.images, sequence.visible[:, :size])
            sequence.visible = sequence.visible[:, size:]
        turns = None
        if sequence.coordinates is not None:
            turns, sequence.coordinates = sequence.coordinates[..., :size], sequence.coordinates[..., size:]
        positions = torch.arange(sequence.length, sequence.length + size, device=embeddings.device)[None]
        both = sequence.bidirectional if asked > 0 else 0
        logits = self.forward([sequence.slot], embeddings, positions, look, turns, both)
        sequence.length += size
        if sequence.unread.shape[1]:
            return None
        sequence.unread = None
        if not sequence.bidirectional:
            self._keep(sequence)
        return self.model.shown(logits, False)[0]

    def step(self, sequences: list[Row], tokens: list[int]) -> Float[Tensor, "B V"]:
        """Logits of the tokens behind these, one for each request."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        positions = torch.tensor([[one.length] for one in sequences], device=ids.device)
        if isinstance(self.model, IntermediateFusionModel):
            embeddings = self.model.embed(ids, None, torch.zeros_like(ids, dtype=torch.bool))
            look, seen = self._look(self.model, sequences, ids)
        else:
            embeddings, look, seen = self.model.embed(ids, None, None), None, []
        turns = None
        if isinstance(self.model, PositionedModel) and self.model.kind != "raster":
            ahead = torch.tensor([[one.ahead] for one in sequences], device=ids.device)
            turns = (positions + ahead)[None].expand(AXES[self.model.kind], -1, -1)
        logits = self.forward([one.slot for one in sequences], embeddings, positions, look, turns)
        for one, images in seen:
            one.images = images
        for one, token in zip(sequences, tokens, strict=True):
            one.keys.append(word(token))
            one.length += 1
        return self.model.shown(logits, False)

    def forward(
        self,
        rows: list[int],
        embeddings: Float[Tensor, "B S D_l"],
        positions: Int[Tensor, "B S"],
        look: Look | None,
        turns: Int[Tensor, "axes B S"] | None = None,
        bidirectional: int = 0,
    ) -> Float[Tensor, "B V"]:
        """Logits of each row's last token; keys and values of all of them go into the slots.

        Args:
            positions: in the slots.
            turns: what rotations turn by, where that is something else.
        """
        view = SlotView(self.slots, rows, positions)
        masks = slot_masks(self.config, positions, view.end, embeddings.dtype, bidirectional)
        inputs: dict[str, Any] = {"inputs_embeds": embeddings, "attention_mask": masks, "cache": view}
        for name, value in (("position_ids", positions if turns is None else turns), ("logits_to_keep", 1)):
            if accepts(self.model.language, name):
                inputs[name] = value
        with looking(look):
            return self.model.language(**inputs, use_cache=True, return_dict=True).logits[:, -1]

    def end(self, sequence: Row) -> None:
        """Frees the slot; the answer stays in the prefix cache for the next turn of its conversation."""
        slot, sequence.parked = sequence.slot, None
        try:
            if slot >= 0 and sequence.unread is None and not sequence.bidirectional:
                self._keep(sequence)
        finally:
            sequence.slot = -1
            if slot >= 0:
                self.slots.leave(slot)

    def size(self, sequence: Row) -> int:
        """Bytes that it holds while it is parked."""
        shown = [] if sequence.images is None else sequence.images.keys_values
        return sequence.length * self.slots.bytes_per_token + sum(states.nbytes for pair in shown for states in pair)

    def park(self, sequence: Row) -> None:
        """Gives a slot up for another request; `resume` goes on from there."""
        sequence.parked = self.slots.read(sequence.slot, 0, sequence.length)
        self.slots.leave(sequence.slot)
        sequence.slot = -1

    def resume(self, sequence: Row) -> None:
        assert sequence.parked is not None
        if sequence.slot < 0:
            sequence.slot = self.slots.take(sequence.room)
        self.slots.write(sequence.slot, sequence.parked)
        sequence.parked = None

    def _keep(self, sequence: Row) -> None:
        def read(start: int, stop: int) -> Tensor:
            return self.slots.read(sequence.slot, start, stop)

        self.prefixes.keep(sequence.keys[: sequence.length], read)

    def _look(
        self, model: IntermediateFusionModel, sequences: list[Row], ids: Int[Tensor, "B 1"]
    ) -> tuple[Look | None, list[tuple[Row, ImageCache]]]:
        """What one new token of each request looks at, and what the requests will then have seen.

        Rows have as many pictures as the one with the most.
        """
        images = [one.images for one in sequences if one.images is not None]
        if not images:
            return None, []
        if self._joined[0] != sequences:
            self._joined = (list(sequences), _joined(sequences))
        none = ids.new_zeros(1)
        seen, ended = (
            torch.cat([none if one.images is None else getattr(one.images, name) for one in sequences])
            for name in ("seen", "ended")
        )
        ends = model.places(model.cross_attention.settings.end_of_text, ids, None)
        cache = ImageCache(self._joined[1], images[0].tokens, seen, ended)
        visible, cache = cache.read(torch.zeros_like(ids, dtype=torch.bool), ends)
        then = [
            (one, replace(one.images, seen=cache.seen[row : row + 1], ended=cache.ended[row : row + 1]))
            for row, one in enumerate(sequences)
            if one.images is not None
        ]
        return model.look(cache, visible), then


def _joined(sequences: list[Row]) -> list[KeysValues]:
    """Keys and values of all rows for each block, filled up with zeros, which no token sees."""
    some = next(one.images for one in sequences if one.images is not None)
    most = max(one.images.keys_values[0][0].shape[2] for one in sequences if one.images is not None)
    joined = []
    for block, pair in enumerate(some.keys_values):
        states = []
        for which in range(2):
            blank = pair[which].new_zeros(1, pair[which].shape[1], 0, pair[which].shape[3])
            rows = [blank if one.images is None else one.images.keys_values[block][which] for one in sequences]
            states.append(torch.cat([F.pad(row, (0, 0, 0, most - row.shape[2])) for row in rows]))
        joined.append((states[0], states[1]))
    return joined
