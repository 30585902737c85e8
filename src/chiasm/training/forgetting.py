"""What training costs the parts that were good before: text perplexity, and the drift of the vision features.

Drift is told by the overlap of nearest neighbours and by linear CKA (arXiv 1905.00414). A model that did not change
gives exactly what it gave: the same weights go through the same arithmetic.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from chiasm.data.collation import load_pixels, whole_pictures
from chiasm.data.held_out import HELD_OUT_TEXTS
from chiasm.data.pixels import tells_grids
from chiasm.data.schema import ImageError, SampleError, Samples
from chiasm.language.adapter import context_length
from chiasm.training.schema import Forgetting

WINDOW = 256
"""Tokens of text that are read at once."""
NEIGHBOURS = 5
FEWEST_PICTURES = 3
ENCODED_AT_ONCE = 16


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment: perplexity of every text, and a feature vector for every picture."""

    perplexity: dict[str, float]
    features: Float[Tensor, "pictures D_v"] | None


class ForgettingProbe:
    """Compares a model with what it was when the probe was made."""

    def __init__(
        self, settings: Forgetting, model: PreTrainedModel, processor: ProcessorMixin, samples: Samples
    ) -> None:
        """
        Args:
            samples: where the pictures come from.
        """
        readable = settings.text and isinstance(model, GenerationMixin) and not model.config.is_encoder_decoder
        self.model, self.tokenizer = model, processor.tokenizer
        self.texts = HELD_OUT_TEXTS if readable else {}
        pictures = 0 if tells_grids(processor.image_processor) else settings.pictures
        self.pixels = _distinct_pictures(samples, processor, pictures) if pictures else None
        self.start = self.snapshot()

    def snapshot(self) -> Snapshot:
        """The model as it is now."""
        was_training = {name for name, module in self.model.named_modules() if module.training}
        self.model.eval()
        try:
            read = {name: perplexity(self.model, self.tokenizer, text) for name, text in self.texts.items()}
            return Snapshot(read, None if self.pixels is None else picture_features(self.model, self.pixels))
        finally:
            for name, module in self.model.named_modules():
                module.training = name in was_training

    def fields(self) -> dict[str, Any]:
        """What the log says: perplexities and their change since the start, and the vision features' drift."""
        now = self.snapshot()
        fields: dict[str, Any] = {"perplexity": now.perplexity}
        fields["perplexity_change"] = {name: now.perplexity[name] - self.start.perplexity[name] for name in self.texts}
        if self.start.features is not None and now.features is not None:
            fields["pictures"] = len(now.features)
            fields["knn_overlap"] = knn_overlap(self.start.features, now.features)
            fields["cka"] = linear_cka(self.start.features, now.features)
        return fields


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """exp of the mean loss of a text's tokens without a picture, read in windows that each start anew."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = min(WINDOW, context_length(model.config) or WINDOW)
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, size):
        window = torch.tensor([tokens[start : start + size]], device=model.device)
        if window.shape[1] < 2:
            continue
        logits = model(input_ids=window, attention_mask=torch.ones_like(window)).logits[0, :-1].float()
        total += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return math.exp(min(total / max(count, 1), 700.0))


@torch.no_grad()
def picture_features(
    model: PreTrainedModel, pixels: Float[Tensor, "pictures 3 height width"]
) -> Float[Tensor, "pictures D_v"]:
    """One vector for every picture: the mean of its patch features."""
    pooled = [
        model.encode_images(pixels[start : start + ENCODED_AT_ONCE].to(model.device)).float().mean(1).cpu()
        for start in range(0, len(pixels), ENCODED_AT_ONCE)
    ]
    return torch.cat(pooled)


def knn_overlap(
    before: Float[Tensor, "pictures D"], after: Float[Tensor, "pictures E"], neighbours: int = NEIGHBOURS
) -> float:
    """Share of every picture's nearest other pictures, by cosine, that are still its nearest; 1 without a change."""
    k = min(neighbours, len(before) - 1)
    near, still = _nearest(before, k), _nearest(after, k)
    return (near[:, :, None] == still[:, None, :]).any(2).double().mean().item()


def linear_cka(before: Float[Tensor, "pictures D"], after: Float[Tensor, "pictures D"]) -> float:
    """Likeness of two feature spaces over the same pictures, whatever their rotation and scale: 0 to 1."""
    x, y = (features.double() - features.double().mean(0) for features in (before, after))
    x, y = x @ x.T, y @ y.T
    scale = ((x * x).sum() * (y * y).sum()).sqrt()
    return ((x * y).sum() / scale).item() if scale > 0 else float(torch.equal(x, y))


def _nearest(features: Tensor, k: int) -> Tensor:
    unit = F.normalize(features.double(), dim=-1)
    likeness = (unit @ unit.T).fill_diagonal_(-math.inf)
    return likeness.topk(k, dim=1).indices


def _distinct_pictures(samples: Samples, processor: ProcessorMixin, at_most: int) -> Tensor | None:
    """Pixels of the first pictures that differ and can be read; None for fewer than `FEWEST_PICTURES`."""
    found: dict[str, Tensor] = {}
    for index in range(len(samples)):
        if len(found) >= at_most:
            break
        try:
            sample = samples[index]
            pixels = load_pixels(sample, processor)
            if pixels is not None:
                found |= zip((ref.key() for ref in sample.images), whole_pictures(pixels), strict=True)
        except (SampleError, ImageError):
            continue
    return torch.stack(list(found.values())[:at_most]) if min(len(found), at_most) >= FEWEST_PICTURES else None


def in_words(fields: Mapping[str, Any]) -> str:
    """The fields in one line."""
    said = []
    for name, value in fields["perplexity"].items():
        change = fields["perplexity_change"][name]
        said.append(f"{name} perplexity {value:.2f} ({'unchanged' if change == 0 else f'{change:+.2f}'})")
    if "cka" in fields:
        said.append(f"vision features: {fields['knn_overlap']:.1%} of neighbours kept, CKA {fields['cka']:.4f}")
    return "; ".join(said)
