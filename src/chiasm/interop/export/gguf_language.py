"""A language model's weights and configuration → a GGUF file of llama.cpp."""

from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
"""Model type → llama.cpp's name of the architecture."""

SCALED = {"llama": ("linear", "llama3"), "mistral": ("linear", "llama3")}
"""Model type → rotations beside the plain one for which llama.cpp is known to give the same answers."""

UNBIASED = ("qwen3",)
"""Model types whose attention may have biases, but not in llama.cpp."""

QUANTIZATIONS = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q5_1": GGMLQuantizationType.Q5_1,
    "q5_0": GGMLQuantizationType.Q5_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q4_0": GGMLQuantizationType.Q4_0,
}
HALF_ONLY = ("mm.model.peg.0.weight",)
"""Kernels of depth-wise convolutions, which llama.cpp computes in half precision alone."""

HALF = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def require_architecture(config: PreTrainedConfig) -> None:
    """Refuses a language model that this conversion does not know in llama.cpp."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"a language model of type {config.model_type!r} is none that this conversion writes as GGUF "
            f"({', '.join(ARCHITECTURES)}); convert --to transformers and use llama.cpp's own converter, or --to onnx"
        )
    rope, known = _rope_type(config), ("default", *SCALED.get(config.model_type, ()))
    if rope not in known:
        raise ValueError(
            f"this language model has rope_type {rope!r}, this conversion writes {', '.join(map(repr, known))} for "
            f"{config.model_type!r}; convert --to transformers and use llama.cpp's own converter"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"this language model has hidden_act {config.hidden_act!r}, llama.cpp computes its kind with 'silu'; "
            "convert --to onnx"
        )
    if config.model_type in UNBIASED and config.attention_bias:
        raise ValueError(
            f"this language model has attention_bias, for which llama.cpp's {config.model_type!r} has no place; "
            "convert --to onnx"
        )


def _rope_type(config: PreTrainedConfig) -> str:
    rope: dict[str, Any] = config.rope_parameters or {}
    return rope.get("rope_type", "default")


def _write_rope(writer: GGUFWriter, config: PreTrainedConfig, width: int) -> None:
    """Writes how far a head's pairs turn from one token to the next."""
    rope, kind = config.rope_parameters or {}, _rope_type(config)
    base = rope.get("rope_theta", 10000.0)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(base)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind != "default":
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config)
        plain = base ** -(torch.arange(0, width, 2) / width)
        add_tensor(writer, "rope_freqs.weight", plain / scaled, "f32")


def window(config: PreTrainedConfig) -> int | None:
    """Tokens that a layer sees at most, where that is less than the context; llama.cpp lets these models see all."""
    kinds, width = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    near = width is not None and (kinds is None or "sliding_attention" in kinds)
    return width if near and width < config.max_position_embeddings else None


def write_language(
    writer: GGUFWriter, config: PreTrainedConfig, weights: dict[str, Tensor], rows: int, quantization: str
) -> None:
    """Writes the hyperparameters and tensors of a language model."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(window(config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)
    _write_rope(writer, config, width)
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in weights.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"llama.cpp's {config.model_type!r} has no place for weight {name!r}; convert --to onnx")
        if architecture == MODEL_ARCH.LLAMA and ".q_proj." in name:
            tensor = interleaved(tensor, heads)
        if architecture == MODEL_ARCH.LLAMA and ".k_proj." in name:
            tensor = interleaved(tensor, groups)
        add_tensor(writer, theirs, tensor, quantization)


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of every head in the order of rotary pairs, which llama.cpp's Llama keeps side by side."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, quantization: str) -> None:
    """Adds a tensor, in float32 where it is no matrix, and in half precision where its rows make no blocks."""
    values: NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    kind = QUANTIZATIONS[quantization] if values.ndim == 2 else GGMLQuantizationType.F32
    kind = GGMLQuantizationType.F16 if name in HALF_ONLY else kind
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if values.shape[-1] % block:
        kind = GGMLQuantizationType.F16
    if kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    elif kind == GGMLQuantizationType.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def own_quantization(dtype: torch.dtype) -> str:
    """The precision that keeps weights as they are."""
    return HALF.get(dtype, "f16")


def file_type(quantization: str) -> Any:
    """llama.cpp's word for what most tensors of a file are."""
    words = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    return gguf.LlamaFileType[words.get(quantization, f"MOSTLY_{quantization.upper()}")]
