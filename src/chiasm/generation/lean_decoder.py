"""Decoding steps of a Llama-shaped model on its bare tensors; prompts still go through the model itself."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chiasm.fusion.base import FusionModel
from chiasm.fusion.cross_attention import Look
from chiasm.generation.batched import AGAIN, BatchedDecoder
from chiasm.generation.pictures import PictureCache
from chiasm.generation.prefix_cache import PrefixCache
from chiasm.generation.slots import Slots


class LeanDecoder(BatchedDecoder):
    """A batched decoder whose short forwards skip the modules.

    Args:
        step: runs layers and head, as `NativeStep` does.
        short: most tokens of a prompt that it reads.
    """

    def __init__(
        self,
        model: FusionModel,
        slots: Slots,
        pictures: PictureCache,
        prefixes: PrefixCache,
        step: Any,
        short: int,
    ) -> None:
        super().__init__(model, slots, pictures, prefixes)
        self.lean_step, self.short, self.again = step, short, min(AGAIN, short)

    def forward(
        self,
        rows: list[int],
        embeddings: Float[Tensor, "B S D_l"],
        positions: Int[Tensor, "B S"],
        look: Look | None,
        turns: Int[Tensor, "axes B S"] | None = None,
        bidirectional: int = 0,
    ) -> Float[Tensor, "B V"]:
        length = embeddings.shape[1]
        flat_turns = turns is None or bool((turns == turns[0]).all())
        if bidirectional or length > self.short or not flat_turns:
            return super().forward(rows, embeddings, positions, look, turns, bidirectional)
        hidden = embeddings.flatten(0, 1).float().contiguous().clone()
        places = torch.tensor(rows).repeat_interleave(length)
        flat = positions.flatten().contiguous()
        angles = flat if turns is None else turns[0].flatten().contiguous()
        done, last = 0, len(self.lean_step.lean.layers)
        for index, layer in enumerate(self._blocks(look)):
            self.lean_step.run(self.slots, done, layer, hidden, places, flat, angles)
            assert look is not None and look.blocks is not None
            states = hidden.unflatten(0, (-1, length))
            hidden = look.blocks[index](states, *look.keys_values[index], look).flatten(0, 1).float().contiguous()
            done = layer
        return self.lean_step.run(self.slots, done, last, hidden, places, flat, angles, told=len(rows))

    def _blocks(self, look: Look | None) -> list[int]:
        """Layers that have a block of cross-attention in front of them."""
        return [] if look is None else self.model.cross_attention.settings.layers
