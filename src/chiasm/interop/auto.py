"""Chiasm's classes for transformers' Auto classes: `import chiasm.interop.auto`, then `AutoModelForImageTextToText`.

`import chiasm` alone stays light and registers nothing. Our models have no body apart from their head, so that
`AutoModel` gives the whole model. `AutoModelForCausalLM` is for texts alone and gives none, as of transformers' own
image-text models; the language model of one is `model.language`.
"""

from typing import Any

from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from chiasm.data.captions import CaptionProcessor
from chiasm.data.instruction import InstructionProcessor
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.tiles import TiledProcessor
from chiasm.data.unified import UnifiedProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.fusion.early_seq2seq import EarlySeq2SeqModel
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.packed import PackedFusionModel
from chiasm.fusion.qformer_retrieval import QFormerRetrieval
from chiasm.fusion.tiled import TiledFusionModel
from chiasm.fusion.unified import UnifiedModel

GENERATIVE: Any = (
    EarlyFusionModel,
    EarlySeq2SeqModel,
    IntermediateFusionModel,
    PackedFusionModel,
    TiledFusionModel,
    UnifiedModel,
)
"""One of these is taken by the name in the configuration's `architectures`."""

RETRIEVAL: tuple[Any, ...] = (LateFusionModel, QFormerRetrieval)

for _auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(ChiasmConfig, GENERATIVE, exist_ok=True)
AutoProcessor.register(ChiasmConfig, ChiasmProcessor, exist_ok=True)
for _kind in (InstructionProcessor, TiledProcessor, UnifiedProcessor):  # found by the name in the folder
    AutoProcessor.register(type(f"{_kind.__name__}Config", (ChiasmConfig,), {}), _kind, exist_ok=True)
for _kind in RETRIEVAL:
    AutoModel.register(_kind.config_class, _kind, exist_ok=True)
    AutoProcessor.register(_kind.config_class, CaptionProcessor, exist_ok=True)
