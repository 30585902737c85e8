"""Which checkpoints `chiasm.load` reads: Chiasm's own, and transformers' by exact name."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

import chiasm.interop.auto  # noqa: F401  (registers our classes with transformers)
from chiasm.data.captions import CaptionProcessor
from chiasm.data.instruction import InstructionProcessor
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.tiles import TiledProcessor
from chiasm.data.unified import UnifiedProcessor
from chiasm.fusion.base import FusionModel
from chiasm.fusion.build import fusion_class
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.qformer_retrieval import QFormerRetrieval
from chiasm.fusion.sequence import PositionedModel
from chiasm.fusion.tiled import TiledFusionModel
from chiasm.interop.blip2 import load_blip2
from chiasm.interop.blip2_retrieval import load_blip2_retrieval
from chiasm.interop.chameleon import load_chameleon
from chiasm.interop.clip import load_clip, load_siglip
from chiasm.interop.fuyu import load_fuyu
from chiasm.interop.idefics import load_idefics
from chiasm.interop.idefics2 import load_idefics2
from chiasm.interop.idefics3 import load_idefics3
from chiasm.interop.internvl import load_internvl
from chiasm.interop.llava import load_llava
from chiasm.interop.llava_next import load_llava_next
from chiasm.interop.paligemma import load_paligemma
from chiasm.interop.parts import has_processor
from chiasm.interop.qwen2_vl import load_qwen2_vl
from chiasm.training.card_metadata import SOURCES

Retrieval = TypeVar("Retrieval", LateFusionModel, QFormerRetrieval)


def _load_chiasm(source: str, dtype: torch.dtype | str) -> tuple[FusionModel, ChiasmProcessor | None]:
    family = fusion_class(ChiasmConfig.from_pretrained(source))
    model = complete(family, source, dtype)
    kind: Any = InstructionProcessor if model.reads_instruction else ChiasmProcessor
    kind = UnifiedProcessor if isinstance(model, PositionedModel) else kind
    kind = TiledProcessor if isinstance(model, TiledFusionModel) else kind
    if not has_processor(source):
        return model, None
    processor = kind.from_pretrained(source)
    processor.encoder_decoder = model.config.is_encoder_decoder  # files from before the option do not say it
    return model, processor


def complete(family: Any, source: str, dtype: torch.dtype | str) -> Any:
    """The model, with every weight from the folder and none left over."""
    model, info = family.from_pretrained(source, dtype=dtype, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"{source} does not hold this model's weights: {len(wrong)} keys differ, first {wrong[0]}")
    return model.eval()


def _load_retrieval(
    kind: type[Retrieval], source: str, dtype: torch.dtype | str
) -> tuple[Retrieval, CaptionProcessor | None]:
    model = complete(kind, source, dtype)
    return model, CaptionProcessor.from_pretrained(source) if has_processor(source) else None


LOADERS = {
    "chiasm": _load_chiasm,
    "blip-2": load_blip2,
    "chameleon": load_chameleon,
    "fuyu": load_fuyu,
    "idefics": load_idefics,
    "idefics2": load_idefics2,
    "idefics3": load_idefics3,
    "instructblip": load_blip2,
    "internvl": load_internvl,
    "llava": load_llava,
    "llava_next": load_llava_next,
    "paligemma": load_paligemma,
    "qwen2_vl": load_qwen2_vl,
    "smolvlm": load_idefics3,
}

RETRIEVAL_LOADERS: dict[str, Callable[..., Any]] = {
    "Blip2ForImageTextRetrieval": load_blip2_retrieval,
    "chiasm_late": partial(_load_retrieval, LateFusionModel),
    "chiasm_qformer_retrieval": partial(_load_retrieval, QFormerRetrieval),
    "clip": load_clip,
    "siglip": load_siglip,
}
"""By `model_type`, or by architecture where transformers has one type for both."""

OWN = ("chiasm", "chiasm_late", "chiasm_qformer_retrieval")
"""Model types of Chiasm's own checkpoints, whose configurations tell where their parts came from."""


def name_parts(model: Any, source: str) -> None:
    """Tells the parts' configurations that they came from this checkpoint, which a model card then names."""
    for name in SOURCES:
        if (part := getattr(model.config, name, None)) is not None:
            part._name_or_path = source
