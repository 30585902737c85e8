"""EfficientNet-Lite: a small ImageNet CNN for CPUs and phones (Tan and Le, EfficientNet, arXiv 1905.11946).

The Lite variants keep the paper's inverted bottlenecks and compound scaling, use ReLU6, have no squeeze-and-excitation,
and leave the stem, the head and the depth of the first and last stage unscaled.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

STEM_CHANNELS = 32
STAGES = (  # repeats, kernel, stride, expansion, channels: before scaling
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
FEATURE_MAPS = ("stem", *(f"stage{index}" for index in range(1, len(STAGES) + 1)), "head")


class EfficientNetLiteConfig(PreTrainedConfig):
    """Lite0 by default; `width_coefficient` and `depth_coefficient` are the paper's compound scaling.

    Args:
        image_size: height and width that the weights were trained at, in pixels; any other size works too.
        hidden_size: channels of the head, which is the last feature map.
    """

    model_type = "efficientnet_lite"

    def __init__(
        self,
        width_coefficient: float = 1.0,
        depth_coefficient: float = 1.0,
        image_size: int = 224,
        num_channels: int = 3,
        hidden_size: int = 1280,
        batch_norm_eps: float = 1e-3,
        batch_norm_momentum: float = 0.01,
        **kwargs: Any,
    ) -> None:
        self.width_coefficient = width_coefficient
        self.depth_coefficient = depth_coefficient
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.batch_norm_eps = batch_norm_eps
        self.batch_norm_momentum = batch_norm_momentum
        super().__init__(**kwargs)

    @property
    def stages(self) -> list[tuple[int, int, int, int, int]]:
        """`STAGES` with repeats and channels scaled; channels are multiples of 8."""
        scaled = []
        for index, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
            if 0 < index < len(STAGES) - 1:
                repeats = math.ceil(self.depth_coefficient * repeats)
            scaled.append((repeats, kernel, stride, expansion, _scale_channels(channels, self.width_coefficient)))
        return scaled


@dataclass
class EfficientNetLiteOutput(ModelOutput):
    """`feature_maps` holds every map (B, channels, height, width) by name; `last_hidden_state` is the head's."""

    last_hidden_state: Tensor | None = None
    feature_maps: dict[str, Tensor] | None = None


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm, and ReLU6 unless it is a bottleneck's linear end."""

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        channels: tuple[int, int],
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__()
        groups = channels[0] if depthwise else 1
        self.conv = nn.Conv2d(*channels, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels[1], eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
        self.linear = linear

    def forward(self, x: Float[Tensor, "B C_in height width"]) -> Float[Tensor, "B C_out h w"]:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        (top, bottom), (left, right) = (same_padding(size, kernel, stride) for size in x.shape[-2:])
        if (top, left) != (bottom, right):
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        x = F.conv2d(x, self.conv.weight, self.conv.bias, stride, (top, left), groups=self.conv.groups)
        x = self.norm(x)
        return x if self.linear else F.relu6(x, inplace=True)


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel by itself, project back; added to the input where the shapes allow it."""

    def __init__(
        self, config: EfficientNetLiteConfig, channels: tuple[int, int], kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        inner = channels[0] * expansion
        self.expand = ConvNorm(config, (channels[0], inner)) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(config, (inner, inner), kernel, stride, depthwise=True)
        self.project = ConvNorm(config, (inner, channels[1]), linear=True)
        self.residual = stride == 1 and channels[0] == channels[1]

    def forward(self, x: Float[Tensor, "B C_in height width"]) -> Float[Tensor, "B C_out h w"]:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite without its classifier.

    `feature_maps` has strides 2 (`stem`, `stage1`), 4 (`stage2`), 8 (`stage3`), 16 (`stage4`, `stage5`) and
    32 (`stage6`, `stage7`, `head`). Batch norm: a frozen model must be in eval mode, or its running statistics move.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InvertedBottleneck"]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # no attention: each implementation suits

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = ConvNorm(config, (config.num_channels, STEM_CHANNELS), kernel=3, stride=2)
        self.stages = nn.ModuleList()
        width = STEM_CHANNELS
        for repeats, kernel, stride, expansion, channels in config.stages:
            blocks = [InvertedBottleneck(config, (width, channels), kernel, stride, expansion)]
            blocks += [InvertedBottleneck(config, (channels,) * 2, kernel, 1, expansion) for _ in range(1, repeats)]
            self.stages.append(nn.Sequential(*blocks))
            width = channels
        self.head = ConvNorm(config, (width, config.hidden_size))
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Float[Tensor, "B channels height width"], **_: object) -> EfficientNetLiteOutput:
        maps = [self.stem(pixel_values)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        maps.append(self.head(maps[-1]))
        return EfficientNetLiteOutput(
            last_hidden_state=maps[-1], feature_maps=dict(zip(FEATURE_MAPS, maps, strict=True))
        )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        else:
            super()._init_weights(module)


def _scale_channels(channels: int, width: float) -> int:
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, as TensorFlow pads: the odd one comes after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
