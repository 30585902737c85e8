"""Members of the family of models, as transformers' tests ask for them: a configuration with two layers, and inputs."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

from chiasm.fusion.build import build_fusion
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early import EarlyFusionModel
from chiasm.fusion.early_seq2seq import EarlySeq2SeqModel
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.late_build import build_late
from chiasm.fusion.packed import PackedFusionModel
from chiasm.fusion.qformer_retrieval import QFormerRetrieval, build_retrieval
from chiasm.fusion.tiled import TiledFusionModel
from chiasm.fusion.unified import UnifiedModel
from chiasm.fusion.unified_build import build_unified
from chiasm.fusion.unified_decoder import UnifiedDecoder, UnifiedDecoderConfig, UnifiedDecoderForCausalLM
from chiasm.vision.encoder import load_vision
from chiasm.vision.pooling import features_for

VOCABULARY, IMAGE, ROW, PAD = 99, 4, 5, 1
LAYERS, HEADS, WIDTH = 2, 4, 32
ROWS = 7

QFORMER = {"name": "qformer", "num_queries": 5, "width": 24, "depth": 2, "heads": 3}
RESAMPLER = {"name": "perceiver_resampler", "num_latents": 5, "depth": 2, "heads": 3, "head_dim": 7}
PREFIX = {"attention": "prefix"}
GATED = {"fusion": "intermediate", "cross_attention": {"every": 1, "heads": 4, "head_dim": 8}}
PATCHES = {"name": "patches", "patch_size": 5}
CODES = {"name": "vq", "image_size": [16, 24], "factor": 8, "levels": [3, 2], "width": 8, "depth": 1}
MROPE, ROPE2D = {"positions": "mrope+modality"}, {"positions": "rope2d"}
MARKS = {"row_token_id": ROW, "begin_token_id": 6, "end_token_id": 7}
CODE_MARKS = {"row_token_id": None, "begin_token_id": 6, "end_token_id": 7, "code_ids": 8}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {"image_size": 40, "patch_size": 10}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": PAD,
}


def clip() -> PreTrainedModel:
    return CLIPVisionModel(CLIPVisionConfig(**TOWER, **PICTURE))


def siglip() -> PreTrainedModel:
    return SiglipVisionModel(SiglipVisionConfig(**TOWER, **PICTURE, vision_use_head=False))


def dinov2() -> PreTrainedModel:
    return Dinov2Model(Dinov2Config(**TOWER, **PICTURE))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=False))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True))


def t5() -> PreTrainedModel:
    sizes = {"d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_layers": LAYERS, "num_heads": HEADS}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, **sizes, pad_token_id=PAD, eos_token_id=3, decoder_start_token_id=PAD)
    )


def bert() -> PreTrainedModel:
    return BertModel(BertConfig(vocab_size=VOCABULARY, **TOWER))


def words(rows: int, length: int) -> Tensor:
    """Tokens that are no placeholder, no mark, and stay known to a table that is cut by fifteen."""
    return 20 + 11 * torch.arange(rows * length).reshape(rows, length) % (VOCABULARY - 36)


def pixels() -> Tensor:
    """A picture for each row."""
    return torch.rand(ROWS, 3, 40, 40)


class Member:
    """A configuration and inputs for `classes`; `seq_length` counts placeholders too."""

    classes: tuple[Any, ...] = (EarlyFusionModel,)
    is_training = True
    batch_size = ROWS
    num_hidden_layers, num_attention_heads, hidden_size = LAYERS, HEADS, WIDTH
    vocab_size, pad_token_id, image_token_id = VOCABULARY, PAD, IMAGE
    text_length = 7
    num_image_tokens = 0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.config = self.build()
        self.seq_length = self.num_image_tokens + self.text_length
        self.encoder_seq_length = self.seq_length

    def build(self) -> PreTrainedConfig:
        raise NotImplementedError

    def inputs(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def labels(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """What the inputs of training have beside these."""
        return {"labels": words(ROWS, self.seq_length)}

    def get_config(self) -> PreTrainedConfig:
        return type(self.config).from_dict(copy.deepcopy(self.config.to_dict()))

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        return self.get_config(), self.inputs()

    def picture(self) -> list[int]:
        """Tokens that stand for a picture."""
        return [IMAGE] * self.num_image_tokens

    def prompts(self) -> dict[str, Tensor]:
        """Three words, a picture, and more words."""
        pictures = torch.tensor([self.picture()] * ROWS, dtype=torch.long)
        ids = torch.cat([words(ROWS, 3), pictures, words(ROWS, self.text_length - 3)], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Fusion(Member):
    """An encoder, a connector and a language model."""

    vision: Any = staticmethod(siglip)
    language: Any = staticmethod(llama)
    connector: Any = "mlp"
    options: Any = None

    def build(self) -> PreTrainedConfig:
        model = build_fusion(load_vision(self.vision()), self.language(), self.connector, IMAGE, **self.options or {})
        self.num_image_tokens = model.num_image_tokens
        return model.config

    def inputs(self) -> dict[str, Tensor]:
        return {**self.prompts(), "pixel_values": pixels()}


class MLP(Fusion):
    """LLaVA's way."""


class TiedQFormer(Fusion):
    """BLIP-2's way, with a language model whose embeddings are its head."""

    vision = staticmethod(clip)
    language = staticmethod(qwen2)
    connector = QFORMER


class PixelShuffle(Fusion):
    """InternVL's way, with a tower of another kind."""

    vision = staticmethod(dinov2)
    connector = "pixel_shuffle"


class Prefix(Fusion):
    """PaliGemma's way: the prompt is read in both directions."""

    connector = "linear"
    options = PREFIX

    def inputs(self) -> dict[str, Tensor]:
        types = torch.zeros(ROWS, self.seq_length, dtype=torch.long)
        types[:, -3:] = 1
        return {**super().inputs(), "token_type_ids": types}


class Tiled(Fusion):
    """LLaVA-NeXT's way: square pictures, each whole and in two tiles side by side, of which padding takes a half."""

    classes = (TiledFusionModel,)
    options = {"tiles": [(1, 2), (2, 1)]}

    def inputs(self) -> dict[str, Tensor]:
        sizes = torch.tensor([[80, 80]] * ROWS)
        return {**self.prompts(), "pixel_values": torch.rand(ROWS, 3, 3, 40, 40), "image_sizes": sizes}


class EncoderDecoder(Fusion):
    """BLIP-2 with T5."""

    classes = (EarlySeq2SeqModel,)
    language = staticmethod(t5)
    decoder_seq_length = decoder_key_length = 5

    def inputs(self) -> dict[str, Tensor]:
        answer = words(ROWS, self.decoder_seq_length)
        return {**super().inputs(), "decoder_input_ids": answer, "decoder_attention_mask": torch.ones_like(answer)}

    def labels(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        return {"labels": words(ROWS, self.decoder_seq_length)}


class Packed(Member):
    """Qwen2-VL's way."""

    classes = (PackedFusionModel,)
    num_image_tokens = 6

    def build(self) -> PreTrainedConfig:
        tower = {"depth": LAYERS, "embed_dim": 32, "num_heads": HEADS, "hidden_size": WIDTH}
        return ChiasmConfig(
            vision_config={"model_type": "qwen2_vl_vision", "patch_size": 4, "mlp_ratio": 2, **tower},
            text_config={"model_type": "chiasm_decoder", **DECODER, "positions": "mrope", "query_bias": True},
            connector={"name": "patch_merger", "factor": 2},
            image_token_id=IMAGE,
            video_token_id=ROW,
            direct_head=True,
        )

    def inputs(self) -> dict[str, Tensor]:
        grids = torch.tensor([[1, 4, 6]] * ROWS)
        return {**self.prompts(), "pixel_values": torch.rand(ROWS, 24, 3 * 2 * 4 * 4), "image_grid_thw": grids}


class Gated(Fusion):
    """Flamingo's way."""

    classes = (IntermediateFusionModel,)
    connector = RESAMPLER
    options = GATED


class Unified(Member):
    """One decoder, whose marks and codes are tokens of the lower half of its vocabulary."""

    classes = (UnifiedModel,)
    image_input: Any = None
    options: Any = None
    marks = MARKS

    def build(self) -> PreTrainedConfig:
        model, _ = build_unified(
            {**DECODER, "vocab_size": VOCABULARY - 4}, None, self.image_input, **self.options or {}
        )
        config = model.config
        config.image_token_id = IMAGE
        config.unified |= self.marks
        config.text_config.vocab_size = VOCABULARY
        return config


class Patches(Unified):
    """Fuyu's way."""

    image_input = PATCHES
    options = MROPE
    num_image_tokens = 8  # ends of rows included

    def picture(self) -> list[int]:
        return [*[IMAGE] * 3, ROW] * 2

    def inputs(self) -> dict[str, Tensor]:
        return {**self.prompts(), "pixel_values": torch.rand(ROWS, 6, 75)}


class Codes(Unified):
    """Chameleon's way."""

    image_input = CODES
    options = ROPE2D
    marks = CODE_MARKS
    num_image_tokens = 6

    def inputs(self) -> dict[str, Tensor]:
        return {**self.prompts(), "pixel_values": torch.rand(ROWS, 3, 16, 24) * 2 - 1}


class Decoder(Member):
    """The unified transformer's decoder by itself."""

    classes = (UnifiedDecoder, UnifiedDecoderForCausalLM)
    base_model_class, causal_lm_class = classes

    def build(self) -> PreTrainedConfig:
        return UnifiedDecoderConfig(**DECODER, qk_norm="rms")

    def inputs(self) -> dict[str, Tensor]:
        return self.prompts()


class DualEncoder(Member):
    """CLIP's way."""

    classes = (LateFusionModel,)

    def build(self) -> PreTrainedConfig:
        encoder = load_vision(siglip(), features=features_for("mean"))
        return build_late(encoder, bert(), {"name": "linear", "space": 12}, "mean", "mean").config

    def inputs(self) -> dict[str, Tensor]:
        return {**self.prompts(), "pixel_values": pixels()}

    def labels(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        return {"return_loss": True}


class Retrieval(Member):
    """BLIP-2's first stage."""

    classes = (QFormerRetrieval,)

    def build(self) -> PreTrainedConfig:
        model = build_fusion(load_vision(siglip()), llama(), QFORMER, IMAGE)
        return build_retrieval(model, VOCABULARY, space=12).config

    def inputs(self) -> dict[str, Tensor]:
        return {**self.prompts(), "pixel_values": pixels()}
