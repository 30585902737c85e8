"""A head on two towers that answers from a closed list: the picture's vector meets the question's only here.

`product` is VQA's first baseline (arXiv 1505.00468); `concat` is one linear layer on both; `mlp` reads both and their
product through a hidden layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

COMBINATIONS = ("concat", "product", "mlp")


class AnswerHead(nn.Module):
    """Vectors of a picture and a question → scores of the known answers."""

    def __init__(
        self, image_width: int, text_width: int, *, answers: Sequence[str], combine: str = "mlp", hidden: int = 512
    ) -> None:
        """
        Args:
            answers: the closed list.
            combine: one of `COMBINATIONS`.
            hidden: width in which `product` and `mlp` meet.
        """
        super().__init__()
        if combine not in COMBINATIONS:
            raise ValueError(f"answer head combine={combine!r} is unknown; choose one of {', '.join(COMBINATIONS)}")
        self.settings: dict[str, Any] = {"answers": list(answers), "combine": combine, "hidden": hidden}
        self.combine = combine
        self.image_norm, self.text_norm = nn.LayerNorm(image_width), nn.LayerNorm(text_width)
        if combine == "concat":
            self.output = nn.Linear(image_width + text_width, len(answers))
            return
        self.image_layer, self.text_layer = nn.Linear(image_width, hidden), nn.Linear(text_width, hidden)
        width = hidden if combine == "product" else 3 * hidden
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.GELU()) if combine == "mlp" else nn.Identity()
        self.output = nn.Linear(hidden, len(answers))

    def flops(self) -> int:
        """FLOPs of one answer, given the two vectors."""
        return 2 * sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))

    def forward(self, images: Float[Tensor, "B D_v"], texts: Float[Tensor, "B D_l"]) -> Float[Tensor, "B A"]:
        dtype = self.output.weight.dtype
        images, texts = self.image_norm(images.to(dtype)), self.text_norm(texts.to(dtype))
        if self.combine == "concat":
            return self.output(torch.cat([images, texts], dim=-1))
        images, texts = self.image_layer(images).tanh(), self.text_layer(texts).tanh()
        met = images * texts
        if self.combine == "mlp":
            met = torch.cat([images, texts, met], dim=-1)
        return self.output(self.hidden(met))
