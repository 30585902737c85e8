"""Early fusion with an encoder–decoder language model: its encoder reads visual tokens and text, its decoder answers
(BLIP-2 with T5, arXiv 2301.12597)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from chiasm.fusion.early import EarlyFusionModel
from chiasm.fusion.generation_inputs import PICTURE_INPUTS
from chiasm.language.next_token import IGNORE, next_token_loss


@dataclass
class Seq2SeqFusionOutput(Seq2SeqLMOutput):
    """An encoder–decoder's output, with the visual tokens `(images, T, D_l)` that its encoder has seen."""

    visual_tokens: Tensor | None = None


class EarlySeq2SeqModel(EarlyFusionModel, GenerationMixin):
    """A picture takes T places in the encoder's sequence; labels are the decoder's own tokens."""

    _can_compile_fullgraph = False  # what is compiled while it generates is the language model

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The language model's own, whose `generate` this is."""
        return self.language.generation_config if "language" in self._modules else None

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        if "language" in self._modules:  # not yet while transformers begins to build the model
            self.language.generation_config = value

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Int[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None = None,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images N D_v"] | None = None,
        instruction_ids: Int[Tensor, "images L"] | None = None,
        instruction_mask: Int[Tensor, "images L"] | None = None,
        qformer_input_ids: Int[Tensor, "images L"] | None = None,
        qformer_attention_mask: Int[Tensor, "images L"] | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        labels: Int[Tensor, "B answer"] | None = None,
        **kwargs: Any,
    ) -> Seq2SeqFusionOutput:
        """The decoder's next-token logits, and the loss where labels are given.

        Args:
            input_ids: the encoder's tokens, with T placeholders (`config.image_token_id`) for every picture.
            labels: the answer's tokens, −100 where they are not supervised; the decoder's input follows from them.
            kwargs: such as `decoder_input_ids` and `decoder_attention_mask`.
        """
        tokens, count = None, kwargs.pop("num_items_in_batch", None)
        kwargs.pop("return_logits", None)
        if encoder_outputs is None:
            instruction = (instruction_ids, instruction_mask, qformer_input_ids, qformer_attention_mask)
            tokens = self.visual_tokens(pixel_values, image_features, *instruction)
            inputs_embeds = self.embed(input_ids, inputs_embeds, tokens)
        output = self.language(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            encoder_outputs=encoder_outputs,
            labels=labels,
            cache=cache,
            **kwargs | {"return_dict": True},
        )
        if labels is not None and count is not None:
            learned = labels != IGNORE
            output["loss"] = next_token_loss(output.logits[learned], labels[learned], count)
        return Seq2SeqFusionOutput(**output, visual_tokens=tokens)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's own `generate` over the spliced sequence; returns the decoder's tokens."""
        pictures = {name: kwargs.pop(name) for name in PICTURE_INPUTS if name in kwargs}
        tokens = self.visual_tokens(**pictures)
        if input_ids is None and inputs_embeds is None and tokens is not None:
            input_ids = self.picture_prompts(len(tokens))
        return self.language.generate(inputs_embeds=self.embed(input_ids, inputs_embeds, tokens), **kwargs)
