"""The sigmoid loss of pairs: every picture and every text are one yes-or-no question (SigLIP, arXiv 2303.15343)."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def sigmoid_loss(
    logits: Float[Tensor, "B M"], same: Bool[Tensor, "B M"], num_items: int | None = None
) -> Float[Tensor, ""]:
    """Binary cross-entropy, summed over the M candidates of each row.

    Args:
        logits: scaled cosines with their bias, of the batch's pictures and all texts, of all processes.
        same: where the two belong together: the own pair, and those that are identical to it.
        num_items: divides the sum over the batch; B itself where it is None.
    """
    signs = 2.0 * same.float() - 1.0
    count = len(logits) if num_items is None else num_items
    return -F.logsigmoid(signs * logits.float()).sum() / count
