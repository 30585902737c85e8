"""QLoRA (arXiv 2305.14314): while a stage runs, the weights beside its LoRA are held in 4 bits (NF4) by bitsandbytes.

The full weights wait in main memory, and LoRA is added to them, not to the 4-bit copies, when the stage ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.training.schema import Stage

DEVICES = ("cuda", "xpu", "cpu")
"""Where bitsandbytes computes with 4-bit weights; on a CPU that saves memory but no time."""


def require_four_bit(stage: Stage, device: torch.device) -> None:
    """Refuses `tune: qlora` where it cannot be done.

    Raises:
        ValueError: bitsandbytes is not installed, or does not know the device; or weights are to be sharded.
    """
    if stage.parallel == "fsdp":
        raise ValueError(
            f"stage {stage.name!r}: tune: qlora holds whole 4-bit weights, which parallel: fsdp cannot shard; "
            "write parallel: ddp, or tune: lora"
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"stage {stage.name!r}: tune: qlora needs the package bitsandbytes, which is not installed; "
            "pip install 'chiasm[qlora]' (for a GPU), or write tune: lora"
        )
    if device.type not in DEVICES:
        raise ValueError(
            f"stage {stage.name!r}: tune: qlora cannot hold 4-bit weights on the device {device.type!r} "
            f"(bitsandbytes knows {', '.join(DEVICES)}); write tune: lora"
        )


@contextmanager
def four_bit_layers(
    model: nn.Module, paths: Sequence[str], dtype: torch.dtype, originals: dict[str, Tensor]
) -> Iterator[None]:
    """While it lasts, the base layers of the LoRA layers at `paths` have 4-bit weights.

    Args:
        dtype: of the arithmetic.
        originals: the full weights by parameter name; those of the layers are added, and wait in main memory.
    """
    held: dict[str, tuple[nn.Linear, Tensor, torch.device]] = {}
    for path in paths:
        name, layer = f"{path}.base_layer.weight", model.get_submodule(path)
        linear: Any = layer.base_layer
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"{path} is a {type(linear).__name__}: only nn.Linear layers have a 4-bit form; use tune: lora"
            )
        device, now = linear.weight.device, linear.weight.data
        layer.base_layer = _four_bit(linear, dtype)
        held[path] = linear, now.cpu(), device
        linear.weight.data = held[path][1]
        originals[name] = originals.get(name, now).cpu()
    try:
        yield
    finally:
        for path, (linear, weight, device) in held.items():
            linear.weight.data = weight.to(device)
            model.get_submodule(path).base_layer = linear
            name = f"{path}.base_layer.weight"
            originals[name] = originals[name].to(device)


def _four_bit(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    weight = linear.weight.data.to(dtype).contiguous()
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.bias = linear.bias
    return layer.to(linear.weight.device)
