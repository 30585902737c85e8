"""A packed matrix as the structure that `step.cpp` reads, and its rows in float32."""

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.generation.packed import WEIGHTS, Packed

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


class MatrixStruct(ctypes.Structure):
    """`Matrix` in `step.cpp`."""

    _fields_ = [
        *((name, POINTER) for name in ("data", "scales", "minima", "bias", "down", "up")),
        *((name, NUMBER) for name in ("kind", "rows", "columns", "rank")),
    ]


def describe(packed: Packed) -> Any:
    """The structure, which is good for as long as the matrix lives."""
    parts = (packed.data, packed.scales, packed.minima, packed.bias, packed.down, packed.up)
    rank = 0 if packed.down is None else len(packed.down)
    return MatrixStruct(*map(address, parts), WEIGHTS.index(packed.kind), packed.rows, packed.columns, rank)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def unpack(library: ctypes.CDLL, packed: Packed, start: int, stop: int) -> Float[Tensor, "rows columns"]:
    """Rows `start` to `stop` of an int8 or int4 matrix in float32."""
    rows, matrix, call = torch.empty(stop - start, packed.columns), describe(packed), library.chiasm_unpack
    call.restype, call.argtypes = None, [POINTER, NUMBER, NUMBER, POINTER, NUMBER]
    call(ctypes.addressof(matrix), start, stop, rows.data_ptr(), torch.get_num_threads())
    if packed.up is None or packed.down is None:
        return rows
    return rows.addmm_(packed.up[start:stop].float(), packed.down.float())
