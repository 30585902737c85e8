"""What was computed of pictures that were seen before is not computed again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chiasm.fusion.base import FusionModel
from chiasm.generation.lru import ByteCache
from chiasm.generation.prompt import Prompt, picture_inputs


class PictureCache:
    """The connector's output by a picture's content, and its instruction where the connector reads one; or the
    encoder's, for a model that takes that alone."""

    def __init__(self, model: FusionModel, limit: int) -> None:
        self.model, self.kept = model, ByteCache(limit)

    def visual_tokens(self, prompt: Prompt) -> Any:
        """Visual tokens `(images, T, D_l)` of a prompt's pictures, or those of each where they have their own T; what
        is not there yet goes through the encoder together."""
        return self._of(prompt, self.model.visual_tokens)

    def features(self, prompt: Prompt) -> Any:
        """Patch features `(images, N, D_v)` of a prompt's pictures, in the same way."""

        def encode(pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, **_: Tensor) -> Tensor:
            return self.model.encode_images(pixel_values, pixel_attention_mask)

        return self._of(prompt, encode)

    def _of(self, prompt: Prompt, compute: Callable[..., Any]) -> Any:
        found = {name: self.kept.get(name) for name in dict.fromkeys(prompt.pictures)}
        missing = [name for name, tokens in found.items() if tokens is None]
        if missing:
            fresh = compute(**picture_inputs(prompt.inputs, [prompt.pictures.index(name) for name in missing]))
            assert fresh is not None
            for name, tokens in zip(missing, fresh, strict=True):
                found[name] = tokens.clone()
                self.kept.put(name, found[name])  # type: ignore[arg-type]
        alike = len({tokens.shape for tokens in found.values() if tokens is not None}) == 1
        together = tuple(tokens for name in prompt.pictures if (tokens := found[name]) is not None)
        return (torch.stack(together) if alike else together) if found else None
