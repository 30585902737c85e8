"""Visual tokens take the places of their placeholders, or the counts are told."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

VisualTokens = Float[Tensor, "images T D_l"] | tuple[Tensor, ...]
"""Visual tokens of pictures, or those of each, `(T, D_l)`, where pictures have their own T."""


def splice(
    embeddings: Float[Tensor, "B S D_l"],
    placeholders: Bool[Tensor, "B S"],
    visual_tokens: VisualTokens,
) -> Float[Tensor, "B S D_l"]:
    """Embeddings whose placeholders are replaced, in order over the whole batch.

    Raises:
        ValueError: the number of placeholders differs from the number of visual tokens.
    """
    wanted, each = int(placeholders.sum()), None
    if isinstance(visual_tokens, Tensor):
        each, flat = visual_tokens.shape[1], visual_tokens
        counts = [each] * visual_tokens.shape[0]
    else:
        counts, flat = [len(tokens) for tokens in visual_tokens], torch.cat(visual_tokens)
    if wanted != sum(counts):
        told = f"{each} each" if each else " + ".join(map(str, counts))
        fix = f"pass {wanted / each:g} image(s), or " if each else ""
        raise ValueError(
            f"the text holds {wanted} image placeholders but {len(counts)} image(s) give {sum(counts)} visual tokens "
            f"({told}); {fix}build the inputs with the model's processor"
        )
    return embeddings.masked_scatter(placeholders[..., None], flat.to(embeddings))
