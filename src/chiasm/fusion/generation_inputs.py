"""What `transformers.generate` must know about pictures: how beams repeat them, and that a placeholder is no word."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import LogitsProcessorList


def expand_images(images: Tensor, placeholders: Bool[Tensor, "B S"], num_tokens: int, times: int) -> Tensor:
    """Pictures of each row repeated `times` as a group: rows [A B] [C] twice → A B A B C C."""
    counts = (placeholders.sum(dim=1) // num_tokens).tolist()
    groups = torch.split(images, counts)
    return torch.cat([group for group in groups for _ in range(times)])


class _TextOnly(LogitsProcessorList):
    """Applies a list of processors to the text alone."""

    def __init__(self, processors: LogitsProcessorList, image_token_id: int) -> None:
        super().__init__(processors)
        self.image_token_id = image_token_id

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Tensor, **kwargs: Any) -> Tensor:
        """A placeholder counts as the row's last text token, which is in the row anyway."""
        return super().__call__(
            torch.where(input_ids == self.image_token_id, input_ids[:, -1:], input_ids), scores, **kwargs
        )


def without_placeholders(processors: LogitsProcessorList, image_token_id: int) -> LogitsProcessorList:
    """The same processors, which then see no placeholder."""
    return _TextOnly(processors, image_token_id) if processors else processors
