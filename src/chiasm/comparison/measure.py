"""What a picture costs a model, in closed form and measured: parameters, FLOPs, first token, decoding, KV cache."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chiasm.comparison.cost import cost, encode_flops, parts
from chiasm.comparison.curves import shape_of
from chiasm.comparison.flops import counted
from chiasm.comparison.timing import timed
from chiasm.data.collation import load_pixels
from chiasm.data.schema import Sample
from chiasm.fusion.base import FusionModel
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.unified import UnifiedModel
from chiasm.generation import decode

NEW_TOKENS = 16
"""Tokens that are decoded to time them."""


def measure(model: Any, processor: Any, sample: Sample, repeats: int) -> dict[str, Any]:
    """`closed_form`, `measured` and `shape` of one question about one picture.

    A picture's cache is what the prompt keeps beyond the same question without a picture: names of regions are its too.

    Args:
        model: in evaluation mode.
        sample: its first picture and question are asked.
        repeats: rounds in which all times are taken, after one that does not count; with 0 that one counts.
    """
    if isinstance(model, LateFusionModel):
        return _late(model, processor, sample, repeats)
    picture = sample.images[0].load()
    text = {"type": "text", "text": sample.question.strip()}
    asked, blind = ([{"role": "user", "content": content}] for content in ([{"type": "image"}, text], [text]))
    inputs = decode.prepare(model, processor, [asked], [[picture]], NEW_TOKENS)
    alone_inputs = decode.prepare(model, processor, [blind], [[]], NEW_TOKENS)
    words, alone_words = _text_tokens(model, inputs["input_ids"]), alone_inputs["input_ids"].shape[1]
    shown = inputs.get("image_grid_thw") if isinstance(model, UnifiedModel) else None
    grid = None if shown is None else (int(shown[0, 1]), int(shown[0, 2]))
    closed = cost(model, text_tokens=words, grid=grid).to_dict()
    alone = cost(model, images=0, text_tokens=alone_words)
    closed["kv_cache_bytes_per_image"] = closed["kv_cache_bytes"] - alone.kv_cache_bytes
    closed["connect_and_prefill_flops"] = closed["connect_flops"] + closed["prefill_flops"]
    return {
        "closed_form": closed,
        "measured": _generative(model, inputs, alone_inputs, repeats),
        "shape": shape_of(model, names=words - alone_words).to_dict() if not model.config.is_encoder_decoder else None,
    }


def _text_tokens(model: FusionModel, ids: Tensor) -> int:
    """Tokens beside those that the closed form counts as a picture's; names of its regions are among them."""
    marks = [model.config.image_token_id]
    if isinstance(model, UnifiedModel):
        settings = model.settings
        marks += [settings.row_token_id, settings.begin_token_id, settings.end_token_id]
    known = torch.tensor([mark for mark in marks if mark is not None], device=ids.device)
    return max(1, int((~torch.isin(ids, known)).sum()))


@torch.no_grad()
def _generative(
    model: FusionModel, inputs: dict[str, Tensor], blind: dict[str, Tensor], repeats: int
) -> dict[str, Any]:
    """`blind`: the same question without its picture, whose cache is not the picture's."""
    told: dict[str, Any] = {"pad_token_id": 0, "do_sample": False, "num_beams": 1}

    def generate(tokens: int) -> Callable[..., Any]:
        exactly = told | {"min_new_tokens": tokens, "max_new_tokens": tokens}
        return lambda streamer=None: model.generate(**inputs, **exactly, streamer=streamer)

    pixels = {name: inputs[name] for name in inputs if name.startswith("pixel")}
    measured: dict[str, Any] = timed(
        lambda: model.encode_images(**pixels),
        generate(NEW_TOKENS),
        NEW_TOKENS,
        repeats,
    )
    measured["encode_flops"] = encoding = _counted(lambda: model.encode_images(**pixels))
    measured["decode_flops"] = _counted(generate(2)) - _counted(generate(1))
    if model.config.is_encoder_decoder:
        return measured
    with torch.inference_mode(), counted() as reading:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    alone = model(**blind, use_cache=True, logits_to_keep=1)
    measured["connect_and_prefill_flops"] = reading.total - encoding
    measured["kv_cache_bytes_per_image"] = _cache_bytes(output) - _cache_bytes(alone)
    return measured


def _late(model: LateFusionModel, processor: Any, sample: Sample, repeats: int) -> dict[str, Any]:
    """Late fusion reads no sequence: its picture is one vector, made once, and an answer is one more step, that of the
    head which chooses it."""
    pixels = torch.as_tensor(load_pixels(sample, processor)).to(model.device, model.vision.model.dtype)
    parameters = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in parts(model)}
    with torch.no_grad():
        measured = timed(lambda: model.encode_images(pixels), None, NEW_TOKENS, repeats)
    closed = {"parameters": parameters, "visual_tokens": 1, "encode_flops": encode_flops(model.vision)}
    measured["encode_flops"] = _counted(lambda: model.encode_images(pixels))
    if model.config.answer_head is not None:
        widths = model.config.image_width, model.config.text_width
        image, text = (torch.zeros(1, width, device=model.device) for width in widths)
        closed["decode_flops"] = model.answer_head.flops()
        measured["decode_flops"] = _counted(lambda: model.answer_head(image, text))
    return {"closed_form": closed, "measured": measured, "shape": None}


def _counted(run: Callable[[], Any]) -> int:
    """Without gradients by `inference_mode`: under `no_grad` the counter stops at a module that is given a view of a
    parameter, such as learned queries."""
    with torch.inference_mode(), counted() as found:
        run()
    return found.total


def _cache_bytes(output: Any) -> int:
    """Bytes of the keys and values that an output keeps, of the sequence and of pictures beside it."""
    kept = [tensor for layer in output.cache.layers for tensor in (layer.keys, layer.values)]
    beside = getattr(output, "image_cache", None)
    kept += [] if beside is None else _tensors(beside.keys_values)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept if isinstance(tensor, Tensor))


def _tensors(nested: Sequence[Any]) -> list[Tensor]:
    return [tensor for pair in nested for tensor in pair]
