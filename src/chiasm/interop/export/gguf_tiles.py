"""Pictures in tiles as llama.cpp's projector type `idefics3` cuts and writes them, whatever the model wants."""

from chiasm.data.processor import ChiasmProcessor
from chiasm.fusion.base import FusionModel
from chiasm.interop.export.parts import require
from chiasm.interop.idefics3 import BOUNDARY, WHOLE

TILED = "idefics3"
"""The projector type for which llama.cpp cuts every picture into at least one tile, and shows it as a whole too."""

MARKS = (BOUNDARY, WHOLE, "\n", "\n\n")
"""What it writes around tiles, beside their rows and columns, which it tokenizes as a text."""

NOTE = (
    "llama.cpp scales a picture to the tiles, and to the whole, in one step, Idefics3's processor in several: only "
    "square pictures of {side} pixels look exactly alike to it"
)


def longest_side(model: FusionModel, processor: ChiasmProcessor) -> int:
    """Pixels of the longer side to which pictures are scaled before they are cut.

    Raises:
        ValueError: the model reads some or all pictures as one.
    """
    side, size = model.vision.image_size[0], getattr(processor.image_processor, "size", {})
    longest = size.get("longest_edge") if processor.image_tiles is None and processor.image_tag else None
    require(
        longest is not None and longest > side,
        f"llama.cpp's {TILED!r} reads every picture in tiles and as a whole, between its own marks; this model reads "
        + (f"those of up to {longest} pixels as one" if longest else "a picture as one"),
        "convert an Idefics3 or SmolVLM checkpoint that splits pictures, or --to transformers, or --to onnx",
    )
    return int(longest)  # type: ignore[arg-type]


def require_tokens(processor: ChiasmProcessor) -> None:
    """Refuses a tokenizer of which llama.cpp makes other tokens around tiles: it looks each mark up as one.

    Raises:
        ValueError: it is one.
    """
    words = processor.tokenizer
    split = [mark for mark in MARKS if len(words(mark, add_special_tokens=False)["input_ids"]) != 1]
    require(
        not split and (processor.image_boundary, processor.image_tag) == (BOUNDARY, WHOLE),
        f"llama.cpp writes {', '.join(map(repr, MARKS))} around tiles, a token each; this model's tokenizer has more "
        f"than one for {', '.join(map(repr, split)) or 'other marks'}",
        "take one that has these tokens, as SmolVLM's, or convert --to onnx",
    )
