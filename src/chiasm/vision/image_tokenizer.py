"""A picture as whole numbers and back: a small convolutional autoencoder with finite scalar quantisation.

FSQ (arXiv 2309.15505) rounds each of a few bounded channels to a few levels; their combinations are the codebook. There
is no codebook to learn, nothing to collapse, and one loss: how well the picture comes back.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


class ImageTokenizerConfig(PreTrainedConfig):
    """Sizes of an image tokenizer.

    Args:
        image_size: height and width in pixels.
        factor: pixels of a code's side; a power of two from 4 on.
        levels: of each quantised channel; their product is the number of codes.
        width: channels at half of the factor; twice as many at the factor.
        depth: residual blocks at the factor.
    """

    model_type = "chiasm_image_tokenizer"

    image_size: list | tuple = (96, 96)
    factor: int = 8
    levels: list | tuple = (8, 5, 5, 5)
    width: int = 48
    depth: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.factor < 4 or self.factor & (self.factor - 1):
            raise ValueError(f"factor {self.factor} of the image tokenizer must be a power of two from 4 on")
        if any(side % self.factor for side in self.image_size):
            raise ValueError(f"image_size {tuple(self.image_size)} is no multiple of the factor {self.factor}")
        if any(level < 2 for level in self.levels):
            raise ValueError(f"levels {tuple(self.levels)} of the image tokenizer must be 2 or more each")
        super().__post_init__(**kwargs)


class FiniteScalarQuantizer(nn.Module):
    """Channels → levels → one number, and back."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.size = math.prod(self.levels)

    def _per_channel(self, values: list[float], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device, dtype=like.dtype)

    def forward(self, states: Float[Tensor, "... channels"]) -> Float[Tensor, "... channels"]:
        """Rounded values from -1 to 1; the gradient passes through the rounding."""
        half = self._per_channel([(level - 1) * (1 + 1e-3) / 2 for level in self.levels], states)
        offset = self._per_channel([0.5 * (level % 2 == 0) for level in self.levels], states)
        bounded = (states + (offset / half).atanh()).tanh() * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self._per_channel([level // 2 for level in self.levels], states)

    def numbers(self, quantized: Float[Tensor, "... channels"]) -> Int[Tensor, "..."]:
        """The number of each combination of levels."""
        numbers = torch.zeros(quantized.shape[:-1], dtype=torch.long, device=quantized.device)
        for channel, level in enumerate(self.levels):
            step = (quantized[..., channel].float() * (level // 2)).round().long() + level // 2
            numbers = numbers * level + step
        return numbers

    def values(self, numbers: Int[Tensor, "..."]) -> Float[Tensor, "... channels"]:
        """The combination of levels that a number stands for."""
        channels = []
        for level in reversed(self.levels):
            channels.append((numbers % level - level // 2) / (level // 2))
            numbers = numbers // level
        return torch.stack(channels[::-1], dim=-1)


class ResidualBlock(nn.Module):
    """Two normalised 3 × 3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(math.gcd(8, width), width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(math.gcd(8, width), width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, states: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        inner = self.conv1(F.silu(self.norm1(states)))
        return states + self.conv2(F.silu(self.norm2(inner)))


class ImageTokenizer(PreTrainedModel):
    """Pictures `(I, 3, height, width)` with values from -1 to 1 → codes `(I, N)` → pictures."""

    config_class = ImageTokenizerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # no attention: each implementation suits
    kind = "vq"
    draws = True

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__(config)
        half, width, channels = config.factor // 2, config.width, len(config.levels)
        self.quantizer = FiniteScalarQuantizer(tuple(config.levels))
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(half),
            nn.Conv2d(3 * half**2, width, 3, padding=1),
            ResidualBlock(width),
            nn.Conv2d(width, 2 * width, 2, stride=2),
            *(ResidualBlock(2 * width) for _ in range(config.depth)),
            nn.GroupNorm(math.gcd(8, width), 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 2 * width, 3, padding=1),
            *(ResidualBlock(2 * width) for _ in range(config.depth)),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
            ResidualBlock(width),
            nn.GroupNorm(math.gcd(8, width), width),
            nn.SiLU(),
            nn.Conv2d(width, 3 * half**2, 3, padding=1),
            nn.PixelShuffle(half),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The layers initialise themselves when they are built."""
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.reset_parameters()

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.config.image_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        height, width = self.image_size
        return height // self.config.factor, width // self.config.factor

    @property
    def num_codes(self) -> int:
        return self.quantizer.size

    def flops(self) -> int:
        """Of the encoder on one picture."""
        rows, columns = self.grid
        total, places = 0, 4 * rows * columns
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv2d):
                places = rows * columns if module.stride[0] == 2 else places
                total += 2 * places * module.weight.numel()
        return total

    @torch.no_grad()
    def encode(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Int[Tensor, "images N"]:
        """The codes of pictures, in raster order."""
        return self.quantizer.numbers(self._quantized(pixel_values)).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "images N"]) -> Float[Tensor, "images 3 height width"]:
        """The pictures that codes stand for, values from -1 to 1."""
        values = self.quantizer.values(codes.unflatten(1, self.grid)).to(self.dtype)
        return self.decoder(values.permute(0, 3, 1, 2)).clamp(-1, 1)

    def pictures(self, codes: Int[Tensor, "images N"]) -> list[Image.Image]:
        """The same as pictures that can be looked at."""
        return as_pictures(self.decode(codes))

    def _quantized(self, pixel_values: Tensor) -> Float[Tensor, "images rows columns channels"]:
        return self.quantizer(self.encoder(pixel_values.to(self.dtype)).permute(0, 2, 3, 1).float())

    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images 3 height width"]:
        """The pictures as they come back."""
        quantized = self._quantized(pixel_values).to(self.dtype)
        return self.decoder(quantized.permute(0, 3, 1, 2))


def as_pictures(pixels: Float[Tensor, "images 3 height width"]) -> list[Image.Image]:
    """Values from -1 to 1 as pictures that can be looked at."""
    levels = ((pixels.float() + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture.cpu().numpy()) for picture in levels]
