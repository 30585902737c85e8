"""Image-text contrastive learning: a picture's best query lies near its own caption (ITC of BLIP-2, arXiv 2301.12597).

Vectors have length 1. A caption's vector is that of its first token; a picture has one for every query.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from chiasm.fusion.qformer_retrieval import query_similarity

__all__ = ["contrastive_loss", "identical_pairs", "query_similarity"]

SMOOTHING = 0.1


def contrastive_loss(
    image_to_text: Float[Tensor, "B M"],
    text_to_image: Float[Tensor, "B M"],
    same: Bool[Tensor, "B M"],
    temperature: Float[Tensor, ""],
    smoothing: float = SMOOTHING,
    num_items: int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of finding the caption of each picture, and the picture of each caption, among M candidates.

    Args:
        image_to_text: similarities of the batch's pictures and all captions, of all processes.
        text_to_image: similarities of the batch's captions and all pictures.
        same: where a candidate is right: the own one, and those that are identical to it.
        temperature: what similarities are divided by.
        num_items: divides the sum over the batch; B itself where it is None.
    """
    right = same.float() / same.sum(dim=1, keepdim=True)
    losses = [
        F.cross_entropy(scores.float() / temperature.float(), right, reduction="sum", label_smoothing=smoothing)
        for scores in (image_to_text, text_to_image)
    ]
    return (losses[0] + losses[1]) / (2 * (same.shape[0] if num_items is None else num_items))


def identical_pairs(
    pictures: Int[Tensor, " B"],
    texts: Int[Tensor, "B L"],
    all_pictures: Int[Tensor, " M"],
    all_texts: Int[Tensor, "M L"],
) -> Bool[Tensor, "B M"]:
    """Which of M pairs show the same picture as one of the batch's pairs, or say the same.

    Args:
        pictures: a number for each picture, equal where the pictures are.
        texts: padded token ids.
    """
    same_text = torch.zeros(len(texts), len(all_texts), dtype=torch.bool, device=texts.device)
    for row, text in enumerate(texts):
        same_text[row] = (all_texts == text).all(dim=1)
    return same_text | (pictures[:, None] == all_pictures)
