"""Image-grounded text generation: the caption, word by word, from the queries (ITG of BLIP-2, arXiv 2301.12597)."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from chiasm.language.next_token import IGNORE

SMOOTHING = 0.1


def decoder_inputs(
    input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"], decoder_token_id: int
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """The caption with [DEC] in its first place, which asks for generation, and the labels: every later token."""
    ids = input_ids.clone()
    ids[:, 0] = decoder_token_id
    labels = input_ids.masked_fill(attention_mask == 0, IGNORE)
    labels[:, 0] = IGNORE
    return ids, labels


def grounded_generation_loss(
    logits: Float[Tensor, "K V"],
    targets: Int[Tensor, " K"],
    smoothing: float = SMOOTHING,
    num_items: int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy at supervised positions, divided by `num_items` (K itself where it is None)."""
    count = max(len(targets), 1) if num_items is None else num_items
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing) / count
