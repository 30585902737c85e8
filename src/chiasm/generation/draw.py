"""Pictures from words: codes of the image tokenizer one by one, nothing else, and exactly as many as the grid has.

With guidance every code is chosen by two answers, with the words and without: their difference is exaggerated
(classifier-free guidance, arXiv 2207.12598).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from chiasm.data.chat import Message
from chiasm.data.drawing import request
from chiasm.data.unified import UnifiedProcessor
from chiasm.fusion.prefix import with_suffix
from chiasm.fusion.unified import UnifiedModel


@dataclass(frozen=True)
class Brush:
    """How codes are chosen.

    Args:
        temperature: 0 takes the likeliest code, above it codes are drawn.
        top_k: of so many likeliest ones; 0 of all.
        guidance: 1 follows the words as they were learned, more exaggerates them, 0 does not read them.
        seed: of the drawing; None takes torch's own state.
    """

    temperature: float = 0.5
    top_k: int = 0
    guidance: float = 1.5
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("guidance", self.guidance)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}, expected a finite number from 0 on")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}, expected 0 (all codes) or more")


def draw(model: Any, processor: Any, prompts: Sequence[str], brush: Brush) -> list[Image.Image]:
    """One picture for each prompt.

    Raises:
        ValueError: the model cannot draw.
    """
    if not can_draw(model):
        raise ValueError(
            f"this model (fusion {model.config.fusion!r}) cannot draw; connect with fusion='unified' and "
            "image_input='vq', and train it by the recipe unified"
        )
    codes = draw_codes(model, processor, [[request(words)] for words in prompts], brush)
    return model.vision.pictures(codes)


def can_draw(model: Any) -> bool:
    """Whether a model's pictures are codes that it can write, and an image tokenizer turns back into pictures."""
    return isinstance(model, UnifiedModel) and getattr(model.vision, "draws", False)


@torch.inference_mode()
def draw_codes(
    model: UnifiedModel, processor: UnifiedProcessor, requests: Sequence[list[Message]], brush: Brush
) -> Int[Tensor, "pictures N"]:
    """The codes of one picture for each conversation, which ends with a request for it, in raster order."""
    guided = brush.guidance != 1.0
    asked = [*requests, *([[request(None)]] * len(requests) if guided else [])]
    inputs = processor(messages=asked)
    ids = inputs["input_ids"].to(model.device)
    begin = torch.tensor([[model.settings.begin_token_id]] * len(asked), device=ids.device)
    ids, mask = torch.cat([ids, begin], dim=1), F.pad(inputs["attention_mask"].to(ids.device), (0, 1), value=1)
    types = with_suffix(inputs["token_type_ids"].to(ids.device), 1) if "token_type_ids" in inputs else None
    generator = None if brush.seed is None else torch.Generator(ids.device).manual_seed(brush.seed)
    first, count = int(model.settings.code_ids), model.vision.num_codes  # type: ignore[arg-type]
    places = model.num_image_tokens
    whole_ids = torch.cat([ids, ids.new_full((len(asked), places), first)], dim=1)
    whole_mask = F.pad(mask, (0, places), value=1)
    positions = model.whole_positions(whole_ids, None, whole_mask)
    positions = positions if len(positions) > 1 else positions[0]
    chosen: list[Tensor] = []
    cache, start, step = None, 0, ids
    for number in range(places):
        stop = ids.shape[1] + number
        output = model(
            input_ids=step,
            attention_mask=whole_mask[:, :stop],
            position_ids=positions[..., start:stop],
            token_type_ids=types if cache is None else None,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
            codes=True,
        )
        cache, start = output.cache, stop
        logits = guide(output.logits[:, -1, first : first + count].float(), brush.guidance)
        chosen.append(_choose(logits, brush, generator))
        step = (chosen[-1] + first).repeat(2 if guided else 1)[:, None]
    return torch.stack(chosen, dim=1)


def guide(logits: Float[Tensor, "B V"], guidance: float) -> Float[Tensor, "pictures V"]:
    """What the words change, exaggerated: the batch holds the prompts first, then the same without words."""
    if guidance == 1.0:
        return logits
    told, untold = logits.log_softmax(dim=-1).chunk(2)
    return untold + guidance * (told - untold)


def _choose(
    logits: Float[Tensor, "pictures V"], brush: Brush, generator: torch.Generator | None
) -> Int[Tensor, " pictures"]:
    if brush.temperature == 0:
        return logits.argmax(dim=-1)
    if 0 < brush.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(brush.top_k).values[:, -1:], -torch.inf)
    shares = ((logits - logits.amax(dim=-1, keepdim=True)) / brush.temperature).softmax(dim=-1)
    return torch.multinomial(shares, 1, generator=generator)[:, 0]
