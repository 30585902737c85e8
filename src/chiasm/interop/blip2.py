"""BLIP-2 (arXiv 2301.12597) and InstructBLIP (arXiv 2305.06500) checkpoints of transformers → Chiasm's own parts."""

from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from chiasm.data.instruction import InstructionProcessor
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.build import fusion_class
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop.parts import has_processor, unwrapped
from chiasm.interop.weights import Table, assemble, read_weights
from chiasm.language.adapter import head_is_direct
from chiasm.sources.files import find_file
from chiasm.vision.features import FeatureLayer, VisionFeatures
from chiasm.vision.image_processor import image_processor_for

QFORMER_TOKENIZER = "qformer_tokenizer"


BLIP2_TURN, INSTRUCTBLIP_TURN = "Question: WORDS Answer:", "WORDS"
SAID = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' }}WORDS{{ ' ' }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% if loop.first %}BEGIN{% endif %}TURN{% endif %}{% endfor %}END"
)
"""Pictures stand before the beginning of text, as in these models' training."""


def load_blip2(source: str, dtype: torch.dtype | str = "auto") -> tuple[EarlyFusionModel, ChiasmProcessor | None]:
    """Model and processor of a BLIP-2 or InstructBLIP folder or hub id; no processor where its files are missing."""
    config = AutoConfig.from_pretrained(source)
    if config.image_token_index is None:
        raise ValueError(f"{source} has no image_token_index in its config.json; save it again with transformers 4.46+")
    if config.qformer_config.hidden_act != "gelu":
        raise ValueError(f"this Q-Former uses {config.qformer_config.hidden_act!r}; Chiasm's has gelu")
    text = config.text_config
    if getattr(text, "word_embed_proj_dim", text.hidden_size) != text.hidden_size:
        raise ValueError(
            f"text_config.word_embed_proj_dim in {source} is {text.word_embed_proj_dim}, expected the hidden_size "
            f"{text.hidden_size}: visual tokens have that width, and word embeddings must have it too; take another OPT"
        )
    ours = ChiasmConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict(),
        connector=qformer_settings(config),
        features=all_tokens(config.vision_config).to_dict(),
        image_token_id=config.image_token_index,
        dtype=config.dtype,
        part_dtypes=_part_dtypes(config) if dtype == "auto" else None,
    )
    model = assemble(fusion_class(ours), ours, read_weights(source), blip2_table(config), dtype=dtype)
    model.config.direct_head = not ours.is_encoder_decoder and head_is_direct(model.language)
    model.generation_config = model.language.generation_config
    return model, _processor(source, model)


def blip2_table(config: PreTrainedConfig) -> Table:
    """BLIP-2's and InstructBLIP's names → ours."""
    instruction = config.model_type == "instructblip"
    names = qformer_names(config.qformer_config.num_hidden_layers, has_text=instruction, instruction=instruction)
    table = {theirs: None if new is None else f"connector.{new}" for theirs, new in names.items()}
    return table | {
        "vision_model": "vision.model",
        "language_model": "language",
        "language_projection": "connector.proj",
    }


def _part_dtypes(config: PreTrainedConfig) -> dict[str, str] | None:
    """BLIP-2's Q-Former stays in float32 where the rest is in float16."""
    if config.model_type != "blip-2" or config.dtype != torch.float16:
        return None
    return {"vision": "float16", "connector": "float32", "language": "float16"}


def _processor(source: str, model: EarlyFusionModel) -> ChiasmProcessor | None:
    if not has_processor(source):
        return None
    words = AutoTokenizer.from_pretrained(source)
    reader = None
    if model.connector.instruction:
        if find_file(source, f"{QFORMER_TOKENIZER}/tokenizer_config.json") is None:
            return None
        reader = AutoTokenizer.from_pretrained(source, subfolder=QFORMER_TOKENIZER)
    answers = model.config.is_encoder_decoder
    written = {
        "TURN": BLIP2_TURN if reader is None else INSTRUCTBLIP_TURN,
        "BEGIN": "" if answers else "{{ bos_token }}",
        "END": "{{ eos_token }}" if answers else "",
        "WORDS": SAID,
    }
    template = CHAT_TEMPLATE
    for name, text in written.items():
        template = template.replace(name, text)
    words.chat_template = unwrapped(words.chat_template) or template
    images = image_processor_for(source, model.vision)
    if reader is None:
        return ChiasmProcessor(images, words, num_image_tokens=model.num_image_tokens, encoder_decoder=answers)
    tokens = model.num_image_tokens
    return InstructionProcessor(images, words, reader, num_image_tokens=tokens, encoder_decoder=answers)


def qformer_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The connector's settings; patch features are normalised by the vision encoder already."""
    qformer = config.qformer_config
    has_text = config.model_type == "instructblip" or qformer.use_qformer_text_input
    return {
        "name": "qformer",
        "num_queries": config.num_query_tokens,
        "width": qformer.hidden_size,
        "depth": qformer.num_hidden_layers,
        "heads": qformer.num_attention_heads,
        "cross_attention_every": qformer.cross_attention_frequency,
        "feed_forward": qformer.intermediate_size,
        "vocabulary": qformer.vocab_size if has_text else None,
        "max_positions": qformer.max_position_embeddings,
        "instruction": config.model_type == "instructblip",
        "norm_features": False,
        "eps": qformer.layer_norm_eps,
        "dropout": qformer.hidden_dropout_prob,
    }


def all_tokens(vision: PreTrainedConfig) -> VisionFeatures:
    """The normalised last layer with its class token, which the Q-Former reads beside the patches."""
    size, patch = vision.image_size, vision.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    grid = (height // rows, width // columns)
    return VisionFeatures((FeatureLayer("last", grid, 1),), grid, vision.hidden_size, (height, width), prefix="keep")


ATTENTION = {
    "attention.query": "query",
    "attention.key": "key",
    "attention.value": "value",
    "output.dense": "output",
    "output.LayerNorm": "norm",
}


def qformer_names(depth: int, has_text: bool, instruction: bool = False) -> dict[str, str | None]:
    """The reference's names of Q-Former tensors → those of `chiasm.connectors.qformer`.

    Args:
        has_text: whether the checkpoint has a text branch.
        instruction: whether it is InstructBLIP's, whose last text feed-forward is never read.
    """
    names: dict[str, str | None] = {"query_tokens": "queries"}
    if instruction:
        names |= {"qformer.embeddings.layernorm": "norm"}
        names |= under("qformer.embeddings.", WORDS, "")
    else:
        names |= {"qformer.layernorm": "norm"}
        if has_text:
            names |= under("embeddings.", WORDS, "")
    for index in range(depth):
        theirs, ours = f"qformer.encoder.layer.{index}.", f"blocks.{index}."
        names |= under(f"{theirs}attention.", ATTENTION, f"{ours}self_attention.")
        names |= under(f"{theirs}crossattention.", ATTENTION, f"{ours}cross_attention.")
        names |= _feed_forward(theirs, "_query", f"{ours}query_feed_forward.")
        if has_text:
            read = not (instruction and index == depth - 1)
            names |= _feed_forward(theirs, "", f"{ours}text_feed_forward." if read else None)
    return names


WORDS = {"word_embeddings": "words", "position_embeddings": "positions"}


def _feed_forward(theirs: str, kind: str, ours: str | None) -> dict[str, str | None]:
    parts = {f"intermediate{kind}.dense": "up", f"output{kind}.dense": "down", f"output{kind}.LayerNorm": "norm"}
    return {theirs + name: None if ours is None else ours + new for name, new in parts.items()}


def under(prefix: str, names: dict[str, str], ours: str) -> dict[str, str | None]:
    """The table of a module that is found below a prefix in the checkpoint and below another in our model."""
    return {prefix + name: ours + new for name, new in names.items()}
