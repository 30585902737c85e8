"""Late fusion: two towers that never see each other's input, and a score of their outputs (CLIP, arXiv 2103.00020).

Pictures and texts become vectors of length 1 in one space. Collections can be embedded once and compared by their
cosines; what a question asks about a picture, the picture's tower does not know.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from chiasm.fusion.adapters import inject_adapters
from chiasm.fusion.late_config import LateFusionConfig
from chiasm.fusion.late_connector import LateConnector
from chiasm.fusion.late_head import AnswerHead
from chiasm.fusion.part_dtypes import PartDtypes, cast_parts, set_config_dtypes
from chiasm.language.text_tower import build_text, pool_text
from chiasm.vision.encoder import VisionEncoder, VisionFeatures
from chiasm.vision.pooling import pool_patches


@dataclass
class LateFusionOutput(ModelOutput):
    """Scores of all pictures against all texts, under the names that transformers' CLIP has for them."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class LateFusionModel(PartDtypes):
    """A vision tower, a text tower and their projections; parameters are named after the parts `vision`, `language` and
    `connector`, and `answer_head` where there is one."""

    connector: LateConnector
    answer_head: AnswerHead
    config_class = LateFusionConfig
    config: LateFusionConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: LateFusionConfig, vision: VisionEncoder | None = None, language: PreTrainedModel | None = None
    ) -> None:
        """Towers that are not given are built from the configuration with fresh weights."""
        super().__init__(config)
        set_config_dtypes(config)
        features = VisionFeatures.from_dict(config.features)
        self.vision = vision or VisionEncoder.from_config(config.vision_config, features)
        self.language = language or build_text(config.text_config, config.text_pooling)
        config.vision_config, config.text_config = self.vision.model.config, self.language.config
        for part, build in self.new_parts().items():
            setattr(self, part, build())
        inject_adapters(self)
        cast_parts(self)
        self.post_init()

    def new_parts(self) -> dict[str, Any]:
        widths, head = (self.config.image_width, self.config.text_width), self.config.answer_head
        parts: dict[str, Any] = {"connector": lambda: LateConnector(*widths, **self.config.connector)}
        return parts if head is None else parts | {"answer_head": lambda: AnswerHead(*widths, **head)}

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        return None

    def encode_images(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images N D_v"]:
        """Features of pictures before pooling: what a feature cache keeps."""
        return self.vision(pixel_values)

    def patches(
        self,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images N D_v"] | None = None,
    ) -> Float[Tensor, "images N D_v"]:
        """Features of pictures, or those that were encoded before.

        Raises:
            ValueError: not exactly one of the two is given.
        """
        if (pixel_values is None) == (image_features is None):
            raise ValueError("pass exactly one of pixel_values and image_features")
        return self.encode_images(pixel_values) if pixel_values is not None else image_features  # type: ignore[return-value]

    def pooled_images(self, patches: Float[Tensor, "images N D_v"]) -> Float[Tensor, "images D_v"]:
        """A vector for every picture, outside the shared space."""
        return pool_patches(self.vision, self.config.vision_pooling, patches.to(self.vision.model.dtype))

    def pooled_texts(
        self,
        input_ids: Int[Tensor, "texts L"],
        attention_mask: Int[Tensor, "texts L"] | None = None,
        position_ids: Int[Tensor, "texts L"] | None = None,
    ) -> Float[Tensor, "texts D_l"]:
        """A vector for every text, outside the shared space."""
        return pool_text(self.language, self.config.text_pooling, input_ids, attention_mask, position_ids)

    def embed_images(self, patches: Float[Tensor, "images N D_v"]) -> Float[Tensor, "images P"]:
        """A vector of length 1 for every picture."""
        return self.connector.images(self.pooled_images(patches))

    def embed_texts(
        self,
        input_ids: Int[Tensor, "texts L"],
        attention_mask: Int[Tensor, "texts L"] | None = None,
        position_ids: Int[Tensor, "texts L"] | None = None,
    ) -> Float[Tensor, "texts P"]:
        """A vector of length 1 for every text."""
        return self.connector.texts(self.pooled_texts(input_ids, attention_mask, position_ids))

    @staticmethod
    def similarity(images: Float[Tensor, "images P"], texts: Float[Tensor, "texts P"]) -> Float[Tensor, "images texts"]:
        """Cosines of all pictures and all texts."""
        return images @ texts.T

    def answers(
        self,
        patches: Float[Tensor, "images N D_v"],
        pooled_texts: Float[Tensor, "images D_l"],
    ) -> Float[Tensor, "images A"]:
        """Scores of the known answers to a question about each picture, given by the text tower's vector.

        Raises:
            ValueError: the model has no answer head.
        """
        if self.config.answer_head is None:
            raise ValueError("this model has no answer head; train one: chiasm train late_vqa")
        return self.answer_head(self.pooled_images(patches), pooled_texts)

    def add_answer_head(self, answers: list[str], **options: Any) -> None:
        """Gives the model a fresh head over a closed list of answers."""
        head = AnswerHead(self.config.image_width, self.config.text_width, answers=answers, **options)
        self.answer_head = head.to(device=self.device, dtype=self.connector.dtype)
        self.config.answer_head = head.settings

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "texts L"],
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        attention_mask: Int[Tensor, "texts L"] | None = None,
        position_ids: Int[Tensor, "texts L"] | None = None,
        image_features: Float[Tensor, "images N D_v"] | None = None,
        return_loss: bool | None = None,
        **_: Any,
    ) -> LateFusionOutput:
        """Scores of all pictures against all texts.

        Args:
            image_features: encoded pictures instead of pixels, as `encode_images` returns them.
            return_loss: also the contrastive loss of pairs in equal places, or the sigmoid loss where there is a bias.
        """
        images = self.embed_images(self.patches(pixel_values, image_features))
        texts = self.embed_texts(input_ids, attention_mask, position_ids)
        logits = self.connector.logits(self.similarity(images, texts))
        loss = _pair_loss(logits, self.connector.logit_bias is not None) if return_loss else None
        return LateFusionOutput(loss, logits, logits.T, texts, images)


def _pair_loss(logits: Float[Tensor, "B B"], by_sigmoid: bool) -> Float[Tensor, ""]:
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(f"return_loss is for pairs, got {logits.shape[0]} picture(s) and {logits.shape[1]} text(s)")
    places = torch.arange(len(logits), device=logits.device)
    if by_sigmoid:
        signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
        return -F.logsigmoid(signs * logits).sum(dim=1).mean()
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2
