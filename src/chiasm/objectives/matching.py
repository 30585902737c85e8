"""Image-text matching: does this caption belong to this picture? (ITM of BLIP-2, arXiv 2301.12597.)

Every pair of the batch is a positive, and meets one wrong caption and one wrong picture, drawn where they look right.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

NONE = -1


@torch.no_grad()
def draw_negatives(
    scores: Float[Tensor, "B M"], same: Bool[Tensor, "B M"], generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """For each row one of M candidates, with the probability of its softmax; `NONE` where all of them are right.

    Args:
        scores: similarities, divided by the temperature.
        same: candidates that must not be drawn: the own one, and those that are identical to it.
    """
    possible = ~same.all(dim=1)
    weights = scores.float().masked_fill(same, -torch.inf)[possible].softmax(dim=1)
    drawn = torch.full((len(scores),), NONE, device=scores.device)
    if len(weights):
        drawn[possible] = torch.multinomial(weights, 1, generator=generator).flatten()
    return drawn


def pairs_to_match(
    wrong_pictures: Int[Tensor, " B"], wrong_texts: Int[Tensor, " B"], first: int = 0
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Pictures, captions and whether they belong together: the positives, then wrong pictures, then wrong captions.

    A pair without any negative is left out, since it alone would teach to say yes always: a batch of one, or of one
    thing over and over, gives no pairs at all.

    Args:
        wrong_pictures: for each caption, from `draw_negatives`.
        wrong_texts: for each picture.
        first: where the batch's own pairs begin among all candidates.
    """
    own = torch.arange(first, first + len(wrong_texts), device=wrong_texts.device)
    has_picture, has_text = wrong_pictures != NONE, wrong_texts != NONE
    positive = own[has_picture | has_text]
    pictures = torch.cat([positive, wrong_pictures[has_picture], own[has_text]])
    texts = torch.cat([positive, own[has_picture], wrong_texts[has_text]])
    belong = torch.zeros_like(pictures)
    belong[: len(positive)] = 1
    return pictures, texts, belong


def matching_loss(logits: Float[Tensor, "P 2"], belong: Int[Tensor, " P"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of two classes, 1 being "they belong together"; 0 without pairs."""
    return F.cross_entropy(logits.float(), belong, reduction="sum") / max(1, len(belong))
