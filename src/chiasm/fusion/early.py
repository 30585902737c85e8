"""Early fusion: visual tokens stand in the language model's input sequence (LLaVA, arXiv 2304.08485)."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from chiasm.fusion.adapters import inject_adapters
from chiasm.fusion.base import FusionModel, FusionOutput
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.part_dtypes import cast_parts
from chiasm.fusion.splice import splice
from chiasm.vision.encoder import VisionEncoder


class EarlyFusionModel(FusionModel):
    """A picture takes T places in the sequence, and every layer of the language model reads them like words."""

    def __init__(
        self, config: ChiasmConfig, vision: VisionEncoder | None = None, language: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config, vision, language)
        if self.connector.width != self.connector.language_width:
            raise ValueError(
                f"fusion early reads visual tokens of width {self.connector.language_width}, but connector "
                f"{config.connector['name']} gives {self.connector.width}; remove project: false"
            )
        inject_adapters(self)
        cast_parts(self)
        self.post_init()

    @property
    def num_image_tokens(self) -> int:
        return self.connector.num_tokens

    def embed(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        visual_tokens: Float[Tensor, "images T D_l"] | None,
    ) -> Float[Tensor, "B S D_l"]:
        """The sequence that the language model reads.

        Raises:
            ValueError: pictures and placeholders do not match.
        """
        placeholders = self.placeholders(input_ids, inputs_embeds)
        embeddings = self.word_embeddings(input_ids, inputs_embeds, placeholders)
        if visual_tokens is not None:
            return splice(embeddings, placeholders, visual_tokens)
        if placeholders.any():
            raise ValueError(
                f"the text holds {int(placeholders.sum())} image placeholders but no image was given; "
                "pass pixel_values or image_features"
            )
        if self.training:
            embeddings = embeddings + 0.0 * self.blank_picture(embeddings).sum().to(embeddings.dtype)
        return embeddings

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None = None,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images N D_v"] | None = None,
        instruction_ids: Int[Tensor, "images L"] | None = None,
        instruction_mask: Int[Tensor, "images L"] | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> FusionOutput:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: text tokens, with T placeholders (`config.image_token_id`) for every picture.
            pixel_values: the batch's pictures in the order of their placeholders.
            image_features: encoded pictures instead, as `encode_images` returns them.
            instruction_ids: for each picture, the instruction in the connector's own tokens, where it reads one.
            labels: the tokens themselves where they are supervised, −100 elsewhere.
            return_logits: with labels, whether to return logits of the whole sequence beside the loss.

        Raises:
            ValueError: pictures and placeholders do not match; the message has both counts.
        """
        tokens = self.visual_tokens(pixel_values, image_features, instruction_ids, instruction_mask)
        inputs_embeds = self.embed(input_ids, inputs_embeds, tokens)
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        fields = self.predict(inputs | kwargs, cache, labels, logits_to_keep, num_items_in_batch, return_logits)
        return FusionOutput(**fields, visual_tokens=tokens)
