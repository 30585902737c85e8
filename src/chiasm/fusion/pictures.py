"""Pictures of a batch in the order of their placeholders, whatever way they are packed."""

from jaxtyping import Float
from torch import Tensor


def real_pictures(
    pixel_values: Float[Tensor, "... 3 height width"] | None, pixel_attention_mask: Tensor | None
) -> tuple[Float[Tensor, "images 3 height width"] | None, Tensor | None]:
    """Pictures and masks `(images, ...)`; of rows `(B, I, ...)` those of all zeros are left out, which only fill up."""
    if pixel_values is None or pixel_values.ndim != 5:
        return pixel_values, pixel_attention_mask
    pictures = pixel_values.flatten(0, 1)
    real = pictures.flatten(1).ne(0).any(dim=1)
    if not real.any():
        return None, None
    return pictures[real], None if pixel_attention_mask is None else pixel_attention_mask.flatten(0, 1)[real]
