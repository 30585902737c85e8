"""Intermediate fusion: the language model's layers look at pictures through gated cross-attention (arXiv 2204.14198).

A picture takes one placeholder in the text. Every text token sees the most recent picture before it, text before any
picture sees none, and earlier pictures reach later text through the language model's own self-attention.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from chiasm.fusion.adapters import inject_adapters
from chiasm.fusion.base import FusionModel, FusionOutput
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.cross_attention import CrossAttention, KeysValues, Look, looking
from chiasm.fusion.cross_attention_settings import CrossAttentionSettings
from chiasm.fusion.generation_inputs import begun
from chiasm.fusion.part_dtypes import cast_parts
from chiasm.language.adapter import embedding_width, hidden_width, layers
from chiasm.vision.encoder import VisionEncoder

FOREIGN = {
    "image_encoder_embeddings": "the encoder's output as image_features",
    "perceiver_embeddings": "pixel_values or image_features",
}
"""Inputs of Idefics in transformers that have another name here, or none."""

PICTURES = "image_cache"
"""Attribute of the language model's cache: the pictures of the text that it holds."""


@dataclass(frozen=True)
class ImageCache:
    """The pictures of a batch as decoding needs them: computed once, read by every new token.

    Args:
        keys_values: for every block, keys and values of all pictures of a row.
        tokens: T, visual tokens of one picture.
        seen: pictures that each row's text has passed so far.
        ended: 1 where a row's text has ended since its last picture.
        length: tokens that were read so far.
    """

    keys_values: list[KeysValues]
    tokens: int
    seen: Int[Tensor, " B"]
    ended: Int[Tensor, " B"]
    length: int = 0

    @property
    def images(self) -> int:
        return self.keys_values[0][0].shape[2] // self.tokens

    def read(
        self, placeholders: Bool[Tensor, "B S"], ends: Bool[Tensor, "B S"]
    ) -> tuple[Bool[Tensor, "B S I"], "ImageCache"]:
        """Which picture new tokens see, the most recent one unless a text ended behind it; and the cache after them."""
        device = placeholders.device
        latest = self.seen[:, None] + placeholders.cumsum(dim=1)
        places = 2 * torch.arange(1, placeholders.shape[1] + 1, device=device)
        picture = (placeholders * places).cummax(dim=1).values
        end = torch.cat([self.ended[:, None], ends * (places + 1)], dim=1).cummax(dim=1).values
        visible = latest[..., None] - 1 == torch.arange(self.images, device=device)
        ended, length = (end[:, -1] > picture[:, -1]).long(), self.length + placeholders.shape[1]
        after = replace(self, seen=latest[:, -1], ended=ended, length=length)
        return visible & (end[:, :-1] <= picture)[..., None], after

    def from_start(self, placeholders: Bool[Tensor, "B S"], ends: Bool[Tensor, "B S"]) -> "ImageCache":
        """The same pictures after another text: what is left of it where drafted tokens were taken back."""
        nothing = torch.zeros_like(self.seen)
        return replace(self, seen=nothing, ended=nothing, length=0).read(placeholders, ends)[1]


@dataclass
class IntermediateFusionOutput(FusionOutput):
    """A fusion's output, with the pictures' keys and values for the tokens that follow."""

    image_cache: ImageCache | None = None


class IntermediateFusionModel(FusionModel, GenerationMixin):
    """Pictures stay outside of the sequence; parameters of the new layers are the part `cross_attention`."""

    def __init__(
        self, config: ChiasmConfig, vision: VisionEncoder | None = None, language: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config, vision, language)
        self.cross_attention = self.new_cross_attention()
        self.cross_attention.attach(layers(self.language))
        inject_adapters(self)
        cast_parts(self)
        self.post_init()

    def new_cross_attention(self) -> CrossAttention:
        """Blocks between the parts, with fresh weights."""
        settings = CrossAttentionSettings(**(self.config.cross_attention or {}))
        widths = hidden_width(self.language), self.connector.width, embedding_width(self.language)
        return CrossAttention(*widths, settings)

    def new_parts(self) -> dict[str, Any]:
        return {**super().new_parts(), "cross_attention": self.new_cross_attention}

    @property
    def num_image_tokens(self) -> int:
        return 1

    def embed(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        placeholders: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "B S D_l"]:
        """Token embeddings, with the placeholder's own where it has one."""
        own = self.cross_attention.image_embedding
        if own is None:
            placeholders = torch.zeros_like(placeholders)
        embeddings = self.word_embeddings(input_ids, inputs_embeds, placeholders)
        return embeddings if own is None else torch.where(placeholders[..., None], own.to(embeddings), embeddings)

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
        image_features: Float[Tensor, "... N D_v"] | None = None,
        instruction_ids: Int[Tensor, "images L"] | None = None,
        instruction_mask: Int[Tensor, "images L"] | None = None,
        image_attention_mask: Tensor | None = None,
        image_cache: ImageCache | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> IntermediateFusionOutput:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: text tokens, with one placeholder (`config.image_token_id`) for every picture.
            pixel_values: the batch's pictures in the order of their placeholders; or `(B, I, 3, height, width)` with an
                `image_attention_mask`.
            image_features: encoded pictures instead, as `encode_images` returns them, in either arrangement.
            image_attention_mask: `(B, S, I)`, which pictures each token sees, in place of the most recent one.
            image_cache: pictures of an earlier forward of the same rows, whose output had it; by default those that it
                left in `cache`.
            labels: the tokens themselves where they are supervised, −100 elsewhere.
            return_logits: with labels, whether to return logits of the whole sequence beside the loss.

        Raises:
            ValueError: pictures and placeholders do not match; the message has both counts.
        """
        for theirs, ours in FOREIGN.items():
            if kwargs.pop(theirs, None) is not None:
                raise ValueError(f"{theirs} is not read here; pass {ours}")
        placeholders = self.placeholders(input_ids, inputs_embeds)
        ends = self._ends(input_ids, inputs_embeds)
        if position_ids is not None:
            ends = ends | _before_restarts(position_ids)
        embedded = self.embed(input_ids, inputs_embeds, placeholders)
        tokens = None
        goes_on = image_attention_mask is not None or not placeholders.any()
        if image_cache is None and goes_on and begun(cache):
            image_cache = getattr(cache, PICTURES, None)
        if image_cache is not None and image_attention_mask is None and placeholders.any():
            raise ValueError(
                f"the text holds {int(placeholders.sum())} new image placeholders, but image_cache holds pictures of "
                "earlier text only; new pictures need a forward over the whole text"
            )
        if image_cache is None:
            pixel_values, image_features = _flat(pixel_values, 4), _flat(image_features, 3)
            tokens = self.visual_tokens(pixel_values, image_features, instruction_ids, instruction_mask)
            image_cache = self.remember(tokens, placeholders, image_attention_mask)
        look = None
        if image_cache is not None:
            record = kwargs.pop("record", None)
            visible, image_cache = image_cache.read(placeholders, ends)
            visible = visible if image_attention_mask is None else image_attention_mask.bool()
            look = self.look(image_cache, visible, record)
        read = (embedded, attention_mask, position_ids, cache)
        wanted = (labels, logits_to_keep, num_items_in_batch, return_logits)
        with looking(look):
            fields = self.predict(*read, *wanted, **kwargs)
        if image_cache is not None and fields.get("cache") is not None:
            setattr(fields["cache"], PICTURES, image_cache)
        return IntermediateFusionOutput(**fields, visual_tokens=tokens, image_cache=image_cache)

    def _ends(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Bool[Tensor, "B S"]:
        return self.places(self.cross_attention.settings.end_of_text, input_ids, inputs_embeds)

    def remember(
        self,
        tokens: Float[Tensor, "images T W"] | None,
        placeholders: Bool[Tensor, "B S"],
        image_attention_mask: Tensor | None,
    ) -> ImageCache | None:
        """Keys and values of the pictures, one group for each row; None where there is nothing to look at.

        A batch without pictures looks at a blank one that no token sees, where something still depends on the blocks:
        in training, so that every process of a distributed run has a gradient for the same parameters, and where the
        feed-forward reads all text.
        """
        counts = placeholders.sum(dim=1)
        if tokens is None:
            if counts.any():
                raise ValueError(
                    f"the text holds {int(counts.sum())} image placeholders but no image was given; "
                    "pass pixel_values or image_features"
                )
            if not (self.training or not self.cross_attention.settings.mask_feed_forward):
                return None
            blank = self.blank_picture(next(self.cross_attention.parameters()))
            rows = blank[:, None].expand(placeholders.shape[0], -1, -1, -1)
        elif image_attention_mask is not None:
            rows = _rows(tokens, image_attention_mask)
        else:
            rows = _by_row(tokens, counts)
        keys_values = self.cross_attention.keys_values(rows.flatten(1, 2))
        return ImageCache(keys_values, rows.shape[2], torch.zeros_like(counts), torch.zeros_like(counts))

    def look(self, cache: ImageCache, visible: Bool[Tensor, "B S I"], record: list[Tensor] | None = None) -> Look:
        """What the blocks of one forward attend to."""
        mask = visible.repeat_interleave(cache.tokens, dim=-1)[:, None]
        return Look(cache.keys_values, mask, visible.any(dim=-1, keepdim=True), self.cross_attention.blocks, record)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """With a cache of the pictures, a step brings its own tokens' part of the mask only."""
        if not kwargs.get("use_cache", True):
            kwargs.pop("image_cache", None)
        pictures, cache = kwargs.get(PICTURES), kwargs.get("cache")
        if pictures is not None and cache is not None and (kept := cache.get_seq_length()) < pictures.length:
            text = input_ids[:, :kept]
            kwargs[PICTURES] = pictures.from_start(self.placeholders(text, None), self._ends(text, None))
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds, **kwargs)
        if (visible := inputs.get("image_attention_mask")) is not None and inputs.get("input_ids") is not None:
            inputs["image_attention_mask"] = visible[:, -inputs["input_ids"].shape[1] :]
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """With a mask, every row has its own pictures, seen or not; without one, the placeholders tell."""
        visible, rows = kwargs.get("image_attention_mask"), {}
        for name, dimensions in (("pixel_values", 4), ("image_features", 3)):
            pictures = _flat(kwargs.pop(name, None), dimensions)
            if pictures is not None and visible is not None:
                rows[name] = _rows(pictures, visible).repeat_interleave(expand_size, dim=0)
            elif pictures is not None:
                kwargs[name] = pictures
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | rows

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """New tokens see what the last one saw."""
        kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)
        if outputs.image_cache is not None:
            kwargs["image_cache"] = outputs.image_cache
        if (visible := kwargs.get("image_attention_mask")) is not None:
            last = visible[:, -1:].expand(-1, num_new_tokens, -1)
            kwargs["image_attention_mask"] = torch.cat([visible, last], dim=1)
        return kwargs


def _before_restarts(position_ids: Tensor) -> Bool[Tensor, "B S"]:
    """The last tokens of samples that share a sequence: the next one does not see their pictures."""
    return torch.nn.functional.pad(position_ids[..., 1:] == 0, (0, 1))


def _flat(pictures: Tensor | None, dimensions: int) -> Tensor | None:
    """Pictures one after the other, whether they came so or row by row."""
    return None if pictures is None else pictures.flatten(0, -dimensions)


def _rows(pictures: Tensor, image_attention_mask: Tensor) -> Tensor:
    """Pictures `(B · I, ...)` as the mask counts them: `(B, I, ...)`."""
    rows, _, images = image_attention_mask.shape
    if pictures.shape[0] != rows * images:
        raise ValueError(
            f"image_attention_mask is for {rows} rows of {images} image(s), but {pictures.shape[0]} image(s) were "
            "given; pass the same number for every row, filled up with any that no token sees"
        )
    return pictures.unflatten(0, (rows, images))


def _by_row(tokens: Float[Tensor, "images T W"], counts: Int[Tensor, " B"]) -> Float[Tensor, "B I T W"]:
    """Pictures in a row for each text, filled up with zeros that no token sees."""
    if int(counts.sum()) != tokens.shape[0]:
        raise ValueError(
            f"the text holds {int(counts.sum())} image placeholders but {tokens.shape[0]} image(s) were given; "
            "pass one image for each, or build the inputs with the model's processor"
        )
    rows = tokens.new_zeros(counts.shape[0], max(int(counts.max()), 1), *tokens.shape[1:])
    places = torch.arange(rows.shape[1], device=counts.device) < counts[:, None]
    return rows.masked_scatter(places[..., None, None], tokens)
