"""Early fusion of pictures and videos in their own resolution, with M-RoPE positions (Qwen2-VL, arXiv 2409.12191)."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from chiasm.connectors import Connector, build_connector
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.sequence import PositionedModel, PositionedOutput
from chiasm.language.adapter import build_language, embedding_width
from chiasm.positions.sequence import Grid, split_positions
from chiasm.vision.packed import PackedTower

PACKED_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
TEXT, IMAGE, VIDEO = 0, 1, 2
Given = tuple[int, Tensor | None, Tensor | None]
"""Kind, patches and grids."""


class PackedFusionModel(PositionedModel, GenerationMixin):
    """A tower for packed patches, a connector that merges blocks of them, and a decoder with M-RoPE.

    The connector is built for one block: what it merges does not depend on a picture's size.
    """

    def build_parts(self, config: ChiasmConfig, vision: Any, language: PreTrainedModel | None) -> None:
        self.vision = vision or PackedTower(config.vision_config)
        self.language = language or build_language(config.text_config)
        config.vision_config, config.text_config = self.vision.config, self.language.config
        self.token_order = None
        self.kind, _ = split_positions(self.language.config.positions)
        self.connector = self.new_connector()
        if self.connector.num_tokens != 1:
            side = self.vision.merge
            raise ValueError(
                f"connector {config.connector['name']!r} makes {self.connector.num_tokens} tokens of a block of "
                f"{side}×{side} patches, expected one; use patch_merger with factor {side}"
            )

    def new_connector(self) -> Connector:
        block = (self.vision.merge, self.vision.merge)
        return build_connector(self.config.connector, self.vision.width, embedding_width(self.language), block, 0)

    def encode_pictures(
        self, pixel_values: Float[Tensor, "P pixels"], grid_thw: Int[Tensor, "pictures 3"]
    ) -> Float[Tensor, "blocks 1 D_l"]:
        """Visual tokens of all pictures in a row."""
        features = self.vision(pixel_values.flatten(0, -2), grid_thw)
        return self.connect_features(features.unflatten(0, (-1, self.vision.merge**2)))

    def blank_picture(self, like: Tensor) -> Float[Tensor, "1 1 D_l"]:
        block = torch.zeros(1, self.vision.merge**2, self.vision.width, device=like.device, dtype=like.dtype)
        return self.connect_features(block)

    @property
    def picture_marks(self) -> list[int]:
        return [token for token in (self.config.image_token_id, self.config.video_token_id) if token is not None]

    def _kinds(
        self, input_ids: Int[Tensor, "B S"] | None, inputs_embeds: Float[Tensor, "B S D_l"] | None
    ) -> Int[Tensor, "B S"]:
        """Of every token, whether it is of a picture or of a video."""
        pictures = self.places(self.config.image_token_id, input_ids, inputs_embeds)
        videos = self.places(self.config.video_token_id, input_ids, inputs_embeds)
        return torch.where(pictures, IMAGE, torch.where(videos, VIDEO, TEXT))

    def visual_places(
        self, input_ids: Int[Tensor, "B S"] | None, inputs_embeds: Float[Tensor, "B S D_l"] | None
    ) -> Bool[Tensor, "B S"]:
        return self._kinds(input_ids, inputs_embeds) != TEXT

    def sequence_grids(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        visual: Bool[Tensor, "B S"],
        image_grid_thw: Any,
    ) -> list[Grid]:
        """`image_grid_thw` is a pair here: of pictures and of videos."""
        waiting = {
            kind: [(frames, rows // self.vision.merge, columns // self.vision.merge) for frames, rows, columns in grids]
            for kind, grids in self._grids(image_grid_thw).items()
        }
        kinds = self._kinds(input_ids, inputs_embeds)
        return [grid for row in kinds.tolist() for grid in _in_order(row, waiting)]

    @staticmethod
    def _grids(pair: Any) -> dict[int, list[list[int]]]:
        images, videos = pair if isinstance(pair, tuple) else (pair, None)
        return {IMAGE: [] if images is None else images.tolist(), VIDEO: [] if videos is None else videos.tolist()}

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Int[Tensor, "pictures 3"] | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Int[Tensor, "videos 3"] | None = None,
        mm_token_type_ids: Int[Tensor, "B S"] | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> PositionedOutput:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: text, with a placeholder for every block of a picture (`config.image_token_id`) or of a video.
            pixel_values: patches of all pictures, as the reference's image processor makes them.
            image_grid_thw: each picture's frames, rows and columns of patches.
            pixel_values_videos, video_grid_thw: the same of videos.
            mm_token_type_ids: not read: tokens tell it themselves.
        """
        given = ((IMAGE, pixel_values, image_grid_thw), (VIDEO, pixel_values_videos, video_grid_thw))
        embedded, tokens = self._read(input_ids, inputs_embeds, given)
        if self.training and tokens is None:
            embedded = embedded + 0.0 * self.blank_picture(embedded).sum().to(embedded.dtype)
        pair: Any = (image_grid_thw, video_grid_thw)
        position_ids, delta = self.positioned(position_ids, input_ids, inputs_embeds, attention_mask, cache, pair)
        read = (embedded, attention_mask, position_ids, cache)
        wanted = (labels, logits_to_keep, num_items_in_batch, return_logits)
        fields = self.predict(*read, *wanted, **kwargs)
        self.remember(fields.get("cache"), delta)
        grids = video_grid_thw if pixel_values is None else image_grid_thw
        return PositionedOutput(**fields, visual_tokens=tokens, image_grid_thw=grids)

    def embed_prompt(
        self,
        input_ids: Int[Tensor, "B S"],
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        **_: Tensor,
    ) -> Float[Tensor, "B S D_l"]:
        given = ((IMAGE, pixel_values, image_grid_thw), (VIDEO, pixel_values_videos, video_grid_thw))
        return self._read(input_ids, None, given)[0]

    def _read(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, given: Sequence[Given]
    ) -> tuple[Float[Tensor, "B S D_l"], Tensor | None]:
        """Embeddings with the visual tokens in their places, and those of the first kind that was given."""
        kinds = self._kinds(input_ids, inputs_embeds)
        embedded = self.word_embeddings(input_ids, inputs_embeds, kinds != TEXT)
        tokens = None
        for kind, patches, grids in given:
            seen = None if patches is None else self.encode_pictures(patches, _required(grids))
            embedded = self._placed(embedded, kinds == kind, seen)
            tokens = seen if tokens is None else tokens
        return embedded, tokens

    @staticmethod
    def _placed(embedded: Tensor, places: Bool[Tensor, "B S"], tokens: Tensor | None) -> Tensor:
        wanted, found = places.sum(), 0 if tokens is None else len(tokens)
        if not torch.compiler.is_compiling() and wanted != found:
            raise ValueError(f"the text holds {wanted} image placeholders but the pictures give {found} visual tokens")
        return embedded if tokens is None else embedded.masked_scatter(places[..., None], tokens.to(embedded))

    def grids_of(self, inputs: dict[str, Any]) -> Any:
        return inputs.get("image_grid_thw"), inputs.get("video_grid_thw")

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams and several answers repeat a row's pictures together."""
        packed = {name: kwargs.pop(name) for name in PACKED_INPUTS if kwargs.get(name) is not None}
        kinds = self._kinds(*self.prompt(input_ids, kwargs.get("inputs_embeds")))
        for kind, (pixels, grids) in ((IMAGE, PACKED_INPUTS[:2]), (VIDEO, PACKED_INPUTS[2:])):
            if pixels in packed:
                tokens = (kinds == kind).sum(dim=1).tolist()
                repeated = _repeated(packed[pixels], packed[grids], tokens, self.vision.merge**2, expand_size)
                packed[pixels], packed[grids] = repeated
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | packed


def _required(grids: Tensor | None) -> Tensor:
    if grids is None:
        raise ValueError("pixel_values need image_grid_thw, and pixel_values_videos need video_grid_thw")
    return grids


def _in_order(row: list[int], waiting: dict[int, list[Grid]]) -> list[Grid]:
    """Grids of one row's pictures and videos as they follow each other; they are taken from `waiting`."""
    taken = []
    for kind, run in groupby(row):
        length = len(list(run)) if kind != TEXT else 0
        while length > 0 and waiting[kind]:
            taken.append(waiting[kind].pop(0))
            length -= taken[-1][0] * taken[-1][1] * taken[-1][2]
    return taken


def _repeated(pixels: Tensor, grids: Tensor, tokens: list[int], block: int, times: int) -> tuple[Tensor, Tensor]:
    """Patches and grids of every row `times` as a group; `tokens` are the rows' visual tokens."""
    patches = torch.split(pixels.flatten(0, -2), grids.prod(dim=1).tolist())
    groups, next_picture = [], 0
    for count in tokens:
        first = next_picture
        while count > 0:
            count -= len(patches[next_picture]) // block
            next_picture += 1
        groups += [range(first, next_picture)] * times
    if next_picture < len(patches):
        raise ValueError(f"{next_picture} picture(s) have placeholders in input_ids, but {len(patches)} were given")
    order = [picture for group in groups for picture in group]
    return torch.cat([patches[picture] for picture in order]), grids[order]
