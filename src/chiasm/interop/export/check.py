"""Proof of a conversion: the folder is loaded by transformers alone, and asked what the model was asked."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available

from chiasm.data.captions import CaptionProcessor
from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.packed import PackedFusionModel
from chiasm.fusion.part_dtypes import PartDtypes, part_dtypes
from chiasm.fusion.tiled import TiledFusionModel
from chiasm.interop.export.parts import Exported
from chiasm.language.adapter import vocabulary
from chiasm.vision.patches import PatchEmbedding

CLOSE, CLOSE_IN_HALF = 1e-4, 0.05
"""Share of the logits' spread by which any may differ in float32, and by which they may differ on average in less."""

LEVELS = 3
"""Of 255, by which two libraries may scale a picture apart: transformers takes torchvision where it is installed,
Chiasm takes Pillow."""

EXACT = 1e-4
"""By which the same arithmetic in another order may differ."""

PAIRS = 4
"""Pictures and texts of noise whose scores are compared."""

THEIRS = {"instruction_ids": "qformer_input_ids", "instruction_mask": "qformer_attention_mask"}
"""Names of inputs that transformers calls otherwise."""

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


def check_folder(folder: Path, model: FusionModel, processor: ChiasmProcessor | None, exported: Exported) -> float:
    """The largest difference between the logits of a model and those of the folder that it was written to, as a share
    of their spread; below float32 the average one.

    Raises:
        ValueError: they, or the processors' inputs, are not the same.
    """
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=model.dtype).eval().to(model.device)
    inputs = blank_inputs(model)
    if processor is not None and exported.processor is not None:
        inputs = dict(processor(messages=QUESTION, images=probe_picture(model)).to(model.device))
        inputs = {THEIRS.get(name, name): tensor for name, tensor in inputs.items()}
        near = _near(processor.image_processor) if is_torchvision_available() else EXACT
        _compare_inputs(folder, model, exported, inputs, near)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    inputs |= _more(model, inputs, exported.rows)
    with torch.no_grad():
        ours, found = model(**inputs).logits, theirs(**inputs).logits[..., : model.config.text_config.vocab_size]
    return _difference(model, ours, found)


def check_late(folder: Path, model: LateFusionModel, processor: CaptionProcessor | None = None) -> float:
    """The same for two towers, of pictures and texts of noise.

    Raises:
        ValueError: the scores, or the processors' inputs, are not the same.
    """
    if processor is not None:
        _compare_captions(folder, model, processor)
    theirs = AutoModel.from_pretrained(folder, dtype="auto").eval().to(model.device)
    text: Any = model.config.text_config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text.vocab_size, (PAIRS, text.max_position_embeddings), generator=generator)
    pixels = torch.randn(PAIRS, 3, *model.vision.image_size, generator=generator)
    inputs = {"input_ids": ids.to(model.device), "pixel_values": pixels.to(model.device, model.dtype)}
    with torch.no_grad():
        return _difference(model, model(**inputs).logits_per_image, theirs(**inputs).logits_per_image)


def _difference(model: PartDtypes, ours: Tensor, found: Tensor) -> float:
    hidden = ours == torch.finfo(ours.dtype).min  # of codes, in both; they would make the spread infinite
    spread = ours[~hidden].float().std().clamp(min=1e-6)
    apart, exact = (ours - found).float().abs(), set(part_dtypes(model).values()) == {torch.float32}
    difference = float(((apart.max() if exact else apart.square().mean().sqrt()) / spread).item())
    if not difference <= (CLOSE if exact else CLOSE_IN_HALF):
        raise ValueError(
            f"the checkpoint gives other logits than the model, by {difference:.2g} of their spread; "
            "this is a fault of the conversion: report it with the model's config.json"
        )
    return difference


def _more(model: FusionModel, inputs: dict[str, Tensor], rows: bool) -> dict[str, Tensor]:
    """What some kinds of models need beside a picture and a text."""
    more, words = {}, torch.ones(1, 3, dtype=torch.long, device=model.device)
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = words
    if model.reads_instruction and "qformer_input_ids" not in inputs:
        more |= {"qformer_input_ids": words, "qformer_attention_mask": words}
    if isinstance(model, PackedFusionModel):
        more["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    if model.config.fusion == "intermediate":
        places = inputs["input_ids"] == model.config.image_token_id
        more["image_attention_mask"] = places.cumsum(dim=1).clamp(max=1)[..., None]
        if model.config.image_token_id >= vocabulary(model.language):
            more["input_ids"] = inputs["input_ids"].masked_fill(places, 0)
    native = model.config.features is not None and model.vision.features.resolution == "native"
    by_row = model.config.fusion == "intermediate" or native or rows
    if by_row and inputs["pixel_values"].ndim == 4:
        more["pixel_values"] = inputs["pixel_values"][None]
    return more


def check_onnx(folder: Path, model: FusionModel) -> float:
    """The largest difference between the logits of a model and those of its graphs, as a share of their spread.

    Raises:
        ValueError: they are not the same.
    """
    from chiasm.interop.onnx_model import OnnxModel

    inputs = blank_inputs(model)
    found, _ = OnnxModel(folder).forward({name: tensor.cpu().numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        ours = model(**inputs).logits.cpu()
    difference = float(((ours - torch.from_numpy(found)).abs().max() / ours.std().clamp(min=1e-6)).item())
    if not difference <= 1e-3:
        raise ValueError(f"the graphs give other logits than the model, by {difference:.2g} of their spread")
    return difference


def probe_picture(model: FusionModel) -> Image.Image:
    """Noise of the encoder's size but for one side, so that cropping and padding show."""
    height, width = model.vision.image_size
    pixels = torch.randint(0, 256, (height, width + width // 3, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def blank_inputs(model: FusionModel) -> dict[str, Tensor]:
    """One picture of noise and a few words, for a model without a processor."""
    generator = torch.Generator().manual_seed(0)
    words, count = torch.arange(1, 8), model.num_image_tokens
    pixels = torch.randn(1, 3, *model.vision.image_size, generator=generator)
    if isinstance(model.vision, PatchEmbedding):
        count = model.vision.grid[0] * model.vision.grid[1]
        pixels = torch.randn(1, count, model.vision.projection.in_features, generator=generator)
    more = {}
    if isinstance(model, TiledFusionModel):
        size = probe_picture(model).size[::-1]
        count, more = model.tiling.length(*size), {"image_sizes": torch.tensor([size])}
        pixels = torch.randn(1, model.tiling.tiles(*size), 3, *model.vision.image_size, generator=generator)
    if isinstance(model, PackedFusionModel):
        tower, side = model.vision.config, model.vision.merge
        count, more = 6, {"image_grid_thw": torch.tensor([[1, 2 * side, 3 * side]])}
        pixels = torch.randn(
            count * side**2, tower.in_channels * tower.temporal_patch_size * tower.patch_size**2, generator=generator
        )
    ids = torch.cat([torch.full((count,), model.config.image_token_id), words])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels} | more
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _near(images: Any) -> float:
    """What `LEVELS` are in pixel values."""
    scale = images.rescale_factor if images.do_rescale else 1.0
    return LEVELS * scale / (min(images.image_std) if images.do_normalize else 1.0)


def _compare_inputs(
    folder: Path, model: FusionModel, exported: Exported, inputs: dict[str, Any], near: float = EXACT
) -> None:
    """
    Args:
        near: by how much pixel values may differ.
    """
    theirs = AutoProcessor.from_pretrained(folder) if exported.loads else exported.processor
    found = exported.ask(theirs, QUESTION, probe_picture(model))
    for name, wanted in inputs.items():
        given = found[name].to(wanted) if name in found else None
        if given is not None and given.numel() == wanted.numel():
            given = given.reshape(wanted.shape)  # some count a row's pictures apart
        apart = near if name == "pixel_values" else EXACT
        if given is None or given.shape != wanted.shape or not torch.allclose(given, wanted, rtol=EXACT, atol=apart):
            raise _others(name)


def _compare_captions(folder: Path, model: LateFusionModel, processor: CaptionProcessor) -> None:
    """Of a short text and one that is cut, and of a picture, up to a few of 255 levels, which libraries round apart."""
    theirs, images = AutoProcessor.from_pretrained(folder), processor.image_processor
    texts, picture = ["A red cat", "two Dogs and more " * processor.text_length], probe_picture(model)
    filled = "max_length" if processor.fixed_length else True
    found = theirs(text=texts, images=[picture], padding=filled, truncation=True, return_tensors="pt")
    wanted = processor(text=texts, images=[picture])
    for name in dict.fromkeys([*wanted, *found]):
        same = name in found and name in wanted and found[name].shape == wanted[name].shape
        if not same or not torch.allclose(found[name], wanted[name], rtol=0, atol=_near(images)):
            raise _others(name)


def _others(name: str) -> ValueError:
    return ValueError(
        f"the processor that was written gives other {name} than the model's own; "
        "this is a fault of the conversion: report it with the model's processor files"
    )
