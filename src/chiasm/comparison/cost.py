"""What a picture costs, in closed form: parameters by part, visual tokens, FLOPs and KV-cache bytes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils.flop_counter import FlopCounterMode

from chiasm.comparison.seq2seq_cost import LanguageCost, seq2seq_cost
from chiasm.fusion.base import FusionModel
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.fusion.packed import PackedFusionModel
from chiasm.fusion.tiled import TiledFusionModel
from chiasm.fusion.unified import UnifiedModel
from chiasm.language.adapter import layers
from chiasm.vision.encoder import VisionEncoder
from chiasm.vision.features import Grid

PARTS = ("vision", "connector", "language", "cross_attention")


@dataclass(frozen=True)
class Cost:
    """Costs of one prompt; FLOPs count two for each multiply-add of matrix products and convolutions.

    Args:
        parameters: of each part.
        visual_tokens: of all its pictures.
        sequence: places in the language model's sequence.
        encode_flops: of the vision encoder.
        connect_flops: of the connector.
        prefill_flops: of the language model, to read the prompt.
        decode_flops: of one more token.
        kv_cache_bytes: of the whole prompt.
        kv_cache_bytes_per_token: of one place.
    """

    parameters: dict[str, int]
    visual_tokens: int
    sequence: int
    encode_flops: int
    connect_flops: int
    prefill_flops: int
    decode_flops: int
    kv_cache_bytes: int
    kv_cache_bytes_per_token: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cost(model: FusionModel, images: int = 1, text_tokens: int = 64, grid: Grid | None = None, names: int = 0) -> Cost:
    """The cost of a prompt with `images` pictures and `text_tokens` words: prefill, then each decoded token.

    Args:
        images: pictures in the prompt, 0 or more.
        text_tokens: text tokens in the prompt; the placeholders are not among them.
        names: tokens of the names of a picture's regions (`ChiasmProcessor.region_tokens`), in the sequence too.
        grid: rows and columns of a picture's patches, where a unified model reads pictures of any size; by default
            those of its `image_size`.
    """
    if images < 0 or text_tokens < 1:
        raise ValueError(f"images={images}, text_tokens={text_tokens}; expected at least 0 and 1")
    seen = images or _blank_pictures(model)
    picture = _picture(model, grid, encode=images > 0)
    sequence = images * (picture.places + names) + text_tokens
    if model.config.is_encoder_decoder:
        language = seq2seq_cost(model.language, sequence)
    else:
        language = _decoder_cost(model, sequence, seen * picture.tokens)
    return Cost(
        parameters={part: sum(p.numel() for p in getattr(model, part).parameters()) for part in parts(model)},
        visual_tokens=images * picture.tokens,
        sequence=sequence,
        encode_flops=images * picture.encode_flops,
        connect_flops=seen * picture.connect_flops,
        prefill_flops=language.prefill_flops,
        decode_flops=language.decode_flops,
        kv_cache_bytes=language.cache_bytes,
        kv_cache_bytes_per_token=language.cache_bytes_per_token,
    )


@dataclass(frozen=True)
class _Picture:
    """Visual tokens of one picture, places that it takes in the sequence, and FLOPs until the decoder reads it."""

    tokens: int
    places: int
    encode_flops: int
    connect_flops: int


def _picture(model: FusionModel, grid: Grid | None, encode: bool) -> _Picture:
    """`encode`: whether the encoder's FLOPs are wanted, which are counted by running it."""
    if isinstance(model, UnifiedModel):
        usual, (rows, columns) = model.vision.grid, grid or model.vision.grid
        flops = model.vision.flops() * rows * columns // (usual[0] * usual[1])
        return _Picture(rows * columns, model.picture_places(rows, columns), flops, 0)
    connector = model.connector
    if isinstance(model, PackedFusionModel):
        tokens = model.vision.grid[0] * model.vision.grid[1]
        return _Picture(tokens, tokens, model.vision.flops(), tokens * connector.flops())
    encoding = encode_flops(model.vision) if encode else 0
    if isinstance(model, TiledFusionModel):
        tiles, places = model.tiling.tiles(*model.tiling.square), model.num_image_tokens
        return _Picture(places, places, tiles * encoding, tiles * connector.flops())
    return _Picture(connector.num_tokens, model.num_image_tokens, encoding, connector.flops())


def _blank_pictures(model: FusionModel) -> int:
    """Pictures that text alone looks at: a blank one where the blocks' feed-forward reads all text (Idefics)."""
    return int(isinstance(model, IntermediateFusionModel) and not model.cross_attention.settings.mask_feed_forward)


def _decoder_cost(model: FusionModel, sequence: int, visual_tokens: int) -> LanguageCost:
    per_token = kv_bytes_per_token(model)
    looked_at, per_look, kept = _cross_attention(model, visual_tokens)
    return LanguageCost(
        prefill_flops=language_flops(model, new=sequence, context=sequence, logits=1) + looked_at + per_look * sequence,
        decode_flops=language_flops(model, new=1, context=sequence + 1, logits=1) + per_look,
        cache_bytes=per_token * sequence + kept,
        cache_bytes_per_token=per_token,
    )


def parts(model: FusionModel) -> list[str]:
    """The parts that the model has."""
    return [part for part in PARTS if hasattr(model, part)]


def _cross_attention(model: FusionModel, visual_tokens: int) -> tuple[int, int, int]:
    """Intermediate fusion's FLOPs of the pictures' keys and values and of each token, and the bytes that are kept."""
    if not isinstance(model, IntermediateFusionModel) or not visual_tokens:
        return 0, 0, 0
    part, settings = model.cross_attention, model.cross_attention.settings
    kept = 2 * len(settings.layers) * settings.kv_heads * settings.head_dim * visual_tokens
    per_token = part.flops(1, visual_tokens)
    return part.keys_values_flops(visual_tokens), per_token, kept * part.blocks[0].k_proj.weight.dtype.itemsize


def language_flops(model: FusionModel, new: int, context: int, logits: int) -> int:
    """FLOPs of `new` tokens that attend to `context` positions (themselves included), and of `logits` head rows.

    Attention is counted as it is computed: a full `new × context` square, masked or not.
    """
    config = model.config.text_config
    heads, size = config.num_attention_heads, _head_size(config)
    matrices = _decoder_matrix_elements(model)
    attention = 2 * 2 * new * context * heads * size * config.num_hidden_layers
    head = model.language.get_output_embeddings().weight
    return 2 * new * matrices + attention + 2 * logits * head.numel()


def kv_bytes_per_token(model: FusionModel) -> int:
    """Bytes that one position adds to the cache, in the model's dtype; a sliding window is not subtracted."""
    config = model.config.text_config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * _head_size(config) * model.language.dtype.itemsize


def encode_flops(vision: VisionEncoder) -> int:
    """FLOPs of one picture through the encoder, counted by running its own code on tensors without data.

    They are fake tensors of the meta device: transformers does not look at the values of their masks. An encoder that
    looks at other values runs on a blank picture instead.
    """
    with torch.device("meta"):
        shadow = VisionEncoder.from_config(vision.model.config, vision.features).eval()
    try:
        return _counted(shadow, torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True))
    except DataDependentOutputException:  # its forward looks at values (SigLIP 2's sizes of pictures)
        return _counted(vision, vision.model.device, nullcontext())


def _counted(vision: VisionEncoder, device: torch.device, mode: AbstractContextManager) -> int:
    blank = torch.zeros(1, 3, *vision.image_size, device=device, dtype=vision.model.dtype)
    with mode, torch.inference_mode(), FlopCounterMode(display=False) as counter:
        vision(blank)
    return counter.get_total_flops()


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _decoder_matrix_elements(model: FusionModel) -> int:
    """Elements of every matrix that a token is multiplied with: two-dimensional weights inside the layers."""
    return sum(p.numel() for p in layers(model.language).parameters() if p.ndim == 2)
