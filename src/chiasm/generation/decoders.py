"""Which decoder suits a model: found out by comparing its logits with the model's own, without a table of families."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chiasm.fusion.base import FusionModel
from chiasm.fusion.early import EarlyFusionModel
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.fusion.packed import PackedFusionModel
from chiasm.fusion.tiled import TiledFusionModel
from chiasm.fusion.unified import UnifiedModel
from chiasm.generation.batched import BatchedDecoder
from chiasm.generation.lean import ROTATIONS, lean_model, release, rotations
from chiasm.generation.lean_decoder import LeanDecoder
from chiasm.generation.native.build import absence, library
from chiasm.generation.native.step import NativeStep
from chiasm.generation.packed import WEIGHTS
from chiasm.generation.packed_linear import PackedLinear
from chiasm.generation.pictures import PictureCache
from chiasm.generation.prefix_cache import PrefixCache
from chiasm.generation.sequential import SequentialDecoder
from chiasm.generation.slots import CacheShape, Slots
from chiasm.generation.torch_step import TorchStep
from chiasm.language.adapter import vocabulary

SHORT = 48
"""Tokens of a prompt that are read faster by the compiled step than by the model."""
SIMILAR = {"float32": 0.99999, "int8": 0.99, "int4": 0.9}
"""How similar (cosine) a lean step's logits must be to the model's own."""
SHARING = (EarlyFusionModel, IntermediateFusionModel, TiledFusionModel, UnifiedModel, PackedFusionModel)
"""Fusions whose requests can share a step; encoder-decoders cannot."""
STEADY = {*ROTATIONS, "proportional", "none"}
"""Rotary embeddings with which requests can share a step; the frequencies of others depend on the longest of them."""
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)
"""What a forward raises that is not made for rows of different lengths."""


@torch.inference_mode()
def make_decoder(
    model: FusionModel,
    count: int,
    pictures: PictureCache,
    prefixes: PrefixCache,
    weights: str = "float32",
    releases: bool = False,
) -> Any:
    """The fastest decoder whose logits are the model's.

    Args:
        count: requests that it takes together.
        weights: one of `chiasm.generation.packed.WEIGHTS`.
        releases: whether packed weights take the place of the model's own.

    Raises:
        ValueError: unknown weights, or none that could take that place.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}, expected one of {', '.join(WEIGHTS)}")
    if releases and weights == "float32":
        raise ValueError("release=True leaves packed weights only, but weights='float32'; take 'int8' or 'int4'")
    if (left := next((m for m in model.language.modules() if isinstance(m, PackedLinear)), None)) is not None:
        left.of_kind(weights)
    lacking = weights != "float32" and model.device.type == "cpu" and library() is None
    made = _made(model, count, pictures, prefixes, "float32" if lacking and left is None else weights)
    packs = isinstance(made, LeanDecoder) and not lacking
    if releases and packs:
        release(model.language, made.lean_step.lean)
    if weights != "float32" and not packs:
        reason = f"need the compiled step, and {absence()}" if lacking else "are for Llama-shaped models on a CPU"
        kind = type(model.language).__name__
        warnings.warn(f"weights={weights!r} {reason}; {kind} keeps its own", stacklevel=3)
    return made


def _made(model: FusionModel, count: int, pictures: PictureCache, prefixes: PrefixCache, weights: str) -> Any:
    shape = _cache_shape(model)
    if shape is None:
        return SequentialDecoder(model, pictures)
    expected, none = _expected(model), (PictureCache(model, 0), PrefixCache(0))
    found = _steps(BatchedDecoder(model, Slots(shape, 2), *none))
    if not _similar(found, expected, SIMILAR["float32" if shape.dtype == torch.float32 else "int8"]):
        return SequentialDecoder(model, pictures)
    step, exact = _lean_step(model, weights, shape.dtype), replace(shape, dtype=torch.float32)
    if step is not None:
        short = SHORT if isinstance(step, NativeStep) else 1
        found = _steps(LeanDecoder(model, Slots(exact, 2), *none, step, short))
        if _similar(found, expected, SIMILAR[weights]):
            return LeanDecoder(model, Slots(exact, count), pictures, prefixes, step, short)
    return BatchedDecoder(model, Slots(shape, count), pictures, prefixes)


def _lean_step(model: FusionModel, weights: str, dtype: torch.dtype) -> NativeStep | TorchStep | None:
    """A step on bare tensors, where the model has such a shape; in full precision only if it is float32 already, and
    with packed weights only where it is compiled."""
    compiled, packed = library(), weights != "float32"
    if model.device.type != "cpu" or (compiled is None if packed else dtype != torch.float32):
        return None
    lean = lean_model(model.language, weights)
    if lean is None:
        return None
    return TorchStep(lean) if compiled is None else NativeStep(lean, compiled)


def _cache_shape(model: FusionModel) -> CacheShape | None:
    """The shape of the language model's cache; None where slots cannot hold it."""
    language = model.language
    if type(model) not in SHARING or language.config._attn_implementation not in ("sdpa", "eager"):
        return None
    if not rotations(language.config.get_text_config()) <= STEADY:
        return None
    if isinstance(model, IntermediateFusionModel) and not model.cross_attention.settings.mask_attention:
        return None
    output = language(input_ids=_tokens(model), use_cache=True)
    layers = getattr(output.cache, "layers", [])
    shapes = {getattr(layer, name, torch.empty(0)).shape for layer in layers for name in ("keys", "values")}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        return None
    _, heads, _, size = layers[0].keys.shape
    return CacheShape(len(layers), heads, size, layers[0].keys.dtype, model.device)


def _tokens(model: FusionModel) -> Int[Tensor, "1 S"]:
    size = vocabulary(model.language)
    return torch.arange(size // 4, size // 4 + 7, device=model.device)[None]


LENGTHS = (6, 3)
"""Tokens that the rows of a trial have before their step."""


def _expected(model: FusionModel) -> Float[Tensor, "rows V"]:
    return model.language(input_ids=_tokens(model), use_cache=False).logits[0, list(LENGTHS)]


def _steps(decoder: BatchedDecoder) -> Float[Tensor, "rows V"] | None:
    """Logits of two rows of different lengths that take a step together; None where they cannot."""
    ids = _tokens(decoder.model)
    embeddings, places = decoder.model.get_input_embeddings()(ids), torch.arange(ids.shape[1], device=ids.device)[None]
    try:
        rows = [decoder.slots.take(ids.shape[1]) for _ in LENGTHS]
        for row, length in zip(rows, LENGTHS, strict=True):
            decoder.forward([row], embeddings[:, :length], places[:, :length], None)
        steps = torch.cat([embeddings[:, length] for length in LENGTHS])[:, None]
        return decoder.forward(rows, steps, torch.tensor(LENGTHS, device=ids.device)[:, None], None)
    except FAILURES:
        return None


def _similar(found: Tensor | None, expected: Tensor, least: float) -> bool:
    if found is None or found.shape != expected.shape:
        return False
    return bool((torch.cosine_similarity(found.float(), expected.float()) >= least).all())
