"""Early fusion of pictures in tiles: the whole, then the tiles row by row, each row with its end (LLaVA-NeXT, 2024)."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from chiasm.connectors import Connector
from chiasm.data.tiles import Tiling
from chiasm.fusion.base import FusionOutput
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel


class TiledFusionModel(EarlyFusionModel, GenerationMixin):
    """A picture has as many visual tokens as its shape needs; a learned one ends each row of its tiles."""

    def build_parts(self, config: ChiasmConfig, vision: Any, language: PreTrainedModel | None) -> None:
        super().build_parts(config, vision, language)
        grid = self.connector.token_grid
        if grid is None or grid[0] * grid[1] != self.connector.num_tokens:
            raise ValueError(
                f"tiles need a connector whose visual tokens form a grid, got {config.connector['name']!r} with "
                f"{self.connector.num_tokens} tokens of {self.vision.num_patches} patches; take mlp, linear or a "
                "pooling connector, and leave class tokens out"
            )
        grids = tuple((rows, columns) for rows, columns in config.tiles)
        self.tiling = Tiling(grids, self.vision.image_size, grid)

    def new_connector(self) -> Connector:
        connector = super().new_connector()
        width = connector.width
        connector.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
        return connector

    @property
    def image_newline(self) -> Float[nn.Parameter, " D_l"]:
        """What ends a row."""
        return self.connector.get_parameter("image_newline")

    @property
    def num_image_tokens(self) -> int:
        """Of a large square picture; each has its own number."""
        return self.tiling.length(*self.tiling.square)

    def picture_lengths(self, inputs: Mapping[str, Any], pictures: int) -> list[int]:
        return [self.tiling.length(height, width) for height, width in _sizes(inputs.get("image_sizes"))]

    def visual_tokens(  # type: ignore[override]
        self,
        pixel_values: Float[Tensor, "... 3 height width"] | None = None,
        image_sizes: Int[Tensor, "images 2"] | None = None,
    ) -> tuple[Tensor, ...] | None:
        """Visual tokens `(T, D_l)` of each picture; None without any.

        Raises:
            ValueError: sizes are missing, or are not those of the tiles.
        """
        if pixel_values is None or not len(pixel_values):
            return None
        sizes = _sizes(image_sizes)
        counts = [self.tiling.tiles(height, width) for height, width in sizes]
        tiles = _in_a_row(pixel_values, sizes, counts)
        tokens = self.connect_features(self.encode_images(tiles)).split(counts)
        return tuple(self._arranged(own, *size) for own, size in zip(tokens, sizes, strict=True))

    def _arranged(self, tokens: Float[Tensor, "tiles N D_l"], height: int, width: int) -> Float[Tensor, "T D_l"]:
        """A picture's tokens: the whole, then what its tiles show of it, row by row."""
        plane = tokens[1:].unflatten(1, self.tiling.tokens).unflatten(0, self.tiling.grid(height, width))
        plane = plane.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        rows, columns = self.tiling.kept(height, width)
        plane = plane[rows.start : rows.stop, columns.start : columns.stop]
        ends = self.image_newline.to(plane).expand(len(plane), 1, -1)
        return torch.cat([tokens[0], torch.cat([plane, ends], dim=1).flatten(0, 1)])

    def blank_picture(self, like: Tensor) -> Float[Tensor, "1 T D_l"]:
        """Also the end of a row."""
        tokens = super().blank_picture(like)
        return torch.cat([tokens, self.image_newline.to(tokens)[None, None]], dim=1)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None = None,
        pixel_values: Float[Tensor, "... 3 height width"] | None = None,
        image_sizes: Int[Tensor, "images 2"] | None = None,
        token_type_ids: Int[Tensor, "B S"] | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> FusionOutput:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: text tokens, with as many placeholders (`config.image_token_id`) as a picture has visual tokens.
            pixel_values: of each picture the whole and its tiles, `(images, tiles, 3, height, width)`, where zeros fill
                up; or all of them in a row, `(tiles, 3, height, width)`.
            image_sizes: height and width of each picture before it was cut.
        """
        tokens = self.visual_tokens(pixel_values, image_sizes)
        embedded = self.embed(input_ids, inputs_embeds, tokens)
        read = (embedded, attention_mask, position_ids, cache)
        wanted = (labels, logits_to_keep, num_items_in_batch, return_logits)
        fields = self.predict(*read, *wanted, token_type_ids=token_type_ids, **kwargs)
        return FusionOutput(**fields, visual_tokens=tokens)

    def picture_prompts(self, count: int) -> Int[Tensor, "B S"]:
        raise ValueError("pictures in tiles need a text: build the inputs with the model's processor")

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Tiles in a row are given back to their pictures, which beams repeat."""
        pixels = kwargs.get("pixel_values")
        if pixels is not None and pixels.ndim == 4:
            counts = [self.tiling.tiles(height, width) for height, width in _sizes(kwargs.get("image_sizes"))]
            kwargs["pixel_values"] = nn.utils.rnn.pad_sequence(pixels.split(counts), batch_first=True)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)


def _sizes(image_sizes: Tensor | None) -> list[tuple[int, int]]:
    if image_sizes is None:
        raise ValueError(
            "pictures in tiles need image_sizes, the height and width of each; build the inputs with the model's "
            "processor"
        )
    return [(height, width) for height, width in image_sizes.tolist()]


def _in_a_row(pixel_values: Tensor, sizes: list[tuple[int, int]], counts: list[int]) -> Float[Tensor, "tiles 3 h w"]:
    """The tiles of all pictures, without those that only fill up."""
    if pixel_values.ndim == 4 and len(pixel_values) == sum(counts):
        return pixel_values
    if pixel_values.ndim != 5 or len(pixel_values) != len(counts) or pixel_values.shape[1] < max(counts):
        told = ", ".join(f"{count} of {height}×{width}" for (height, width), count in zip(sizes, counts, strict=True))
        raise ValueError(
            f"pixel_values are {tuple(pixel_values.shape)}, but image_sizes make {len(counts)} picture(s) in tiles: "
            f"{told}; build the inputs with the model's processor"
        )
    return torch.cat([tiles[:count] for tiles, count in zip(pixel_values, counts, strict=True)])
