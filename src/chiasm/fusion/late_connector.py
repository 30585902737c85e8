"""Where two towers meet: a projection each into a shared space, and how scores are made of cosines there.

CLIP's scale (arXiv 2103.00020), SigLIP's scale and bias (arXiv 2303.15343).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class LateConnector(nn.Module):
    """Vectors of both towers → vectors of length 1 in one space."""

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        name: str = "linear",
        space: int = 512,
        bias: bool = False,
        hidden: int = 1024,
        logit_scale: float = 2.6592,
        logit_bias: float | None = None,
    ) -> None:
        """
        Args:
            name: `linear`, `mlp` (one hidden layer), or `none` where both towers end in the same space already.
            space: width of the space.
            bias: whether linear projections have one.
            hidden: width of the MLPs' hidden layer.
            logit_scale: start of the natural logarithm of what cosines are multiplied by.
            logit_bias: start of the bias, with which a sigmoid tells scores (SigLIP); None for scores without one.
        """
        super().__init__()
        if name == "none" and image_width != text_width:
            raise ValueError(
                f"connector 'none' needs towers of one width, these have {image_width} and {text_width}; choose linear"
            )
        make: Any = {"linear": lambda w: nn.Linear(w, space, bias), "mlp": lambda w: _mlp(w, hidden, space)}.get(name)
        self.image_projection = nn.Identity() if make is None else make(image_width)
        self.text_projection = nn.Identity() if make is None else make(text_width)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))

    @property
    def dtype(self) -> torch.dtype:
        return self.logit_scale.dtype

    def images(self, pooled: Float[Tensor, "images D_v"]) -> Float[Tensor, "images P"]:
        """Unit vectors of pictures."""
        return F.normalize(self.image_projection(pooled.to(self.dtype)), dim=-1)

    def texts(self, pooled: Float[Tensor, "texts D_l"]) -> Float[Tensor, "texts P"]:
        """Unit vectors of texts."""
        return F.normalize(self.text_projection(pooled.to(self.dtype)), dim=-1)

    def logits(self, cosines: Float[Tensor, "images texts"]) -> Float[Tensor, "images texts"]:
        """Scores for a softmax over candidates, or with a bias for a sigmoid of each pair."""
        scores = cosines * self.logit_scale.exp()
        return scores if self.logit_bias is None else scores + self.logit_bias


def _mlp(width: int, hidden: int, space: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, space))
