"""`--to onnx`: three graphs for ONNX Runtime: pictures → visual tokens, words → embeddings, and a decoder with a cache.

The caller puts visual tokens in the places of their placeholders, as `chiasm.interop.onnx_model` does. Keys and values
of earlier tokens go in and come out, so one graph reads the prompt and every token after it.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.parts import ends, require
from chiasm.language.adapter import accepts

VISION, EMBEDDING, DECODER, SETTINGS = "vision.onnx", "embedding.onnx", "decoder.onnx", "chiasm_onnx.json"
EXAMPLE_PAST, EXAMPLE_LENGTH = 3, 5


class VisualTokens(nn.Module):
    """Pixels `(I, 3, height, width)` → visual tokens `(I, T, D_l)`."""

    def __init__(self, model: FusionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.model.visual_tokens(pixel_values)
        assert tokens is not None
        return tokens


class Embedding(nn.Module):
    """Token ids → their embeddings."""

    def __init__(self, model: FusionModel) -> None:
        super().__init__()
        self.table = model.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


class Decoder(nn.Module):
    """Embeddings and earlier keys and values → logits, and keys and values with those of the new tokens."""

    def __init__(self, language: PreTrainedModel) -> None:
        super().__init__()
        self.language = language
        self.takes_positions = accepts(language, "position_ids")
        config = language.config
        self.window: Any = getattr(config, "sliding_window", None)
        alike = [] if self.window is None else ["sliding_attention"]  # all layers, as in Mistral
        self.kinds = sorted(set(getattr(config, "layer_types", None) or alike))

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)])
        mask = self._mask(inputs_embeds, attention_mask)
        inputs: dict[str, Any] = {"inputs_embeds": inputs_embeds, "attention_mask": mask}
        if self.takes_positions:
            inputs["position_ids"] = position_ids
        output = self.language(**inputs, cache=cache, use_cache=True, return_dict=True)
        present = [tensor for layer in output.cache.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)

    def _mask(self, embeddings: Tensor, attention_mask: Tensor) -> Any:
        """Additive masks: a token sees real tokens up to itself, in a window where its layer has one."""
        length, total = embeddings.shape[1], attention_mask.shape[1]
        keys = torch.arange(total, device=embeddings.device)
        queries = keys[total - length :]
        causal = keys[None, :] <= queries[:, None]
        full = self._additive(causal, attention_mask, embeddings)
        if "sliding_attention" not in self.kinds:
            return dict.fromkeys(self.kinds, full) if len(self.kinds) > 1 else full
        near = causal & (keys[None, :] > queries[:, None] - self.window)
        masks = {"full_attention": full, "sliding_attention": self._additive(near, attention_mask, embeddings)}
        return masks if len(self.kinds) > 1 else masks[self.kinds[0]]

    @staticmethod
    def _additive(seen: Tensor, attention_mask: Tensor, like: Tensor) -> Tensor:
        allowed = seen[None, None] & attention_mask[:, None, None, :].bool()
        return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)


def export_onnx(model: FusionModel, processor: ChiasmProcessor | None, folder: Path) -> list[str]:
    """Writes the graphs and the processor, and returns what is good to know about them.

    Raises:
        ValueError: the model is of a kind that has no such graphs.
    """
    config = model.config
    plain = config.fusion == "early" and not (config.is_encoder_decoder or model.reads_instruction or config.tiles)
    one_size = plain and config.features is not None and model.vision.features.resolution == "fixed"
    require(
        one_size and config.attention == "causal",
        "ONNX graphs are for early fusion with a causal decoder, pictures of one size and connectors that read no "
        f"instruction; this is fusion {config.fusion!r}, attention {config.attention!r}, connector "
        f"{(config.connector or {}).get('name')!r}{', pictures in tiles' if config.tiles else ''}",
        "use Chiasm's own server",
    )
    folder.mkdir(parents=True, exist_ok=True)
    with eager(model), torch.no_grad():
        _export_vision(model, folder / VISION)
        _export_embedding(model, folder / EMBEDDING)
        _export_decoder(model.language, folder / DECODER)
    settings = {
        "image_token_id": config.image_token_id,
        "layers": config.text_config.num_hidden_layers,
        "end_tokens": ends(model),
        "repetition_penalty": model.generation_config.repetition_penalty or 1.0,
        "cache": list(_cache_shape(model.language)),
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return ["run it with chiasm.interop.onnx_model.OnnxModel, or read docs/convert.md for the graphs' inputs"]


@contextmanager
def eager(model: FusionModel) -> Iterator[None]:
    """Attention as plain matrix products in float32, which every runtime has."""
    parts = (model.vision.model, model.language)
    before = [part.config._attn_implementation for part in parts]
    for part in parts:
        part.set_attn_implementation("eager")
    try:
        yield
    finally:
        for part, kind in zip(parts, before, strict=True):
            part.set_attn_implementation(kind)


def _export_vision(model: FusionModel, path: Path) -> None:
    pixels = torch.zeros(2, 3, *model.vision.image_size)
    shapes = {"pixel_values": {0: Dim("images")}}
    program = _export(VisualTokens(model), (pixels,), path, ["pixel_values"], ["visual_tokens"], shapes)
    connector, encoder = (model.config.connector or {}).get("name"), model.config.vision_config.model_type
    require(
        not isinstance(program.model.graph.inputs[0].shape[0], int),
        f"connector {connector!r} or encoder {encoder!r} holds the number of pictures as a constant, so that "
        "its graph would take no other",
        "read sizes from tensor.shape in its forward: len(tensor) and int(...) are written into the graph",
    )


def _export_embedding(model: FusionModel, path: Path) -> None:
    ids = torch.zeros(2, EXAMPLE_LENGTH, dtype=torch.long)
    shapes = {"input_ids": {0: Dim("batch"), 1: Dim("length")}}
    _export(Embedding(model), (ids,), path, ["input_ids"], ["embeddings"], shapes)


def _export_decoder(language: PreTrainedModel, path: Path) -> None:
    layers = language.config.num_hidden_layers
    heads, width = _cache_shape(language)
    embeddings = language.get_input_embeddings()(torch.zeros(2, EXAMPLE_LENGTH, dtype=torch.long))
    mask = torch.ones(2, EXAMPLE_PAST + EXAMPLE_LENGTH, dtype=torch.long)
    positions = torch.arange(EXAMPLE_PAST, EXAMPLE_PAST + EXAMPLE_LENGTH).expand(2, -1).contiguous()
    past = [torch.zeros(2, heads, EXAMPLE_PAST, width) for _ in range(2 * layers)]
    batch, length = Dim("batch"), Dim("length")
    shapes: dict[str, Any] = {
        "inputs_embeds": {0: batch, 1: length},
        "attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "position_ids": {0: batch, 1: length},
        "past": [{0: batch, 2: Dim.DYNAMIC} for _ in past],
    }
    names = [f"{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")]
    inputs = ["inputs_embeds", "attention_mask", "position_ids", *(f"past_{name}" for name in names)]
    outputs = ["logits", *(f"present_{name}" for name in names)]
    _export(Decoder(language), (embeddings, mask, positions, past), path, inputs, outputs, shapes)


def _export(module: Any, example: Any, path: Path, inputs: list[str], outputs: list[str], shapes: Any) -> Any:
    with without_notes():
        return torch.onnx.export(
            module.eval(),
            example,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=True,
            verbose=False,
        )


@contextmanager
def without_notes() -> Iterator[None]:
    """Without two warnings of torch's exporter: of its own use of a deprecated class, and of axes that share a name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning, r"copyreg$")
        warnings.filterwarnings("ignore", r"# The axis name:", UserWarning, r"torch\.onnx\._internal\.exporter\.")
        yield


def _cache_shape(language: PreTrainedModel) -> tuple[int, int]:
    """Heads and width of a layer's keys, found out on one token."""
    cache = language(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).cache
    shapes = {tuple(layer.keys.shape) for layer in cache.layers} | {tuple(layer.values.shape) for layer in cache.layers}
    require(len(shapes) == 1, "the layers' keys and values have different shapes", "use Chiasm's own server")
    return shapes.pop()[1], cache.layers[0].keys.shape[3]
