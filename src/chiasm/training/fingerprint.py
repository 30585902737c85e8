"""What tells two runs apart: digests of weights, data and recipe."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.data.schema import Sample
from chiasm.training.sharding import local

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest(tensor: Tensor) -> tuple[int, int]:
    """Two 64-bit sums over a tensor's bits, the second weighted by position; computed where the tensor is.

    Fast rather than cryptographic: one pass at memory speed, to notice any change that training makes. Of a sharded
    tensor this process's part counts.
    """
    bits = local(tensor.detach()).contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    plain = weighted = 0
    for start in range(0, bits.numel(), 1 << 22):
        chunk = bits[start : start + (1 << 22)].long()
        place = torch.arange(start + 1, start + 1 + chunk.numel(), device=chunk.device)
        plain += int(chunk.sum())
        weighted += int((chunk * place).sum())
    return plain, weighted


def model_fingerprint(model: nn.Module) -> str:
    """Of all weights and buffers, by name."""
    digester = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digester.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest(tensor)}\n".encode())
    return digester.hexdigest()


def sample_fingerprint(sample: Sample) -> bytes:
    """Of what a sample says and of the names of its pictures."""
    said = json.dumps([sample.id, sample.messages, [ref.name for ref in sample.images]], ensure_ascii=False)
    return hashlib.sha256(said.encode()).digest()


def differences(before: Any, after: Any, at: str = "") -> list[str]:
    """Paths at which two nested plain values differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line for key in keys for line in differences(before.get(key), after.get(key), f"{at}.{key}".lstrip("."))
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line
            for index, (one, other) in enumerate(zip(before, after, strict=True))
            for line in differences(one, other, f"{at}.{_name(one, index)}")
        ]
    return [] if before == after else [f"{at} was {_short(before)}, is {_short(after)}"]


def _name(value: Any, index: int) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(index)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
