"""Tensors of which every process holds a part."""

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Sharded ones and whole ones apart, which no operation takes together."""
    given = list(tensors)
    kinds = [[tensor for tensor in given if isinstance(tensor, DTensor) == sharded] for sharded in (True, False)]
    return [kind for kind in kinds if kind]
