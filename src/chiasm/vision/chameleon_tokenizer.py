"""Chameleon's image tokenizer: the encoder half of a VQ-GAN, as transformers has it (arXiv 2405.09818)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ChameleonVQVAE
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig


class ChameleonTokenizer(nn.Module):
    """Pictures → codes. The way back is not in the checkpoints of transformers, so that it cannot draw."""

    kind = "vq"
    draws = False

    def __init__(self, config: ChameleonVQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.model = ChameleonVQVAE(config)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.resolution, self.config.resolution

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        side = self.config.resolution // 2 ** (len(self.config.channel_multiplier) - 1)
        return side, side

    @property
    def num_codes(self) -> int:
        return self.config.num_embeddings

    def flops(self) -> int:
        """Of one picture, counted by running the encoder on a tensor without data."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            shadow = ChameleonVQVAE(self.config)
            shadow.encode(torch.empty(1, self.config.in_channels, *self.image_size))
        return counter.get_total_flops()

    @torch.no_grad()
    def encode(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Int[Tensor, "images N"]:
        """The codes of pictures, in raster order."""
        dtype = self.model.quant_conv.weight.dtype
        return self.model.encode(pixel_values.to(dtype)).image_tokens.view(pixel_values.shape[0], -1)
