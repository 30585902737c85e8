"""The objective `reconstruction`: an image tokenizer learns to give pictures back; PSNR and its codes tell how well."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chiasm.data.collation import Batch, Item
from chiasm.data.schema import Problem, Sample, SampleError
from chiasm.fusion.unified import UnifiedModel
from chiasm.training.stage_model import StageModel


class TokenizerModel(StageModel):
    """The part `vision` of a unified model, an image tokenizer; words are not read."""

    controlled = False

    def encode(self, sample: Sample) -> dict[str, list[int]]:
        if not sample.images:
            raise SampleError(sample.id, [Problem("placeholders", "it has no picture to reconstruct")])
        return {"input_ids": []}

    def collate(self, items: Sequence[Item]) -> Batch:
        pictures = torch.cat([item.pictures for item in items if item.pictures is not None])
        return Batch({"pixel_values": pictures}, [item.id for item in items], len(pictures), len(pictures))

    def filler(self) -> Batch:
        return Batch({"pixel_values": torch.zeros(0, 3, *self.model.vision.image_size)}, [], 0, 0)

    def losses(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        """Squared and absolute error, half and half: the one is what PSNR measures, the other keeps edges."""
        pixels = inputs["pixel_values"]
        wrong = self.model.vision(pixels).float() - pixels
        error = 0.5 * (wrong.square() + wrong.abs()).flatten(1).mean(dim=1)
        return {"reconstruction": error.sum() / num_tokens}

    @torch.no_grad()
    def measures(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Peak signal-to-noise ratio in decibels, and the share of codes that the pictures use."""
        vision, squares, count = self.model.vision, 0.0, 0
        used: set[int] = set()
        for batch in batches:
            pixels = batch.inputs["pixel_values"].to(self.model.device)
            codes = vision.encode(pixels)
            used |= set(codes.flatten().tolist())
            squares += ((vision.decode(codes).float() - pixels) / 2).square().flatten(1).mean(dim=1).sum().item()
            count += len(pixels)
        psnr = -10 * math.log10(max(squares / count, 1e-10)) if count else 0.0
        return {"psnr": round(psnr, 2), "codes_used": len(used), "codes": vision.num_codes}


def tokenizer_stage(model: PreTrainedModel, processor: Any, stage: str) -> TokenizerModel:
    """What a stage with the objective `reconstruction` trains.

    Raises:
        ValueError: the model has no image tokenizer that draws.
    """
    if not isinstance(model, UnifiedModel) or not getattr(model.vision, "draws", False):
        raise ValueError(
            f"stage {stage!r}: reconstruction trains an image tokenizer, which this model (fusion "
            f"{model.config.fusion!r}) does not have; connect with fusion='unified' and image_input='vq'"
        )
    return TokenizerModel(model, processor)
