"""The unified transformer: one decoder reads text and pictures from its first layer on, with no vision encoder.

Pictures come in as `patches` of raw pixels (Fuyu, 2023), or as `vq`: codes of an image tokenizer that share the
vocabulary with the words (Chameleon, arXiv 2405.09818), so that the decoder can draw as well as read.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.pictures import real_pictures
from chiasm.fusion.sequence import PositionedModel, PositionedOutput
from chiasm.fusion.splice import VisualTokens
from chiasm.fusion.unified_decoder import PATCH, WORD
from chiasm.fusion.unified_settings import UnifiedSettings
from chiasm.language.adapter import build_language
from chiasm.language.next_token import IGNORE
from chiasm.positions.sequence import Grid, split_positions
from chiasm.vision.image_inputs import build_image_input


class UnifiedModel(PositionedModel, GenerationMixin):
    """An image input (`vision`: a patch embedding or an image tokenizer) and a decoder (`language`)."""

    def build_parts(self, config: ChiasmConfig, vision: Any, language: PreTrainedModel | None) -> None:
        self.vision = vision or build_image_input(config.vision_config)
        self.language = language or build_language(config.text_config)
        config.vision_config, config.text_config = self.vision.config, self.language.config
        self.settings = UnifiedSettings.of(config.unified)
        self.kind, _ = split_positions(getattr(config.text_config, "positions", "raster"))

    def new_parts(self) -> dict[str, Any]:
        return {}

    @property
    def reads_instruction(self) -> bool:
        return False

    @property
    def num_image_tokens(self) -> int:
        """Placeholders for one row of `pixel_values`: a patch, or a picture's codes."""
        return 1 if self.vision.kind == "patches" else self.vision.grid[0] * self.vision.grid[1]

    def picture_places(self, rows: int, columns: int) -> int:
        """Tokens that a picture takes in the sequence, ends of rows and frame included."""
        framed = self.settings.begin_token_id is not None
        return rows * (columns + (self.settings.row_token_id is not None)) + 2 * framed

    @property
    def picture_marks(self) -> list[int]:
        row = self.settings.row_token_id
        return [*super().picture_marks, *([] if row is None else [row])]

    @property
    def z_loss(self) -> float:
        return self.settings.z_loss if self.training else 0.0

    def shown(self, logits: Float[Tensor, "... V"], learns: bool) -> Float[Tensor, "... V"]:
        """Text is never continued with codes and markers, which only `draw` writes; the loss sees them."""
        if learns and not self.settings.hide_codes:
            return logits
        hidden = self.settings.markers if self.settings.hide_marks and not learns else []
        shown, lowest = logits.clone(), torch.finfo(logits.dtype).min
        shown[..., hidden] = lowest
        codes = self.settings.code_ids
        if isinstance(codes, int):
            shown[..., codes : codes + self.vision.num_codes] = lowest
        elif codes is not None:
            shown[..., codes] = lowest
        return shown

    def code_tokens(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Int[Tensor, "images N"]:
        """The tokens of pictures by the image tokenizer."""
        codes = self.vision.encode(pixel_values)
        if isinstance(self.settings.code_ids, int):
            return codes + self.settings.code_ids
        return torch.tensor(self.settings.code_ids, device=codes.device)[codes]

    def encode_images(self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None) -> Tensor:
        """What the decoder reads of pictures: `(P, 1, D_l)` of patches, or `(B, P, D_l)` where they come row by row;
        `(images, N, D_l)` of codes."""
        if self.vision.kind == "patches":
            rows = pixel_values.shape[:-1] if pixel_values.ndim == 3 else (-1, 1)
            return self.vision(pixel_values.flatten(0, -2)).unflatten(0, rows)
        return self.get_input_embeddings()(self.code_tokens(pixel_values))

    def blank_picture(self, like: Tensor) -> Float[Tensor, "1 T D_l"]:
        """Patches need a gradient on every process of a distributed run; codes have no weights of their own."""
        if self.vision.kind == "patches":
            pixels = self.vision.projection.in_features
            return self.vision(torch.zeros(1, pixels, device=like.device, dtype=like.dtype))[None]
        return torch.zeros(1, 0, like.shape[-1], device=like.device, dtype=like.dtype)

    def visual_places(
        self, input_ids: Int[Tensor, "B S"] | None, inputs_embeds: Float[Tensor, "B S D_l"] | None
    ) -> Bool[Tensor, "B S"]:
        """Which tokens are of pictures: placeholders, ends of rows and codes."""
        places = self.placeholders(input_ids, inputs_embeds)
        if self.settings.row_token_id is not None:
            places = places | self.places(self.settings.row_token_id, input_ids, inputs_embeds)
        codes = self.settings.code_ids
        if input_ids is not None and isinstance(codes, int):
            places = places | ((input_ids >= codes) & (input_ids < codes + self.vision.num_codes))
        return places

    def sequence_grids(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        visual: Bool[Tensor, "B S"],
        image_grid_thw: Int[Tensor, "pictures 3"] | None,
    ) -> list[Grid]:
        """Every picture's grid of tokens, the end of a row being one of its columns; without `image_grid_thw` they are
        told by the ends of rows."""
        if image_grid_thw is not None:
            extra = int(self.settings.row_token_id is not None)
            return [(frames, rows, columns + extra) for frames, rows, columns in image_grid_thw.tolist()]
        if self.vision.kind == "vq":
            return [(1, *self.vision.grid)] * (int(visual.sum()) // self.num_image_tokens)
        ends = self.places(self.settings.row_token_id, input_ids, inputs_embeds)
        grids: list[Grid] = []
        for marks, row_ends in zip(visual.tolist(), ends.tolist(), strict=True):
            grids += _grids_of_rows(marks, row_ends)
        return grids

    def embed(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        visual_tokens: VisualTokens | None,
    ) -> Float[Tensor, "B S D_l"]:
        embeddings = super().embed(input_ids, inputs_embeds, visual_tokens)
        table = getattr(self.language.base_model, "modality_embeddings", None)
        if table is None:
            return embeddings
        visual = self.visual_places(input_ids, inputs_embeds)
        return embeddings + table(torch.where(visual, PATCH, WORD)).to(embeddings.dtype)

    def embed_prompt(
        self, input_ids: Int[Tensor, "B S"], pixel_values: Tensor | None = None, **_: Tensor
    ) -> Float[Tensor, "B S D_l"]:
        return self.embed(input_ids, None, self._read(pixel_values)[0])

    def _read(self, pixel_values: Tensor | None) -> tuple[Tensor | None, Int[Tensor, "images N"] | None]:
        """What the decoder reads of pictures, and their codes where they have some."""
        if self.vision.kind == "patches" and pixel_values is not None:
            return self.encode_images(pixel_values), None
        if (pictures := real_pictures(pixel_values, None)[0]) is None:
            return None, None
        drawn = self.code_tokens(pictures)
        return self.get_input_embeddings()(drawn), drawn

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
        token_type_ids: Int[Tensor, "B S"] | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        codes: bool = False,
        **kwargs: Any,
    ) -> PositionedOutput:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: text, with a placeholder (`config.image_token_id`) for every patch or code of a picture.
            pixel_values: patches `(P, 3 · patch_size²)` of all pictures, or `(B, P, 3 · patch_size²)`; pictures
                `(images, 3, height, width)` for an image tokenizer.
            image_grid_thw: each picture's frames, rows and columns; needed for videos, otherwise told by the text.
            token_type_ids: with `attention: prefix`, 0 for the prefix, 1 for what is read causally.
            labels: tokens where they are supervised, −100 elsewhere; placeholders stand for the picture's own codes. In
                `shift_labels`, as trainers move them, words alone are learned where pictures are patches.
            codes: whether logits of codes are shown without labels too: what drawing needs.

        Raises:
            ValueError: pictures and placeholders do not match; the message has both counts.
        """
        tokens, drawn = self._read(pixel_values)
        embedded = self.embed(input_ids, inputs_embeds, tokens)
        if labels is not None:
            labels = self._with_codes(labels, input_ids, drawn)
        if (shifted := kwargs.get("shift_labels")) is not None:
            if drawn is None:
                kwargs["shift_labels"] = shifted.masked_fill(shifted == self.config.image_token_id, IGNORE)
            else:
                kwargs["shift_labels"] = self._with_codes(shifted, input_ids, drawn, by=1)
        position_ids, delta = self.positioned(
            position_ids, input_ids, inputs_embeds, attention_mask, cache, image_grid_thw
        )
        read = (embedded, attention_mask, position_ids, cache)
        wanted = (labels, logits_to_keep, num_items_in_batch, return_logits)
        fields = self.predict(*read, *wanted, whole_vocabulary=codes, token_type_ids=token_type_ids, **kwargs)
        self.remember(fields.get("cache"), delta)
        return PositionedOutput(**fields, visual_tokens=tokens, image_grid_thw=image_grid_thw)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Patches are repeated one row after the other, also where a batch has them row by row (Fuyu)."""
        if self.vision.kind == "patches" and kwargs.get("pixel_values") is not None:
            kwargs["pixel_values"] = kwargs["pixel_values"].flatten(0, -2)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)

    def _with_codes(
        self,
        labels: Int[Tensor, "B S"],
        input_ids: Int[Tensor, "B S"] | None,
        codes: Int[Tensor, "images N"] | None,
        by: int = 0,
    ) -> Int[Tensor, "B S"]:
        """Labels whose placeholders are the codes of the pictures that stand there; the labels may be moved to the left
        by one place, whose last one then has no picture in these tokens."""
        drawn = labels == self.config.image_token_id
        if not drawn.any():
            return labels
        if codes is None or input_ids is None:
            raise ValueError(
                "the labels hold pictures, which only the image input 'vq' with pixel_values and input_ids can "
                "learn to draw; connect with image_input='vq', or supervise words only"
            )
        filled = input_ids.masked_scatter(input_ids == self.config.image_token_id, codes.to(input_ids))
        filled = F.pad(filled[:, by:], (0, by), value=IGNORE)
        return torch.where(drawn, filled, labels)


def _grids_of_rows(visual: list[bool], row_ends: list[bool]) -> list[Grid]:
    """Grids of one sequence's pictures: rows follow each other until something that is no picture."""
    grids, start, widths = [], 0, list[int]()
    for index, end in enumerate([*row_ends, False]):
        if end:
            widths.append(index + 1 - start)
            start = index + 1
        elif index == len(visual) or not visual[index]:
            if index > start:
                raise ValueError(f"a picture's last {index - start} patches have no end of row behind them")
            if widths:
                if len(set(widths)) > 1:
                    raise ValueError(
                        f"rows of {sorted(set(widths))} tokens follow each other: pictures of different widths need a "
                        "token between them, or image_grid_thw"
                    )
                grids.append((1, len(widths), widths[0]))
            start, widths = index + 1, []
    return grids
