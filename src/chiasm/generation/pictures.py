"""Visual tokens of pictures that were seen before are not computed again."""

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.fusion.base import FusionModel
from chiasm.generation.lru import ByteCache
from chiasm.generation.prompt import Prompt, picture_inputs


class PictureCache:
    """The connector's output by a picture's content, and its instruction where the connector reads one."""

    def __init__(self, model: FusionModel, limit: int) -> None:
        self.model, self.kept = model, ByteCache(limit)

    def visual_tokens(self, prompt: Prompt) -> Float[Tensor, "images T D_l"] | None:
        """Visual tokens of a prompt's pictures; those that are not there yet go through the encoder together."""
        found = {name: self.kept.get(name) for name in dict.fromkeys(prompt.pictures)}
        missing = [name for name, tokens in found.items() if tokens is None]
        if missing:
            fresh = self.model.visual_tokens(
                **picture_inputs(prompt.inputs, [prompt.pictures.index(name) for name in missing])
            )
            assert fresh is not None
            for name, tokens in zip(missing, fresh, strict=True):
                found[name] = tokens.clone()
                self.kept.put(name, found[name])  # type: ignore[arg-type]
        return torch.stack([found[name] for name in prompt.pictures]) if found else None  # type: ignore[misc]
