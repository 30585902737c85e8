"""Losses of two towers: pictures and captions that find each other, by CLIP's softmax (arXiv 2103.00020) or SigLIP's
sigmoid (arXiv 2303.15343), and answers from a closed list (arXiv 1505.00468)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from chiasm.fusion.late import LateFusionModel
from chiasm.language.next_token import IGNORE
from chiasm.objectives.contrastive import contrastive_loss
from chiasm.objectives.gradient_cache import in_chunks
from chiasm.objectives.processes import gather, gather_with_gradient, reaching
from chiasm.objectives.sigmoid import sigmoid_loss

LARGEST_SCALE = math.log(100.0)
"""CLIP's bound: without it the softmax would sharpen on and on."""


def pair_losses(
    model: LateFusionModel,
    inputs: dict[str, Tensor],
    objectives: Sequence[str] = ("contrastive",),
    num_samples: int | None = None,
    chunk: int | None = None,
    pooled_texts: Tensor | None = None,
) -> dict[str, Tensor]:
    """Each objective's loss over the pairs of this batch and, where there are several, of all processes.

    Args:
        inputs: `input_ids` and, but for texts of fixed length, `attention_mask`; `pixel_values` or `image_features`;
            `picture_ids` and `text_ids`, numbers that are equal where pictures or texts are.
        num_samples: of all batches and processes of a step; those of this batch where it is None.
        chunk: pairs that go through the towers at once (`gradient_cache`).
        pooled_texts: the text tower's vectors, where they are known already.
    """
    images = in_chunks(
        lambda pixels, features: model.embed_images(model.patches(pixels, features)),
        chunk,
        inputs.get("pixel_values"),
        inputs.get("image_features"),
    )
    if pooled_texts is not None:
        texts = model.connector.texts(pooled_texts)
    else:
        texts = in_chunks(model.embed_texts, chunk, inputs["input_ids"], inputs.get("attention_mask"))
    return vector_losses(model, images, texts, _same(inputs), objectives, num_samples)


def vector_losses(
    model: LateFusionModel,
    images: Float[Tensor, "B P"],
    texts: Float[Tensor, "B P"],
    same: Bool[Tensor, "B M"],
    objectives: Sequence[str],
    num_samples: int | None = None,
) -> dict[str, Tensor]:
    """The same, of pairs' vectors of length 1. `same`: which of all processes' pairs are identical to the batch's."""
    connector = model.connector
    all_texts = gather_with_gradient(texts)[0]
    losses = {}
    if "contrastive" in objectives:
        if connector.logit_scale.requires_grad:
            with torch.no_grad():
                connector.logit_scale.clamp_(max=LARGEST_SCALE)
        temperature = (-connector.logit_scale).exp()
        to_text = model.similarity(images, all_texts)
        to_image = model.similarity(gather_with_gradient(images)[0], texts).T
        losses["contrastive"] = contrastive_loss(to_text, to_image, same, temperature, 0.0, num_samples)
    if "sigmoid" in objectives:
        losses["sigmoid"] = sigmoid_loss(connector.logits(model.similarity(images, all_texts)), same, num_samples)
    return losses


def _same(inputs: dict[str, Tensor]) -> Bool[Tensor, "B M"]:
    pictures, texts = inputs["picture_ids"], inputs["text_ids"]
    return (pictures[:, None] == gather(pictures)[0]) | (texts[:, None] == gather(texts)[0])


def answer_loss(
    model: LateFusionModel,
    inputs: dict[str, Tensor],
    num_answers: int | None = None,
    pooled_texts: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the right answer among the known ones; an unknown one (`IGNORE`) teaches nothing.

    Args:
        num_answers: known ones of all batches of a step; those of this batch where it is None.
        pooled_texts: the text tower's vectors, where they are known already.
    """

    def answers(pixels: Tensor | None, features: Tensor | None, ids: Tensor, *rest: Tensor | None) -> Tensor:
        mask, pooled = rest
        pooled = model.pooled_texts(ids, mask) if pooled is None else pooled
        return model.answers(model.patches(pixels, features), pooled)

    shown = inputs.get("pixel_values"), inputs.get("image_features")
    logits = reaching(answers, *shown, inputs["input_ids"], inputs.get("attention_mask"), pooled_texts)
    known = int((inputs["labels"] != IGNORE).sum())
    count = max(1, known if num_answers is None else num_answers)
    return F.cross_entropy(logits.float(), inputs["labels"], ignore_index=IGNORE, reduction="sum") / count
