"""LLaVA checkpoints of transformers → Chiasm's early fusion, with equal logits (arXiv 2310.03744)."""

import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.language.adapter import head_is_direct
from chiasm.vision.encoder import load_vision
from chiasm.vision.image_processor import image_processor_for


def from_llava(llava: LlavaForConditionalGeneration) -> EarlyFusionModel:
    """The same model in Chiasm's parts; tensors are shared, not copied."""
    config = llava.config
    if config.projector_hidden_act != "gelu":
        raise ValueError(f"this LLaVA projector uses {config.projector_hidden_act!r}; Chiasm's mlp has gelu")
    layers = config.vision_feature_layer
    features = {"layers": [layers] if isinstance(layers, int) else list(layers)}
    vision = load_vision(llava.model.vision_tower, features=features)
    keeps_class_token = config.vision_feature_select_strategy == "full"
    if keeps_class_token and any(layer.prefix_tokens for layer in vision.features.layers):
        raise ValueError("this LLaVA keeps the class token (vision_feature_select_strategy: full), which Chiasm drops")
    language = AutoModelForCausalLM.from_config(config.text_config, dtype=llava.dtype)
    language.base_model.load_state_dict(llava.model.language_model.state_dict(), assign=True)
    language.get_output_embeddings().weight = llava.lm_head.weight
    ours = ChiasmConfig(
        vision_config=vision.model.config.to_dict(),
        text_config=language.config.to_dict(),
        connector={"name": "mlp", "depth": 2, "width": None, "bias": config.multimodal_projector_bias},
        features=vision.features.to_dict(),
        image_token_id=config.image_token_id,
        direct_head=head_is_direct(language),
        dtype=llava.dtype,
    )
    model = EarlyFusionModel(ours, vision=vision, language=language)
    projector = llava.model.multi_modal_projector
    model.get_submodule("connector.layers.0").load_state_dict(projector.linear_1.state_dict(), assign=True)
    model.get_submodule("connector.layers.1").load_state_dict(projector.linear_2.state_dict(), assign=True)
    model.generation_config = llava.generation_config
    return model.eval()


def load_llava(source: str, dtype: torch.dtype | str = "auto") -> tuple[EarlyFusionModel, ChiasmProcessor | None]:
    """Model and processor of a LLaVA folder or hub id; no processor where its files are missing."""
    model = from_llava(LlavaForConditionalGeneration.from_pretrained(source, dtype=dtype))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):
        return model, None
    images = image_processor_for(source, model.vision)
    return model, ChiasmProcessor(images, tokenizer, num_image_tokens=model.num_image_tokens)
