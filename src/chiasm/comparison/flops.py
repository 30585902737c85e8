"""FLOPs counted while code runs, forward and backward: by PyTorch's counter, and what it does not count or wrongly."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


@dataclass
class Counted:
    """FLOPs, once the stretch is over."""

    total: int = 0


@contextmanager
def counted() -> Iterator[Counted]:
    """Counts two FLOPs for each multiply-add of matrix products and convolutions inside."""
    found = Counted()
    with FlopCounterMode(display=False, custom_mapping=dict(FORMULAS)) as counter:
        yield found
    found.total = counter.get_total_flops()


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _convolution_backward(gradient: Shape, features: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    """As many as forward for the features' gradient, and again for the weights'; PyTorch forgets the groups."""
    transposed, (of_features, of_weight, *_bias) = rest[-4], rest[-1]
    places = prod((features if transposed else gradient)[2:])
    return 2 * gradient[0] * places * prod(weight) * (of_features + of_weight)


ATEN = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    ATEN.convolution_backward: _convolution_backward,
}
