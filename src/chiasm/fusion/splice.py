"""Visual tokens take the places of their placeholders, or the counts are told."""

from jaxtyping import Bool, Float
from torch import Tensor


def splice(
    embeddings: Float[Tensor, "B S D_l"],
    placeholders: Bool[Tensor, "B S"],
    visual_tokens: Float[Tensor, "images T D_l"],
) -> Float[Tensor, "B S D_l"]:
    """Embeddings whose placeholders are replaced, in order over the whole batch.

    Raises:
        ValueError: the number of placeholders differs from the number of visual tokens.
    """
    wanted, given = int(placeholders.sum()), visual_tokens.shape[0] * visual_tokens.shape[1]
    if wanted != given:
        images, tokens = visual_tokens.shape[:2]
        raise ValueError(
            f"the text holds {wanted} image placeholders but {images} image(s) give {given} visual tokens "
            f"({tokens} each); pass {wanted / tokens:g} image(s), or build the inputs with the model's processor"
        )
    return embeddings.masked_scatter(placeholders[..., None], visual_tokens.to(embeddings))
