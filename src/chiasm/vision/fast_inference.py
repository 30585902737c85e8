"""EfficientNet-Lite for inference only, as fast as the machine allows without a compiler.

Batch norms are folded into the convolutions before them. On a CPU every convolution then is one oneDNN kernel together
with its bias, its ReLU6 or its residual sum, over weights that are packed once; the kernels are the ones that
TorchInductor calls, so nothing is compiled. `benchmarks/encode.py` measures it.
"""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from chiasm.vision.compiling import Note, compiled
from chiasm.vision.efficientnet_lite import (
    FEATURE_MAPS,
    ConvNorm,
    EfficientNetLiteModel,
    EfficientNetLiteOutput,
    InvertedBottleneck,
    same_padding,
)

CPU_BATCH = 4
"""Pictures that run together on a CPU: more of them do not fit its cache, and take up to twice as long each."""


def fold_batch_norms(model: EfficientNetLiteModel) -> EfficientNetLiteModel:
    """A copy in evaluation mode whose convolutions have taken in the scale and shift of the batch norms behind them."""
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for module in folded.modules():
        if isinstance(module, ConvNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
    return folded


def fast_inference(
    model: EfficientNetLiteModel,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    feature_maps: Iterable[str] = FEATURE_MAPS,
    note: Note | None = None,
) -> "FastInference":
    """The model's function without gradients, on the device it is on; later changes of its weights are not seen.

    Args:
        dtype: precision of arithmetic and features. By default the fastest that keeps every map within 1%: float32 on
            a CPU, where it is exact to 1e-5, float16 on CUDA. bfloat16 is twice as fast on a CPU that multiplies it,
            and up to 10% off on pictures with flat areas.
        compile: compiles what does not run on oneDNN's kernels, which are as fast as compiled ones; takes half a
            minute. Without a working compiler it stays uncompiled, with a note.
        feature_maps: the maps that are wanted; what lies behind the last of them is not computed.
        note: told in one line where it could not be compiled; by default a warning says it.

    Raises:
        ValueError: a feature map is unknown.
    """
    wanted = tuple(feature_maps)
    if unknown := [name for name in wanted if name not in FEATURE_MAPS]:
        raise ValueError(f"feature map {unknown[0]!r} is unknown; choose from {', '.join(FEATURE_MAPS)}")
    if dtype is None:
        dtype = torch.float16 if model.device.type == "cuda" else model.dtype
    return FastInference(model, dtype, compile, wanted, note)


class FastInference:
    """What `fast_inference` returns: called like the model, it returns the wanted `feature_maps`."""

    def __init__(
        self,
        model: EfficientNetLiteModel,
        dtype: torch.dtype,
        compile: bool,
        wanted: tuple[str, ...],
        note: Note | None = None,
    ) -> None:
        self.device, self.dtype, self.wanted = model.device, dtype, wanted
        folded = fold_batch_norms(model)
        self.kernels = self.device.type == "cpu" and _onednn_agrees(folded, dtype)
        part = _onednn if self.kernels else _plain
        last = max(map(FEATURE_MAPS.index, wanted), default=-1)
        self.parts = [part(module, dtype) for module in (folded.stem, *folded.stages, folded.head)[: last + 1]]
        self.run: Callable[[Tensor], dict[str, Tensor]] = self._run
        if compile and not self.kernels:
            self.run = compiled(self._run, note)

    @torch.no_grad()
    def __call__(self, pixel_values: Float[Tensor, "B channels height width"]) -> EfficientNetLiteOutput:
        """The wanted maps in this precision; `last_hidden_state` is None if `head` is not among them."""
        x = pixel_values.to(self.device, self.dtype, memory_format=torch.channels_last)
        batches = [self.run(batch) for batch in (x.split(CPU_BATCH) if self.device.type == "cpu" else (x,))]
        maps = {name: torch.cat([batch[name] for batch in batches]) for name in self.wanted}
        return EfficientNetLiteOutput(last_hidden_state=maps.get("head"), feature_maps=maps)

    def _run(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, part in zip(FEATURE_MAPS, self.parts, strict=False):
            x = part(x)
            if name in self.wanted:
                maps[name] = x
        return maps


def _plain(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _onednn(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if isinstance(module, ConvNorm):
        return _Kernel(module, dtype)
    blocks = [_Bottleneck(block, dtype) for block in module.modules() if isinstance(block, InvertedBottleneck)]

    def stage(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    return stage


class _Bottleneck:
    def __init__(self, block: InvertedBottleneck, dtype: torch.dtype) -> None:
        parts = (block.expand, block.depthwise, block.project)
        *self.before, self.project = (_Kernel(part, dtype) for part in parts if isinstance(part, ConvNorm))
        self.residual = block.residual

    def __call__(self, x: Tensor) -> Tensor:
        y = x
        for kernel in self.before:
            y = kernel(y)
        return self.project(y, x if self.residual else None)


class _Kernel:
    """A folded convolution as one call of oneDNN; its weight is packed for each size of picture at the first one."""

    def __init__(self, module: ConvNorm, dtype: torch.dtype) -> None:
        conv = module.conv
        assert conv.bias is not None, "the batch norm is not folded"
        self.weight, self.bias = conv.weight.to(dtype), conv.bias.to(dtype)
        self.kernel, self.stride, self.groups = conv.kernel_size[0], conv.stride[0], conv.groups
        self.activation = ("none", []) if module.linear else ("hardtanh", [0.0, 6.0])
        self.packed: dict[torch.Size, tuple[Tensor, list[int]]] = {}

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.shape[2:] not in self.packed:
            self.packed[x.shape[2:]] = self._pack(x)
        weight, padding = self.packed[x.shape[2:]]
        geometry = (padding, [self.stride] * 2, [1, 1], self.groups)
        convolve = torch.ops.mkldnn._convolution_pointwise
        if residual is not None:
            return convolve.binary(x, residual, weight, self.bias, *geometry, "add", 1.0, None, [], None)
        return convolve(x, weight, self.bias, *geometry, *self.activation, "")

    def _pack(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """The packed weight and its padding. oneDNN is only reached with equal padding on both sides; where there has
        to be one more behind, a kernel with one more zero in front needs as many on either side."""
        (top, bottom), (left, right) = (same_padding(size, self.kernel, self.stride) for size in x.shape[2:])
        weight = F.pad(self.weight, (right - left, 0, bottom - top, 0))
        geometry = ([bottom, right], [self.stride] * 2, [1, 1], self.groups)
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape)), [bottom, right]


@torch.no_grad()
def _onednn_agrees(folded: EfficientNetLiteModel, dtype: torch.dtype) -> bool:
    """Whether oneDNN's kernels, which have no public name, are there and compute what the modules compute."""
    x = torch.randn(1, folded.config.num_channels, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    try:
        for module in (folded.stem, *folded.stages, folded.head):
            found, x = _onednn(module, dtype)(x), copy.deepcopy(module).to(dtype)(x)
            if (found - x).float().norm() > tolerance * x.float().norm():
                return False
    except (AttributeError, RuntimeError):
        return False
    return True
