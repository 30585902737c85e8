"""What the loaders of transformers' checkpoints share: names of a language model's parts, features, the processor."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from chiasm.data.chat import IMAGE_TOKEN
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.fusion.build import fusion_class
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop.weights import Table, assemble, read_weights
from chiasm.language.adapter import head_is_direct, load_tokenizer
from chiasm.sources.files import read_json
from chiasm.vision.encoder import load_vision
from chiasm.vision.features import VisionFeatures
from chiasm.vision.image_processor import image_processor_for
from chiasm.vision.towers import build_tower

DIRECT_HEAD = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}
"""Settings with which the heads of Gemma 2 and 3, Cohere, Granite and Falcon-H1 leave logits as they are."""

HEAD, TAIL = "{% set prompt %}", "{% endset %}"
"""Around a chat template whose text another tool's processor completes; what is behind says how that is left out."""

BEGUN = "{%- set gathered = namespace(messages=[]) -%}"
DONE = "{%- set messages = gathered.messages -%}{{ '' }}"
"""Around what stands in front of a chat template that would not read messages as another tool gives them."""


def unwrapped(template: Any) -> Any:
    """A chat template without what an export has put around it and in front of it."""
    if not isinstance(template, str):
        return template
    if template.startswith(HEAD) and TAIL in template:
        template = template.removeprefix(HEAD).rpartition(TAIL)[0]
    return template.partition(DONE)[2] if template.startswith(BEGUN) and DONE in template else template


def language_table(text_config: PreTrainedConfig, decoder: str, head: str) -> dict[str, str | None]:
    """Where a language model's decoder and head, which stand apart in the reference, are in ours."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(text_config)
    output = language.get_output_embeddings()
    path = next(name for name, module in language.named_modules() if module is output)
    inner: dict[str, str | None] = {decoder: f"language.{language.base_model_prefix}", head: f"language.{path}"}
    return inner | {"language_model.model": inner[decoder], "language_model.lm_head": inner[head]}


def table_of(parts: Table, text_config: PreTrainedConfig) -> dict[str, str | None]:
    """Names of a model's parts → ours, for files of any version: later ones have `model.` in front."""
    later = {f"model.{theirs}": ours for theirs, ours in parts.items()}
    language = language_table(text_config, "model.language_model", "lm_head")
    return {**parts, **later, "language_model": "language"} | language


def load_headed(
    source: str,
    describe: Callable[[Any], ChiasmConfig],
    table: Callable[[Any], Table],
    dtype: torch.dtype | str,
) -> EarlyFusionModel:
    """The model of a checkpoint whose image-text model has a head of its own, from its configuration and the names of
    its weights."""
    config = AutoConfig.from_pretrained(source)
    weights = _headed_weights(source, config.text_config)
    described = describe(config)
    model: Any = assemble(fusion_class(described), described, weights, table(config), dtype=dtype)
    finish(model, source)
    _require_direct_head(model)
    return model


def _headed_weights(source: str, text_config: PreTrainedConfig) -> dict[str, Tensor]:
    """A checkpoint's weights, for an image-text model whose own head has no bias: where the language model's has one
    (Phi, GPT-J), it is zero."""
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(text_config).get_output_embeddings()
    weights = read_weights(source)
    names = ("lm_head.bias", "language_model.lm_head.bias")
    if getattr(head, "bias", None) is not None and not any(name in weights for name in names):
        weights[names[0]] = torch.zeros(head.bias.shape)
    return weights


def text_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The language model's configuration as its image-text model uses it.

    Whether embeddings are tied is what the whole model says, and its own head neither scales nor caps logits.
    """
    return with_direct_head(config.text_config) | {"tie_word_embeddings": config.tie_word_embeddings}


def with_direct_head(config: PreTrainedConfig) -> dict[str, Any]:
    """A language model's settings, without what its own head does to logits."""
    settings = config.to_dict()
    return settings | {name: value for name, value in DIRECT_HEAD.items() if name in settings}


def describe_features(vision_config: PreTrainedConfig, wanted: dict[str, Any]) -> VisionFeatures:
    """The features of a tower that is not loaded yet."""
    with torch.device("meta"):
        return load_vision(build_tower(vision_config), wanted).features


def without_first(features: VisionFeatures) -> VisionFeatures:
    """The same features without each map's first token, be it a class token or a patch. What is left of patches then is
    one row of them, for it no longer fills a grid."""
    if all(layer.prefix_tokens == 1 for layer in features.layers):
        return features
    rows, columns = features.grid
    layers = tuple(
        replace(layer, grid=(1, layer.prefix_tokens + rows * columns - 1), prefix_tokens=1) for layer in features.layers
    )
    if len({layer.grid for layer in layers}) > 1:
        raise ValueError(f"feature layers of different lengths lose their first token: {[la.layer for la in layers]}")
    return replace(features, layers=layers, grid=layers[0].grid)


def _require_direct_head(model: FusionModel) -> None:
    """Refuses a language model that changes its logits behind the head, which its image-text model does not do."""
    if not model.config.direct_head:
        raise ValueError(
            f"the language model of type {model.language.config.model_type!r} changes logits behind its head, and the "
            "reference, which has a head of its own, does not; a setting for that is not known here"
        )


def finish(model: FusionModel, source: str) -> None:
    """What is known of a model once its weights are there, and the generation settings beside them."""
    model.config.direct_head = head_is_direct(model.language)
    try:
        model.generation_config = GenerationConfig.from_pretrained(source)
    except OSError:
        model.generation_config = GenerationConfig.from_model_config(model.config)


def has_processor(source: str) -> bool:
    """Whether a folder or hub id has the files of a tokenizer and of an image processor.

    Raises:
        ValueError: a file is damaged.
    """
    return _has_image_settings(source) and load_tokenizer(source) is not None


def _has_image_settings(source: str) -> bool:
    inside = (read_json(source, "processor_config.json") or {}).get("image_processor")
    return (read_json(source, "preprocessor_config.json") or inside) is not None


def load_processor(
    source: str,
    model: FusionModel,
    template: str | None = None,
    own_images: bool = False,
    kind: type[ChiasmProcessor] = ChiasmProcessor,
    **options: Any,
) -> ChiasmProcessor | None:
    """The processor beside a model, with the chat template of its reference; None where its files are missing.

    Args:
        template: a chat template, where the files hold none.
        own_images: whether the reference's image processor is kept, because Chiasm's has not what it does.
        kind: class of the processor.
        **options: of that class.
    """
    tokenizer = load_tokenizer(source) if _has_image_settings(source) else None
    if tokenizer is None:
        return None
    settings, _ = ChiasmProcessor.get_processor_dict(source)
    template = unwrapped(settings.get("chat_template") or tokenizer.chat_template) or template
    tokenizer.chat_template = _with_placeholder(template, options.get("image_token", IMAGE_TOKEN))
    images = AutoImageProcessor.from_pretrained(source) if own_images else image_processor_for(source, model.vision)
    return kind(images, tokenizer, num_image_tokens=model.num_image_tokens, **options)


def image_token(source: str) -> str:
    """The placeholder that a checkpoint's processor writes."""
    return (read_json(source, "processor_config.json") or {}).get("image_token") or IMAGE_TOKEN


def _with_placeholder(template: Any, token: str) -> Any:
    """A chat template, or several by name, that writes `<image>` for a picture."""
    if isinstance(template, dict):
        return {name: _with_placeholder(one, token) for name, one in template.items()}
    return template and template.replace(token, IMAGE_TOKEN)
