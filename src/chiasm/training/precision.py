"""The precision of a stage: float32 weights that learn, bfloat16 arithmetic where the machine is faster with it.

Frozen language-model weights are replaced by bfloat16 copies while the stage runs; the originals wait beside them, and
are what is saved, bit for bit.
"""

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

KEPT_PARTS = ("vision",)
"""Parts whose frozen weights keep their precision: an encoder's features are compared across runs and cached."""


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, float32 elsewhere."""
    if wanted == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix products in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def stage_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """While it lasts, trainable weights are float32 and frozen ones (but those of `KEPT_PARTS`) are copies in `dtype`.

    Afterwards frozen weights are the very ones that they were, and trained ones have their original precision again.
    The value is the originals of the copies, by name. The inputs of LoRA are left to `autocast`, which would only undo
    the conversion to float32 that peft makes.
    """
    frozen: dict[str, Tensor] = {}
    lower: dict[str, torch.dtype] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.requires_grad and parameter.dtype != torch.float32:
            lower[name] = parameter.dtype
            parameter.data = parameter.data.float()
        elif not parameter.requires_grad and parameter.dtype != dtype and name.split(".")[0] not in KEPT_PARTS:
            frozen[name] = parameter.data
            parameter.data = parameter.data.to(dtype)
    try:
        with disable_input_dtype_casting(model, active=dtype != torch.float32):
            yield frozen
    finally:
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.data = frozen[name]
            elif name in lower:
                parameter.data = parameter.data.to(lower[name])


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine() in ("arm64", "aarch64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
