"""`Blip2ForImageTextRetrieval` of transformers → Chiasm's retrieval model (BLIP-2, arXiv 2301.12597)."""

import torch
from transformers import AutoConfig, AutoTokenizer

from chiasm.data.captions import CaptionProcessor
from chiasm.fusion.qformer_heads import TEMPERATURE
from chiasm.fusion.qformer_retrieval import QFormerRetrieval
from chiasm.fusion.retrieval_config import QFormerRetrievalConfig
from chiasm.interop.blip2 import all_tokens, qformer_names, qformer_settings
from chiasm.interop.parts import has_processor
from chiasm.interop.weights import assemble, read_weights
from chiasm.vision.image_processor import image_processor_for

HEADS = {
    "vision_model": "vision.model",
    "vision_projection": "connector.image_projection",
    "text_projection": "connector.text_projection",
    "itm_head": "connector.matching_head",
    "temperature": "connector.temperature",
}


def load_blip2_retrieval(
    source: str, dtype: torch.dtype | str = "auto"
) -> tuple[QFormerRetrieval, CaptionProcessor | None]:
    """Model and processor of a folder or hub id; no processor where its files are missing.

    The checkpoint has no language-modelling head and no temperature; the latter starts anew. Its Q-Former stays in
    float32 where the rest is in float16, as in transformers.
    """
    config = AutoConfig.from_pretrained(source)
    qformer, half = config.qformer_config, config.dtype == torch.float16
    ours = QFormerRetrievalConfig(
        vision_config=config.vision_config.to_dict(),
        features=all_tokens(config.vision_config).to_dict(),
        connector=qformer_settings(config),
        space=config.image_text_hidden_size,
        generation=False,
        dtype=config.dtype,
        part_dtypes={"vision": "float16", "connector": "float32"} if half and dtype == "auto" else None,
    )
    names = qformer_names(qformer.num_hidden_layers, has_text=True)
    table = {theirs: None if new is None else f"connector.{new}" for theirs, new in names.items()} | HEADS
    weights = {"temperature": torch.tensor(TEMPERATURE), **read_weights(source)}
    model = assemble(QFormerRetrieval, ours, weights, table, dtype=dtype)
    if not has_processor(source):
        return model, None
    tokenizer, longest = AutoTokenizer.from_pretrained(source), qformer.max_position_embeddings
    return model, CaptionProcessor(image_processor_for(source, model.vision), tokenizer, text_length=longest)
