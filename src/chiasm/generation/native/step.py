"""A lean model's step through the compiled library: its tensors as the structures that `step.cpp` reads."""

import ctypes
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chiasm.generation.lean import ATTENTION, FEED_FORWARD, LeanLayer, LeanModel
from chiasm.generation.native.matrix import NUMBER, POINTER, MatrixStruct, address, describe
from chiasm.generation.slots import Slots

REAL = ctypes.c_float
MATRICES = (*ATTENTION, *FEED_FORWARD)
NORMS = ("attention_norm", "feed_forward_norm", "q_norm", "k_norm", "after_attention", "after_feed_forward")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, MatrixStruct) for name in MATRICES),
        *((name, POINTER) for name in (*NORMS, "keys", "values", "rotation")),
        ("window", NUMBER),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER),
        ("norm", POINTER),
        ("head", MatrixStruct),
        *((name, NUMBER) for name in ("width", "heads", "kv_heads", "head_dim", "inner")),
        *((name, NUMBER) for name in ("slot_stride", "head_stride", "gelu")),
        ("eps", REAL),
        ("scale", REAL),
    ]


class NativeStep:
    """Layers and head on rows of hidden states; keys and values go into the slots, which must be float32."""

    def __init__(self, lean: LeanModel, library: ctypes.CDLL) -> None:
        self.lean, self._call = lean, library.chiasm_step
        self._call.restype = None
        self._call.argtypes = [
            *(POINTER, NUMBER, NUMBER, POINTER, NUMBER),
            *(POINTER, POINTER, POINTER, POINTER, NUMBER, NUMBER),
        ]
        self._layers = (_Layer * len(lean.layers))(*map(_layer, lean.layers))
        self._model = _Model(
            ctypes.addressof(self._layers),
            lean.norm.data_ptr(),
            describe(lean.head),
            lean.norm.shape[0],
            lean.heads,
            lean.kv_heads,
            lean.head_dim,
            lean.layers[0].gate.rows,
            gelu=int(lean.gelu),
            eps=lean.eps,
            scale=lean.scale,
        )
        self._store: Tensor | None = None
        self._rotations: dict[str, Tensor] = {}

    def run(
        self,
        slots: Slots,
        first: int,
        last: int,
        hidden: Float[Tensor, "rows D_l"],
        rows: Int[Tensor, " rows"],
        positions: Int[Tensor, " rows"],
        angles: Int[Tensor, " rows"],
        told: int = 0,
    ) -> Float[Tensor, "told V"]:
        """Layers `first` to `last`, which change `hidden` in place, and the logits of the last `told` rows.

        Args:
            rows: the slot of each row; several tokens of one slot are in their order.
            angles: what rotations turn by: positions, or what is counted behind a picture's rows and columns.
        """
        if self._store is not slots.store:
            self._bind(slots)
        logits = torch.empty(told, self.lean.head.rows)
        self._call(
            ctypes.addressof(self._model),
            first,
            last,
            hidden.data_ptr(),
            hidden.shape[0],
            rows.data_ptr(),
            positions.data_ptr(),
            angles.data_ptr(),
            logits.data_ptr(),
            told,
            torch.get_num_threads(),
        )
        return logits

    def _bind(self, slots: Slots) -> None:
        """Where keys, values and rotations are, after the slots have grown."""
        store = slots.store
        self._rotations = {
            kind: self.lean.rotation(kind, slots.capacity) for kind in {x.kind for x in self.lean.layers}
        }
        self._model.slot_stride, self._model.head_stride = store.stride(2), store.stride(3)
        for layer, lean, (keys, values) in zip(self._layers, self.lean.layers, store, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            layer.rotation = self._rotations[lean.kind].data_ptr()
        self._store = store


def _layer(layer: LeanLayer) -> Any:
    norms = {name: address(getattr(layer, name)) for name in NORMS}
    return _Layer(**{name: describe(getattr(layer, name)) for name in MATRICES}, **norms, window=layer.window)
