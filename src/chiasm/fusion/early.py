"""Early fusion: visual tokens stand in the language model's input sequence (LLaVA, arXiv 2304.08485)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from chiasm.fusion.adapters import inject_adapters
from chiasm.fusion.base import FusionModel, FusionOutput
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.generation_inputs import begun
from chiasm.fusion.part_dtypes import cast_parts
from chiasm.fusion.pictures import real_pictures
from chiasm.fusion.prefix import counted, prefix_mask, with_suffix
from chiasm.fusion.splice import VisualTokens, splice


class EarlyFusionModel(FusionModel, GenerationMixin):
    """A picture takes T places in the sequence, and every layer of the language model reads them like words."""

    _can_compile_fullgraph = True

    def __init__(self, config: ChiasmConfig, vision: Any = None, language: PreTrainedModel | None = None) -> None:
        super().__init__(config, vision, language)
        inject_adapters(self)
        cast_parts(self)
        self.post_init()

    def build_parts(self, config: ChiasmConfig, vision: Any, language: PreTrainedModel | None) -> None:
        super().build_parts(config, vision, language)
        if self.connector.width != self.connector.language_width:
            raise ValueError(
                f"fusion early reads visual tokens of width {self.connector.language_width}, but connector "
                f"{config.connector['name']} gives {self.connector.width}; remove project: false"
            )

    @property
    def num_image_tokens(self) -> int:
        return self.connector.num_tokens

    def embed(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        visual_tokens: VisualTokens | None,
    ) -> Float[Tensor, "B S D_l"]:
        """The sequence that the language model reads.

        Raises:
            ValueError: pictures and placeholders do not match.
        """
        placeholders = self.placeholders(input_ids, inputs_embeds)
        embeddings = self.word_embeddings(input_ids, inputs_embeds, placeholders)
        if visual_tokens is not None:
            return splice(embeddings, placeholders, visual_tokens)
        if not torch.compiler.is_compiling() and placeholders.any():
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
        pixel_values: Float[Tensor, "... 3 height width"] | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_features: Float[Tensor, "images N D_v"] | None = None,
        instruction_ids: Int[Tensor, "images L"] | None = None,
        instruction_mask: Int[Tensor, "images L"] | None = None,
        token_type_ids: Int[Tensor, "B S"] | None = None,
        qformer_input_ids: Int[Tensor, "images L"] | None = None,
        qformer_attention_mask: Int[Tensor, "images L"] | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> FusionOutput:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: text tokens, with T placeholders (`config.image_token_id`) for every picture.
            pixel_values: the batch's pictures in the order of their placeholders, `(images, 3, height, width)`; or
                `(B, I, 3, height, width)`, where pictures of all zeros fill up the rows.
            pixel_attention_mask: the same without the colours, what is picture and what is padding.
            image_features: encoded pictures instead, as `encode_images` returns them.
            instruction_ids: for each picture, the instruction in the connector's own tokens, where it reads one.
            token_type_ids: with `attention: prefix`, 0 for the prefix, 1 for what is read causally.
            qformer_input_ids: the same by InstructBLIP's name.
            labels: the tokens themselves where they are supervised, −100 elsewhere.
            return_logits: with labels, whether to return logits of the whole sequence beside the loss.

        Raises:
            ValueError: pictures and placeholders do not match; the message has both counts.
        """
        pictures, masks = real_pictures(pixel_values, pixel_attention_mask)
        instruction = (instruction_ids, instruction_mask, qformer_input_ids, qformer_attention_mask)
        tokens = self.visual_tokens(pictures, image_features, *instruction, masks)
        embedded = self.embed(input_ids, inputs_embeds, tokens)
        read = (embedded, attention_mask, position_ids, cache)
        wanted = (labels, logits_to_keep, num_items_in_batch, return_logits)
        fields = self.predict(*read, *wanted, token_type_ids=token_type_ids, **kwargs)
        return FusionOutput(**fields, visual_tokens=tokens)

    def language_inputs(self, inputs: dict[str, Any], cache: Cache | None) -> dict[str, Any]:
        """Also what token types change: the mask of a prefix. Behind one, all is causal."""
        types, mask = inputs.pop("token_type_ids", None), inputs["attention_mask"]
        inputs = super().language_inputs(inputs, cache)
        if types is None or self.config.attention != "prefix":
            return inputs if types is None else inputs | {"token_type_ids": types}
        if isinstance(mask, dict) or (mask is not None and mask.ndim == 4) or begun(cache):
            return inputs
        read = (inputs["inputs_embeds"], mask, types, cache, inputs["position_ids"])
        return inputs | {"attention_mask": prefix_mask(self.language.config, *read)}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """Generated tokens are read causally."""
        types = model_kwargs.get("token_type_ids")
        kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)
        if types is not None and self.config.attention == "prefix":
            kwargs["token_type_ids"] = with_suffix(types, num_new_tokens)
        return kwargs

    @staticmethod
    def create_masks_for_generate(
        config: ChiasmConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Masks for a cache of fixed size, which `generate` makes before the forward is compiled."""
        text, position_ids = config.get_text_config(), counted(position_ids)
        if config.attention == "prefix" and token_type_ids is not None and not begun(cache):
            return prefix_mask(text, inputs_embeds, attention_mask, token_type_ids, cache, position_ids)
        return create_masks_for_generate(text, inputs_embeds, attention_mask, cache, position_ids)
