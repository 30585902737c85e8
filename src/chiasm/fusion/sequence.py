"""Early and unified fusion with positions by row and column: what the model and `generate` must know about them."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from chiasm.fusion.base import FusionOutput
from chiasm.fusion.early import EarlyFusionModel
from chiasm.positions.sequence import AXES, Grid, sequence_positions

DELTA = "position_delta"
"""Attribute of a cache: by how much the next position is ahead of the number of tokens, for each row `(B, 1)`."""


@dataclass
class PositionedOutput(FusionOutput):
    """A fusion's output, with the grids of the pictures that its visual tokens `(P, 1, D_l)` are of."""

    image_grid_thw: Tensor | None = None

    @property
    def image_outputs(self) -> BaseModelOutputWithPooling:
        """Visual tokens, picture by picture where their grids are known."""
        tokens, grids = self.visual_tokens, self.image_grid_thw
        if not isinstance(tokens, Tensor) or grids is None or tokens.shape[1] != 1:
            return super().image_outputs
        patches = grids.prod(dim=1)
        return BaseModelOutputWithPooling(
            pooler_output=tokens[:, 0].split((patches * len(tokens) // patches.sum()).tolist())
        )


class PositionedModel(EarlyFusionModel):
    """A model whose decoder takes `position_ids` of `(axes, B, S)`. `kind` is a key of `AXES`.

    Where a forward is not told positions, it counts on from what it left in the cache that the caller hands around.
    """

    kind: str

    def visual_places(
        self, input_ids: Int[Tensor, "B S"] | None, inputs_embeds: Float[Tensor, "B S D_l"] | None
    ) -> Bool[Tensor, "B S"]:
        """Which tokens have a row and a column."""
        return self.placeholders(input_ids, inputs_embeds)

    def sequence_grids(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        visual: Bool[Tensor, "B S"],
        image_grid_thw: Int[Tensor, "pictures 3"] | None,
    ) -> list[Grid]:
        """The grids of all pictures in the order of their tokens."""
        raise NotImplementedError

    def embed_prompt(self, input_ids: Int[Tensor, "B S"], **pictures: Tensor) -> Float[Tensor, "B S D_l"]:
        """Words and pictures as the decoder reads them, of inputs as the processor makes them."""
        raise NotImplementedError

    def prompt_positions(self, inputs: dict[str, Any]) -> Int[Tensor, "axes B S"] | None:
        """Coordinates of such inputs; None where tokens are just counted."""
        if self.kind == "raster":
            return None
        return self.whole_positions(inputs["input_ids"], None, None, self.grids_of(inputs))

    def grids_of(self, inputs: dict[str, Any]) -> Any:
        """What `sequence_grids` is told of these inputs."""
        return inputs.get("image_grid_thw")

    def whole_positions(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        attention_mask: Any,
        image_grid_thw: Any = None,
    ) -> Int[Tensor, "axes B S"]:
        """Coordinates of a sequence from its beginning."""
        visual = self.visual_places(input_ids, inputs_embeds)
        plain = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        grids = self.sequence_grids(input_ids, inputs_embeds, visual, image_grid_thw)
        return sequence_positions(self.kind, visual, grids, attention_mask if plain else None)

    def positioned(
        self,
        position_ids: Tensor | None,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        attention_mask: Any,
        cache: Cache | None,
        image_grid_thw: Int[Tensor, "pictures 3"] | None,
    ) -> tuple[Tensor | None, Int[Tensor, "B 1"] | None]:
        """Positions of a forward, and what the cache must know of them; None where tokens are just counted."""
        if self.kind == "raster":
            return position_ids, None
        plain = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        if position_ids is not None and (position_ids.ndim == 2 or not (plain or attention_mask is None)):
            return position_ids, None
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is not None:
            return position_ids, None if past else self._delta(position_ids, attention_mask)
        like = input_ids if input_ids is not None else inputs_embeds
        assert like is not None
        if not past:
            positions = self.whole_positions(input_ids, inputs_embeds, attention_mask, image_grid_thw)
            return positions, self._delta(positions, attention_mask)
        if plain:
            counted = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -like.shape[1] :]
        else:
            counted = (torch.arange(like.shape[1], device=like.device) + past)[None].expand(like.shape[0], -1)
        delta = getattr(cache, DELTA, None)
        counted = counted if delta is None else counted + delta
        return counted.expand(AXES[self.kind], -1, -1), None

    @staticmethod
    def _delta(positions: Int[Tensor, "axes B S"], attention_mask: Any) -> Int[Tensor, "B 1"]:
        length = positions.shape[-1]
        plain = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        counted = attention_mask.long().sum(dim=1) if plain else length
        return (positions.amax(dim=(0, 2)) + 1 - counted)[:, None]

    @staticmethod
    def remember(cache: Cache | None, delta: Int[Tensor, "B 1"] | None) -> None:
        """Leaves in the cache what later tokens are counted by."""
        if cache is not None and delta is not None:
            setattr(cache, DELTA, delta)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Coordinates of the whole prompt, whichever way it is given; behind a cache's pictures they are counted on."""
        if self.kind == "raster":
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        given = model_kwargs.get("input_ids")
        ids = given if given is not None and given.shape[1] > 0 else inputs_tensor
        tokens, embeddings = (ids, None) if ids.ndim == 2 else (None, ids)
        cache = model_kwargs.get("cache")
        held = 0 if cache is None else cache.get_seq_length()
        if held and hasattr(cache, DELTA) and not self.visual_places(tokens, embeddings)[:, held:].any():
            counted = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
            return (counted + getattr(cache, DELTA)).expand(AXES[self.kind], -1, -1)
        return self.whole_positions(tokens, embeddings, model_kwargs.get("attention_mask"), self.grids_of(model_kwargs))

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """What is generated is text: it is counted on behind the largest coordinate."""
        before = model_kwargs.get("position_ids")
        kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)
        if before is not None and before.ndim == 3:
            steps = torch.arange(1, num_new_tokens + 1, device=before.device)
            behind = before.amax(dim=(0, 2))[None, :, None] + steps
            kwargs["position_ids"] = torch.cat([before, behind.expand(len(before), -1, -1)], dim=-1)
        return kwargs
