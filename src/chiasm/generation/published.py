"""What a checkpoint's own `generation_config` does to logits: n-grams that do not come again, words that never come,
answers of a least length, and so on. `transformers.generate` reads it, and so does the engine, by the same processors.
"""

from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, SuppressTokensLogitsProcessor

from chiasm.fusion.generation_inputs import without_placeholders
from chiasm.generation.decoding import Decoding


def published(
    model: PreTrainedModel, decoding: Decoding, tokens: int, encoded: Int[Tensor, "1 S"]
) -> LogitsProcessorList | None:
    """Processors of one answer, the repetition penalty among them; None where a model's settings ask for nothing.

    Args:
        tokens: in front of the answer.
        encoded: the prompt, which some settings for encoder–decoders read in any model.
    """
    chosen = decoding.arguments() | {"do_sample": False, "pad_token_id": 0}
    if not _processors(model, chosen | {"repetition_penalty": 1.0}, tokens, encoded):
        return None
    return _processors(model, chosen, tokens, encoded)


def _processors(model: Any, chosen: dict[str, Any], tokens: int, encoded: Tensor) -> LogitsProcessorList:
    """All but that of `suppress_tokens`, which the engine never answers with anyway."""
    settings, _ = model._prepare_generation_config(None, **chosen)
    settings.max_length = tokens + chosen["max_new_tokens"]
    model._prepare_special_tokens(settings, device=model.device)
    found = model._get_logits_processor(settings, tokens, encoded, device=model.device)
    kept = LogitsProcessorList(one for one in found if not isinstance(one, SuppressTokensLogitsProcessor))
    image = model.config.image_token_id
    return kept if image is None else without_placeholders(kept, image)
