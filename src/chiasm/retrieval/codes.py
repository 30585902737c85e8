"""Rows as 8-bit codes that are scanned with integer arithmetic, and a bound on how far such a score can be off.

Rows are centred and rotated by a random orthogonal matrix, so that no coordinate stands out, and rounded to 8 bits with
one step a row; queries are rounded to 7 bits. The product of the integers is exact, so with q = q' + e and x = x' + f

    |q·x - q'·x'| = |q'·f + e·x| <= |q'| |f| + |e| |x|

by Cauchy-Schwarz. The norms are measured, not estimated: what the bound excludes is certainly not among the nearest.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

GROUP = 32
"""Rows whose best score is looked at first."""
LEVELS_OF_A_ROW, LEVELS_OF_A_QUERY = 127, 63
ROUNDING = 1e-5
"""What the rotation and float32 sums may add, relative to the norms."""
CHUNK = 16_384


def supported() -> bool:
    """Whether this processor and this PyTorch have the kernel, and its sums of integers are exact."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (64, 96), generator=generator, dtype=torch.int8)
    codes[0], query = 127, torch.full((1, 96), 63.0)
    try:
        found = _products(query, _pack(codes, torch.ones(64)))
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(found, query @ codes.float().T)


class Codes:
    """Codes of rows of one snapshot. Rows are vectors: a picture has K of them, one after the other.

    Args:
        chunks: the rows in order, in pieces.
        count: rows in all.
    """

    def __init__(self, chunks: Any, count: int, width: int, mean: Float[Tensor, " D"]) -> None:
        normal = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        self.rotation, self.count, self.mean = torch.linalg.qr(normal)[0], count, mean
        padded = -(-count // GROUP) * GROUP
        codes, steps = torch.zeros(padded, width, dtype=torch.int8), torch.ones(padded)
        self.largest, self.error, start = 0.0, 0.0, 0
        for chunk in chunks:
            for rows in chunk.split(CHUNK):
                turned = (rows - mean) @ self.rotation
                step = turned.abs().amax(dim=1).clamp(min=1e-30) / LEVELS_OF_A_ROW
                levels = (turned / step[:, None]).round()
                here = slice(start, start + len(rows))
                codes[here], steps[here], start = levels.to(torch.int8), step, start + len(rows)
                self.largest = max(self.largest, turned.norm(dim=1).max().item())
                self.error = max(self.error, (turned - levels * step[:, None]).norm(dim=1).max().item())
        self.packed = _pack(codes, steps)

    def scan(self, queries: Float[Tensor, "B D"]) -> "Scores":
        """Scores of all rows."""
        turned = queries @ self.rotation
        step = turned.abs().amax(dim=1).clamp(min=1e-30) / LEVELS_OF_A_QUERY
        exact = turned / step[:, None]
        levels = exact.round()
        scores = _products(levels, self.packed)
        scores[:, self.count :] = -torch.inf
        error, size = (exact - levels).norm(dim=1), exact.norm(dim=1)
        bound = (size + error) * self.error + error * self.largest
        return Scores(scores, bound + ROUNDING * size * self.largest, step, queries @ self.mean)


@dataclass(frozen=True)
class Scores:
    """Scores of rows by their codes: products of vectors, but for a constant and a factor of each query.

    `values` are padded to a multiple of `GROUP` rows with -inf; none is off by more than `bound`.
    """

    values: Float[Tensor, "B rows"]
    bound: Float[Tensor, " B"]
    factor: Float[Tensor, " B"]
    constant: Float[Tensor, " B"]

    def least(self, product: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The lowest value that a row with this product of vectors can have."""
        return (product - self.constant) / self.factor - self.bound


def _pack(codes: Tensor, steps: Tensor) -> Any:
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are announced to go; `supported` notices when they are gone
        zeros = torch.zeros(len(codes), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(codes, steps.double(), zeros, 0)
        try:
            torch.backends.quantized.engine = "fbgemm"
            return torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = engine


def _products(levels: Float[Tensor, "B D"], packed: Any) -> Float[Tensor, "B rows"]:
    """Sums of integers times each row's step. A last query with both ends of the range pins the kernel's step to 1."""
    ends = torch.zeros(1, levels.shape[1])
    ends[0, 0], ends[0, -1] = -LEVELS_OF_A_QUERY, LEVELS_OF_A_QUERY + 1
    return torch.ops.quantized.linear_dynamic(torch.cat([levels, ends]), packed, True)[:-1]
